"""Exponential moving average of the weights, kept on each rank for its own shards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vla_foundry.params.ema import EMAParams
from vla_foundry.training.distributed import local_shard


class EMA:
    """The average of every trainable parameter; a tied one is averaged once.

    Averages are in fp32, or in the parameters' own precision if that is higher. A part that was trained and then
    frozen keeps its last average (`hold`).
    """

    def __init__(self, params: EMAParams, parameters: dict[str, nn.Parameter]) -> None:
        self._params = params
        self._parameters = parameters
        self._trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
        # this rank's shard, by parameter name
        self.averages: dict[str, Tensor] = {name: self.copy_weight(name) for name in self._trainable}

    def copy_weight(self, name: str) -> Tensor:
        """Return a copy of this rank's shard of a parameter, in the precision of averages."""
        parameter = self._parameters[name]
        return local_shard(parameter).to(torch.promote_types(parameter.dtype, torch.float32), copy=True)

    def hold(self, name: str, average: Tensor) -> None:
        """Keep the average of a frozen parameter as it is, if it differs from the weight."""
        if not torch.equal(average, local_shard(self._parameters[name]).to(average.dtype)):
            self.averages[name] = average

    def update(self, num_updates: Tensor, skip: Tensor) -> None:
        """Move the averages towards the weights unless `skip` is 1, without a host sync.

        Args:
            num_updates: number of weight updates before this one; one integer on the weights' device.
            skip: 1.0 if this update was skipped, else 0.0; scalar.
        """
        weight = (1.0 - ema_decay(self._params, num_updates)) * (1.0 - skip)
        weights = {dtype: weight.reshape(()).to(dtype) for dtype in {value.dtype for value in self.averages.values()}}
        averages = [self.averages[name] for name in self._trainable]
        current = [
            local_shard(self._parameters[name]).to(average.dtype)
            for name, average in zip(self._trainable, averages, strict=True)
        ]
        # lerp is exact at both ends: a weight of 0 changes nothing, a weight of 1 copies
        torch._foreach_lerp_(averages, current, [weights[average.dtype] for average in averages])  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replace the weights by the averages, and restore the weights bit for bit afterwards."""
        weights = [local_shard(self._parameters[name]) for name in self.averages]
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, list(self.averages.values()))  # pyright: ignore[reportPrivateImportUsage]
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)  # pyright: ignore[reportPrivateImportUsage]


def ema_decay(params: EMAParams, num_updates: Tensor) -> Tensor:
    """Return the decay of the update that follows `num_updates` others.

    Vanilla: `alpha`, but 0 (copy) in the first update and until `update_after_step`. Otherwise, with
    s = num_updates - update_after_step - 1: 0 (copy) while s <= 0, then 1 - (1 + s / inv_gamma)^-power, clamped.
    """
    if params.type == "vanilla":
        alpha = torch.full_like(num_updates, params.alpha, dtype=torch.float64)
        return torch.where(num_updates > params.update_after_step, alpha, torch.zeros_like(alpha))
    steps = (num_updates - params.update_after_step - 1).clamp(min=0).to(torch.float64)
    decay = (1.0 - (1.0 + steps / params.inv_gamma) ** -params.power).clamp(params.min_value, params.max_value)
    return torch.where(steps > 0, decay, torch.zeros_like(decay))
