"""Params of `vla-foundry generate` and `vla-foundry caption`."""

import re
from dataclasses import dataclass, field

from vla_foundry.config.base import BaseParams


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
        _check_device(self.device)
        if not self.prompt or not all(self.prompt):
            raise ValueError('prompt is empty. Give one: --prompt "Once upon a time".')
        _check_sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True, kw_only=True)
class CaptionParams(BaseParams):
    """Say what images show, with a trained vision-language model."""

    # run folder (its newest checkpoint) or step folder; local, s3:// or hf://
    checkpoint: str
    # image files (JPEG, PNG, WebP), local, s3:// or hf://; each is captioned by itself
    image: list[str] = field(default_factory=list)
    # all images are shown together, and answered once
    together: bool = False
    # what is asked; <image> says where images go, else they come first; null: the run's first prompt
    prompt: str | None = None
    # longest answer, tokens
    max_new_tokens: int = 128
    # 0: always the likeliest token; 1: as the model says; higher: more varied
    temperature: float = 0.0
    # draw among the k likeliest tokens; 0: among all
    top_k: int = 0
    # draw among the likeliest tokens that together have this probability
    top_p: float = 1.0
    # seed of the draws; an image's draws do not depend on the other images
    seed: int = 0
    # images at a time
    batch_size: int = 16
    # cpu, cuda or cuda:N; auto: a GPU if there is one
    device: str = "auto"
    # the averaged weights; null: if the checkpoint has them
    use_ema: bool | None = None

    def __post_init__(self) -> None:
        _check_device(self.device)
        if not self.image or not all(self.image):
            raise ValueError("image is empty. Give one: --image photo.jpg.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size ({self.batch_size}) must be at least 1.")
        _check_sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


def _check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device '{device}' is unknown. Use auto, cpu, cuda or cuda:N.")


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1.")
    if temperature < 0:
        raise ValueError(f"temperature ({temperature}) must not be negative. 0 takes the likeliest token.")
    if top_k < 0:
        raise ValueError(f"top_k ({top_k}) must not be negative. 0 draws among all tokens.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p ({top_p}) must be above 0 and at most 1. 1 draws among all tokens.")
