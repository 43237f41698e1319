"""Params of `vla-foundry stats`."""

from dataclasses import dataclass, field

from vla_foundry.config.base import BaseParams


@dataclass(frozen=True, kw_only=True)
class StatsParams(BaseParams):
    """Compute the statistics of a robotics dataset from its shards, or merge those of several datasets."""

    # dataset; the statistics are written to its stats.json, local or s3://
    folder: str
    # datasets, or stats.json files, whose statistics are merged: nothing is read from the shards of `folder`
    merge: list[str] = field(default_factory=list)
    # steps before the anchor; null: as the dataset was preprocessed
    past_lowdim_steps: int | None = None
    # steps after the anchor; null: as the dataset was preprocessed
    future_lowdim_steps: int | None = None
    # file to write instead, for --data.dataset_statistics
    output: str | None = None
    # merge although datasets say different things about a field, or have different rates
    accept_contradictions: bool = False
    # replace statistics that are there
    overwrite: bool = False
    # tasks at a time; null: one per core; 0: no Ray, one task after another in this process
    num_workers: int | None = None
    # Ray cluster to run on ("auto", host:port); null: this machine
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for name in ("past_lowdim_steps", "future_lowdim_steps", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} ({value}) must be at least 0.")
        if not self.folder or self.output == "":
            raise ValueError("folder and output must not be empty.")
        if self.merge and (self.past_lowdim_steps is not None or self.future_lowdim_steps is not None):
            raise ValueError("merge takes statistics as they are. Leave past_lowdim_steps and future_lowdim_steps out.")
