"""Params of `vla-foundry generate`."""

import re
from dataclasses import dataclass, field

from vla_foundry.params.base import BaseParams


@dataclass(frozen=True, kw_only=True)
class GenerateParams(BaseParams):
    """Continue prompts with a trained language model."""

    # run folder (its newest checkpoint) or step folder; local, s3:// or hf://
    checkpoint: str
    # text to continue; give the flag several times for several prompts
    prompt: list[str] = field(default_factory=list)
    # longest continuation, tokens
    max_new_tokens: int = 64
    # 0: always the likeliest token; 1: as the model says; higher: more varied
    temperature: float = 0.8
    # draw among the k likeliest tokens; 0: among all
    top_k: int = 0
    # draw among the likeliest tokens that together have this probability
    top_p: float = 0.95
    # seed of the draws; a prompt's draws do not depend on the other prompts
    seed: int = 0
    # cpu, cuda or cuda:N; auto: a GPU if there is one
    device: str = "auto"
    # the averaged weights; null: if the checkpoint has them
    use_ema: bool | None = None
    # tokenizer (name or folder); null: the one in the run folder
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device '{self.device}' is unknown. Use auto, cpu, cuda or cuda:N.")
        if not self.prompt or not all(self.prompt):
            raise ValueError('prompt is empty. Give one: --prompt "Once upon a time".')
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must not be negative. 0 takes the likeliest token.")
        if self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must not be negative. 0 draws among all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1. 1 draws among all tokens.")
