"""The budget of a run in steps: pure arithmetic on resolved params."""

from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.hparams import HyperParams


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


def count_steps(value: float, total_steps: int) -> int:
    """Return the number of steps that `hparams.warmup` or `hparams.decay` means: below 1 it is a fraction."""
    return int(value * total_steps) if value < 1 else int(value)


def count_decay_steps(params: HyperParams, total_steps: int) -> int:
    """Return over how many steps at the end of the run the learning rate falls.

    Raises:
        ValueError: warm-up and decay do not fit into the run.
    """
    warmup_steps = count_steps(params.warmup, total_steps)
    if warmup_steps > total_steps:
        raise ValueError(
            f"hparams.warmup ({params.warmup:g}) is {warmup_steps} steps, more than the run's {total_steps}. "
            f"Use fewer steps, or a fraction of the run such as --hparams.warmup 0.05."
        )
    if params.lr_scheduler == "constant":
        return 0
    if params.lr_scheduler != "warmup_constant_decay":
        return total_steps - warmup_steps
    decay_steps = count_steps(params.decay, total_steps)
    if warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"hparams.warmup ({warmup_steps} steps) and hparams.decay ({decay_steps} steps) must fit into the run's "
            f"{total_steps} steps. Lower one of them."
        )
    return decay_steps
