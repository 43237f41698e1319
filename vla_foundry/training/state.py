"""The training state: the object that a step updates and a checkpoint stores."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_foundry.models.weights import Base
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.training.distributed import named_parameters, reduce_unsharded_gradients
from vla_foundry.training.optimization.ema import EMA
from vla_foundry.training.optimization.optimizer import (
    create_optimizer,
    gradient_norm,
    set_learning_rate,
    step_optimizer,
)
from vla_foundry.training.optimization.schedules import learning_rates


@dataclass(kw_only=True)
class Counters:
    """Counts on the device, int64 (1,), so that a skipped update needs no host sync."""

    # weight updates; the learning rate follows this, not the step
    updates: Tensor
    # steps whose update was skipped
    skipped: Tensor
    # steps skipped since the last update
    skipped_in_row: Tensor
    # the longest run of skipped steps since the host last read it
    longest_row: Tensor
    # valid targets trained on, over all ranks
    targets: Tensor


@dataclass(kw_only=True)
class TrainState:
    """Weights, optimizer, average and counters of a run. Create it after parallelizing the model."""

    # the unwrapped model; checkpoints use its names
    model: nn.Module
    # what a step calls: the model, or its DDP wrapper
    forward: nn.Module
    # by name without wrapper prefixes; a tied one appears once
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    ema: EMA | None
    # learning rate of each update, (total_steps,), and of the current one, ()
    schedule: Tensor
    lr: Tensor
    counters: Counters
    # the weights that checkpoints leave out, because a run with adapters does not change them; None: there are none
    base: Base | None = None
    # steps done: the global batches consumed, skipped updates included
    step: int = 0


def create_train_state(
    model: nn.Module,
    forward: nn.Module,
    *,
    hparams: HyperParams,
    ema: EMAParams,
    total_steps: int,
    base: Base | None = None,
) -> TrainState:
    """Create the state of a run at step 0.

    Raises:
        ValueError: nothing is trainable, or the schedule does not fit into `total_steps`.
    """
    parameters = named_parameters(model)
    # the optimizer's device; the CPU if FSDP keeps the shards there
    device = next(iter(parameters.values())).device
    # fused AdamW takes a learning rate on a GPU in single precision only
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    lr = torch.zeros((), dtype=dtype, device=device)
    return TrainState(
        model=model,
        forward=forward,
        parameters=parameters,
        optimizer=create_optimizer(model, hparams, lr, parameters),
        ema=EMA(ema, parameters) if ema.enabled else None,
        schedule=torch.as_tensor(learning_rates(hparams, total_steps), dtype=dtype, device=device),
        lr=lr,
        counters=Counters(**{name: _zero(device) for name in Counters.__dataclass_fields__}),
        base=base,
    )


def _zero(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


def update_weights(state: TrainState, loss: Tensor, *, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Collective: call on every rank. Clip the gradients and update weights and average, all on the device.

    A loss or gradient that is not finite skips the update: weights, moments, their step counts, learning rate and
    average stay unchanged, and the skip is counted.

    Args:
        loss: the step's loss, equal on every rank; scalar.
        max_norm: upper bound of the gradient norm; None: no clipping.

    Returns:
        The gradient norm before clipping, and 1.0 if the update was skipped, else 0.0; scalars.
    """
    counters = state.counters
    parameters = [parameter for parameter in state.parameters.values() if parameter.grad is not None]
    reduce_unsharded_gradients(state.forward)
    norm = gradient_norm(parameters)
    skip = 1.0 - (norm.isfinite() & loss.to(norm.device).isfinite()).float()
    position = counters.updates.clamp(max=len(state.schedule) - 1)
    state.lr.copy_(state.schedule.index_select(0, position).reshape(()))
    set_learning_rate(state.optimizer, state.lr)
    step_optimizer(state.optimizer, skip, norm, max_norm)
    if state.ema is not None:
        state.ema.update(counters.updates, skip)
    skipped = skip.long()
    counters.updates += 1 - skipped
    counters.skipped += skipped
    counters.skipped_in_row.add_(1).mul_(skipped)
    counters.longest_row.copy_(torch.maximum(counters.longest_row, counters.skipped_in_row))
    return norm, skip
