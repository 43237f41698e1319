"""What a policy expects of an action head, the registry of heads, and the reduction of every head's loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vla_foundry.batch import LossOutput
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.params.models.action_heads import ActionHeadParams
from vla_foundry.registry import Registry


@dataclass(frozen=True, kw_only=True)
class HeadWidths:
    """The widths of what surrounds a head."""

    # numbers in an action
    action_dim: int
    # numbers in a step of proprioception; 0: there is none
    proprioception_dim: int
    # width of the backbone's tokens
    conditioning_dim: int


class ActionWindow(NamedTuple):
    """The steps of B samples; see batch.py. At most one of the two masks is True at a step; padding has neither."""

    # (B, T, A); sampling reads only what is observed
    actions: Tensor
    # (B, T)
    past_mask: Tensor
    # (B, T)
    future_mask: Tensor
    # (B, A); None: every sample has every dimension
    action_dim_mask: Tensor | None
    # (B, P, D); None: there is none
    proprioception: Tensor | None
    # (B, T), False at padding; None: there is none
    step_mask: Tensor | None

    def free_mask(self) -> Bool[Tensor, "B T A"]:
        """True at the numbers to be predicted."""
        free = self.future_mask[..., None]
        if self.action_dim_mask is None:
            return free.expand_as(self.actions)
        return free & self.action_dim_mask[:, None]

    def held_actions(self) -> Float[Tensor, "B T A"]:
        """The observed actions, and 0 elsewhere."""
        return torch.where(self.past_mask[..., None], self.actions, 0.0)


class DrawKey(NamedTuple):
    """What the draws of a batch are a function of."""

    # int64 (B,), position in the plan, or seed, of each sample
    samples: Tensor
    # of the run
    seed: int
    # draws of different stages are independent
    stage: str


class ActionHead(nn.Module):
    """Predicts a chunk of actions: `forward(conditioning, window, key)` returns a LossOutput, `sample` actions."""

    def forward(self, conditioning: Conditioning, window: ActionWindow, key: DrawKey) -> LossOutput:
        """Return the loss, summed over the numbers to be predicted, and their number."""
        raise NotImplementedError

    def sample(
        self, conditioning: Conditioning, window: ActionWindow, key: DrawKey, num_steps: int | None
    ) -> Float[Tensor, "B T A"]:
        """Return actions: observed ones unchanged, predicted ones, 0 in padding and in dimensions a robot lacks."""
        raise NotImplementedError

    def compile_sampling(self, **options: Any) -> None:
        """Compile what `sample` repeats, with options of torch.compile."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Return the modules that activation checkpointing, compilation and sharding wrap."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Give every parameter its initial value."""
        raise NotImplementedError


ACTION_HEADS: "Registry[Callable[[Any, HeadWidths], ActionHead]]" = Registry(
    "model.action_head.type", package="vla_foundry.models", decorator="register_action_head"
)


def register_action_head(
    name: str,
) -> Callable[[Callable[[Any, HeadWidths], ActionHead]], Callable[[Any, HeadWidths], ActionHead]]:
    """Register a factory `(params, widths) -> head` as the action head called `name`."""
    return ACTION_HEADS.register(name)


def create_action_head(params: ActionHeadParams, widths: HeadWidths) -> ActionHead:
    """Build the head that `params` describe."""
    return ACTION_HEADS.get(params.type)(params, widths)


def reduce_loss(errors: Float[Tensor, "N T A"], window: ActionWindow, num_draws: int = 1) -> LossOutput:
    """Sum the errors of the numbers to be predicted; take the mean over several draws of a sample.

    Returns:
        LossOutput whose count is the number of valid numbers (steps to be predicted x dimensions that exist).
    """
    free = window.free_mask()
    errors = errors.unflatten(0, (-1, num_draws))
    # where, not a product: invalid numbers may be anything
    total = torch.where(free[:, None], errors, 0.0).sum() / num_draws
    return LossOutput(sum=total, count=free.sum(), logs={})
