"""Params of `vla-foundry import-checkpoint`."""

from dataclasses import dataclass

from vla_foundry.config.base import BaseParams


@dataclass(frozen=True, kw_only=True)
class ImportParams(BaseParams):
    """Turn a run of the earlier implementation into a run of ours."""

    # its folder: config.yaml or config_model.yaml, and checkpoints/checkpoint_N.pt; local, s3:// or hf://
    source: str
    # run folder to make; it must not exist
    output: str
    # which checkpoint_N.pt; null: the one with the highest N
    checkpoint: int | None = None
    # a policy's vision-language model: its folder or config_model.yaml; null: what the policy's config says
    vlm_source: str | None = None
    # tokenizer (name or folder) to keep with the run; null: the one its config names
    tokenizer: str | None = None
    # processor (name or folder) to keep with the run; null: the one its config names
    processor: str | None = None
    # frames a second that the policy acts at, for a policy; null: not known (the earlier files do not say)
    fps: float | None = None

    def __post_init__(self) -> None:
        if not self.source or not self.output:
            name = "output" if self.source else "source"
            raise ValueError(f"{name} is empty. Name a folder.")
        if self.checkpoint is not None and self.checkpoint < 0:
            raise ValueError(f"checkpoint ({self.checkpoint}) must be 0 or more: it is the N of checkpoint_N.pt.")
        if self.tokenizer is not None and self.processor is not None:
            raise ValueError("tokenizer and processor are both given. A processor has its own tokenizer: give one.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps ({self.fps:g}) must be above 0.")
