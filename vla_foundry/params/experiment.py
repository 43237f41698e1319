"""The root of the config tree."""

from dataclasses import dataclass, field
from typing import Literal

import vla_foundry.params.data
import vla_foundry.params.models  # noqa: F401  (both register the types there are)
from vla_foundry.config.base import BaseParams
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.params.models.base import ModelParams


@dataclass(frozen=True, kw_only=True)
class TrainExperimentParams(BaseParams):
    """One training run."""

    # modules to import first: they register your own models, data types and so on
    plugins: list[str] = field(default_factory=list)
    # name of the run and of its folder; null: made from date, model, learning rate and batch size
    name: str | None = None
    # folder that holds run folders
    save_path: str = "experiments"
    # continue: auto = the newest checkpoint of the run with this name, if there is one
    resume: str | None = None
    # s3:// folder that the run folder is copied to after each checkpoint
    remote_sync: str | None = None
    # print the resolved config with the origin of each value, and stop
    resolve_configs: bool = False
    # folder that resolve_configs writes resolved_config.yaml to
    resolve_configs_path: str | None = None
    # log to Weights & Biases; null: if its credentials are there
    wandb: bool | None = None
    # its entity; null: its own default
    wandb_entity: str | None = None
    # its project
    wandb_project_name: str = "vla_foundry"
    # its tags
    wandb_tags: list[str] = field(default_factory=list)
    # write TensorBoard files to the run folder
    tensorboard: bool = False
    # steps between two log lines
    log_every_n_steps: int = 20
    # least severe level that is logged
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    # samples to train on
    total_train_samples: int | None = None
    # the same, in passes over the data
    num_epochs: int | None = None
    # checkpoints to save, evenly over the run
    num_checkpoints: int = 5
    # checkpoints to keep; null: all
    max_checkpoint_limit: int | None = None
    # samples to validate on; null: no validation
    total_val_samples: int | None = None
    # checkpoints between two validations
    val_every_n_checkpoints: int = 1
    data: DataParams
    model: ModelParams
    hparams: HyperParams = field(default_factory=HyperParams)
    distributed: DistributedParams = field(default_factory=DistributedParams)
    ema: EMAParams = field(default_factory=EMAParams)

    def __post_init__(self) -> None:
        for name in (
            "log_every_n_steps",
            "total_train_samples",
            "num_epochs",
            "num_checkpoints",
            "max_checkpoint_limit",
            "total_val_samples",
            "val_every_n_checkpoints",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1.")
        if self.name is not None and (not self.name.strip("./ ") or "/" in self.name):
            raise ValueError(f"name '{self.name}' can not be the name of a folder. Leave out slashes.")


def total_steps(params: TrainExperimentParams) -> int:
    """Optimizer steps of a run; samples that do not fill a global batch are left over.

    Raises:
        ValueError: there is no budget in samples yet.
    """
    if params.total_train_samples is None:
        raise ValueError("total_train_samples is not known. Give --total_train_samples or --num_epochs.")
    return params.total_train_samples // params.hparams.global_batch_size


def accumulation_steps(params: TrainExperimentParams, world_size: int) -> int:
    """Forward passes per optimizer step on each rank.

    Raises:
        ValueError: the global batch can not be divided so; the message holds the nearest sizes that can.
    """
    hparams = params.hparams
    unit = world_size * hparams.per_gpu_batch_size
    if hparams.global_batch_size % unit == 0:
        return hparams.global_batch_size // unit
    below = hparams.global_batch_size // unit * unit
    nearest = f"{below} or {below + unit}" if below else str(unit)
    raise ValueError(
        f"hparams.global_batch_size ({hparams.global_batch_size}) must be a multiple of num_ranks ({world_size}) x "
        f"hparams.per_gpu_batch_size ({hparams.per_gpu_batch_size}) = {unit}. Use {nearest}."
    )


def checkpoint_steps(params: TrainExperimentParams) -> tuple[int, ...]:
    """The steps after which a checkpoint is saved: evenly over the run, the last one at its end."""
    steps = total_steps(params)
    count = min(params.num_checkpoints, steps)
    return tuple(steps * (index + 1) // count for index in range(count))
