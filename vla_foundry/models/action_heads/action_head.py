"""The action head base class, the registry of heads, and the loss reduction they share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vla_foundry.batch import LossOutput
from vla_foundry.models.action_heads.noise import Guidance
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.params.models.action_heads import ActionHeadParams
from vla_foundry.registry import Registry


@dataclass(frozen=True, kw_only=True)
class HeadWidths:
    """Input and output widths of an action head."""

    # width of an action
    action_dim: int
    # width of a step of proprioception; 0: no proprioception
    proprioception_dim: int
    # width of the backbone's tokens
    conditioning_dim: int
    # layers whose states these tokens hold side by side
    num_states: int = 1
    # width of its language model's embeddings; 0: it has none
    token_dim: int = 0


class ActionWindow(NamedTuple):
    """The action window of B samples; see batch.py. At most one of the two masks is True at a step; none at padding."""

    # (B, T, A); sampling reads only observed steps
    actions: Tensor
    # (B, T)
    past_mask: Tensor
    # (B, T)
    future_mask: Tensor
    # (B, A); None: every sample has every dimension
    action_dim_mask: Tensor | None
    # (B, P, D); None if absent
    proprioception: Tensor | None
    # (B, T), False at padding; None: no padding
    step_mask: Tensor | None
    # only for heads that can be guided, and only while sampling
    guidance: Guidance | None = None
    # int64 (B, K), the actions as tokens, IGNORE_INDEX after each row's last; only for heads that write them
    tokens: Tensor | None = None

    def free_mask(self) -> Bool[Tensor, "B T A"]:
        """Return a mask that is True at action values to predict."""
        free = self.future_mask[..., None]
        if self.action_dim_mask is None:
            return free.expand_as(self.actions)
        return free & self.action_dim_mask[:, None]

    def held_actions(self) -> Float[Tensor, "B T A"]:
        """Return the observed actions, 0 elsewhere."""
        return torch.where(self.past_mask[..., None], self.actions, 0.0)


class DrawKey(NamedTuple):
    """The key that determines a batch's random draws."""

    # int64 (B,), each sample's position in the plan, or its seed
    samples: Tensor
    # the run's seed
    seed: int
    # different stages draw independently
    stage: str


class ActionHead(nn.Module):
    """Predicts a chunk of actions: `forward` returns a LossOutput, `sample` returns actions."""

    @property
    def can_be_guided(self) -> bool:
        """True if `sample` follows the window's guidance."""
        return False

    def forward(self, conditioning: Conditioning, window: ActionWindow, key: DrawKey) -> LossOutput:
        """Return the loss summed over the action values to predict, and their count."""
        raise NotImplementedError

    def sample(
        self, conditioning: Conditioning, window: ActionWindow, key: DrawKey, num_steps: int | None
    ) -> Float[Tensor, "B T A"]:
        """Return actions: observed steps unchanged, the others predicted; 0 in padding and in missing dimensions."""
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


# register a class or factory `(params, widths) -> head with initial weights` as the action head of this name
register_action_head = ACTION_HEADS.register


def create_action_head(params: ActionHeadParams, widths: HeadWidths) -> ActionHead:
    """Build the head that `params` describe."""
    return ACTION_HEADS.get(params.type)(params, widths)


def reduce_loss(errors: Float[Tensor, "N T A"], window: ActionWindow, num_draws: int = 1) -> LossOutput:
    """Sum the errors over the action values to predict, averaged over a sample's draws.

    Returns:
        LossOutput whose count is the number of valid action values (predicted steps x existing dimensions).
    """
    free = window.free_mask()
    errors = errors.unflatten(0, (-1, num_draws))
    # use where instead of a product: invalid entries may hold anything, even NaN
    total = torch.where(free[:, None], errors, 0.0).sum() / num_draws
    return LossOutput(sum=total, count=free.sum(), logs={})
