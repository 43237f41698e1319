"""Muon for matrices between features, and AdamW for all else (Jordan et al. 2024; Liu et al. 2025)."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vla_foundry.training.distributed import gather, local_shard, shard_like

# coefficients of the quintic Newton-Schulz iteration by Jordan et al.; singular values end between about 0.7 and 1.2
_A, _B, _C, _NUM_ITERATIONS = 3.4445, -4.7750, 2.0315, 5
# inside one block of several: embeddings, stems and output heads are not numbered
_IN_BLOCK = re.compile(r"\.\d+\.")


def is_for_muon(name: str, parameter: nn.Parameter) -> bool:
    """Return whether Muon updates a weight that decays: a matrix in a block, or experts' matrices in a stack."""
    is_stack = parameter.ndim == 3 and "expert" in name.lower()
    return (parameter.ndim == 2 or is_stack) and _IN_BLOCK.search(name) is not None


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but matrices in groups with `is_muon` move along their orthogonalized momentum.

    Updates have the root mean square of AdamW's, 0.2 (Liu et al. 2025), so learning rate and weight decay mean the
    same. Such a group has `momentum`, and `dtype`: what the momentum is orthogonalized in. The state's `exp_avg` holds
    the momentum.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Collective: call on every rank. Update all weights from gradients divided by `grad_scale`, if there is one.

        Update none if the scalar `found_inf` is 1.
        """
        assert closure is None
        keep = 1.0 - self.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"]:
                if group["is_muon"] and parameter.grad is not None:
                    self._move(parameter, group, keep)
        self.param_groups = [group for group in groups if not group["is_muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _move(self, parameter: nn.Parameter, group: Mapping[str, Any], keep: Tensor) -> None:
        if parameter not in self.state:
            step = torch.zeros((), dtype=torch.float32, device=keep.device)
            self.state[parameter] = {"step": step, "exp_avg": torch.zeros_like(parameter)}
        state, momentum = self.state[parameter], group["momentum"]
        assert parameter.grad is not None
        # a gradient whose update is skipped may not be finite
        gradient = torch.where(keep > 0, local_shard(parameter.grad), 0.0)
        scale: Tensor | None = self.grad_scale  # pyright: ignore[reportAttributeAccessIssue]
        if scale is not None:
            gradient = gradient / torch.where(keep > 0, scale, 1.0)
        average = local_shard(state["exp_avg"])
        average.mul_(torch.where(keep > 0, momentum, 1.0)).add_(gradient)
        state["step"] += keep
        direction = gather(shard_like(gradient.add(average, alpha=momentum), parameter))  # Nesterov
        update = orthogonalize(direction.to(group["dtype"])) * (0.2 * max(parameter.shape[-2:]) ** 0.5)
        if isinstance(parameter, DTensor):
            update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
        weight, rate = local_shard(parameter), group["lr"] * keep
        weight.mul_(1.0 - rate * group["weight_decay"]).sub_(local_shard(update).to(weight.dtype) * rate)


def orthogonalize(matrices: Float[Tensor, "... M N"]) -> Float[Tensor, "... M N"]:
    """Return each matrix with its singular values moved close to 1 by Newton-Schulz iterations (Jordan et al. 2024)."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if is_tall else x
