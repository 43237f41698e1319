"""Params of `vla-foundry data inspect`."""

from dataclasses import dataclass

from vla_foundry.config.base import BaseParams


@dataclass(frozen=True, kw_only=True)
class InspectParams(BaseParams):
    """Draw a sample of a dataset, or of what a run trains on, just as the training pipeline makes it."""

    # folder of shards, or their manifest, local or s3://: all that it holds is drawn, in the order of the manifest
    dataset: str | None = None
    # run folder or training config instead: what that run is trained on is drawn, cropped, augmented and in its order
    training: str | None = None
    # which sample, counted from 0
    sample: int = 0
    # PNG to write
    output: str = "sample.png"

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.training is None):
            raise ValueError("Give either a dataset (vla-foundry data inspect FOLDER) or --training RUN.")
        if self.sample < 0:
            raise ValueError(f"sample ({self.sample}) must be at least 0.")
        if not self.output.endswith(".png"):
            raise ValueError(f"output '{self.output}' must be a .png file.")
