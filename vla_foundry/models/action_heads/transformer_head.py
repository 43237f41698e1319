"""What the heads that are transformers share: the maps into and out of the decoder, and its context."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vla_foundry.models.action_heads.base import ActionHead, HeadWidths
from vla_foundry.models.action_heads.decoder import ActionDecoder, Reading, Tokens
from vla_foundry.params.models.action_heads import TransformerHeadParams

# of sines, up to 2 pi
_LONGEST_PERIOD = 1e4


class Part(NamedTuple):
    """Tokens that stand next to each other."""

    # (B, S, D)
    values: Tensor
    # bool (B, S); None: all may be seen
    mask: Tensor | None = None


class TransformerHead(ActionHead):
    """Names of modules are those of published heads."""

    def __init__(
        self, params: TransformerHeadParams, widths: HeadWidths, *, reading: Reading, is_modulated: bool
    ) -> None:
        super().__init__()
        dim = params.transformer.hidden_dim
        self.condition_encode = nn.Linear(widths.conditioning_dim, dim)
        self.proprioception_encode = None
        if widths.proprioception_dim:
            self.proprioception_encode = nn.Linear(widths.proprioception_dim, dim)
        self.action_encode = nn.Linear(widths.action_dim, dim)
        # published heads, which are joint, tell steps apart by rotary positions alone; that is little where attention
        # has no positions (cross) or steps begin alike (regression)
        self.step_encode = None if reading == "joint" else nn.Linear(dim, dim)
        self.transformer = ActionDecoder(
            params.transformer, reading=reading, is_modulated=is_modulated, final_norm=params.final_norm
        )
        self.output_layer = nn.Linear(dim, widths.action_dim)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.action_encode.weight.dtype

    def encode_proprioception(self, proprioception: Float[Tensor, "B P D"] | None) -> Float[Tensor, "B P D2"] | None:
        """Return a token a step, if the head has any.

        Raises:
            ValueError: the head reads proprioception and there is none.
        """
        if self.proprioception_encode is None:
            return None
        if proprioception is None:
            raise ValueError(
                "The policy reads proprioception (model.proprioception_dim), but the batch has none. "
                "Give the data proprioception_fields."
            )
        return self.proprioception_encode(proprioception.to(self.dtype))

    def encode_steps(self, actions: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        """Add to each step's token which step it is."""
        if self.step_encode is None:
            return actions
        steps = torch.arange(actions.shape[1], device=actions.device)
        return actions + self.step_encode(encode_sines(steps, actions.shape[2]).to(self.dtype))

    def blocks(self) -> list[nn.Module]:
        """The blocks of the decoder."""
        return list(self.transformer.layers)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights: those of the decoder, and Xavier's uniform for the maps into and out of it."""
        self.transformer.init_weights()
        maps = [self.condition_encode, self.proprioception_encode, self.action_encode]
        maps += [self.step_encode, self.output_layer]
        for module in (module for module in maps if module is not None):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def encode_sines(places: Tensor, width: int) -> Float[Tensor, "N {width}"]:
    """Sines and then cosines of places, at frequencies from 1 down to 1/10000 (Vaswani et al. 2017), fp32."""
    half = width // 2
    steps = torch.arange(half, device=places.device, dtype=torch.float32)
    angles = places.float()[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) / max(1, half - 1) * steps)
    return F.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, width - 2 * half))


def join_parts(parts: Sequence[Part]) -> Tokens:
    """Put parts behind each other.

    Positions count what may be seen, so that they do not depend on how far a batch is padded.
    """
    values = torch.cat([part.values for part in parts], dim=1)
    if all(part.mask is None for part in parts):
        return Tokens(values, None, torch.arange(values.shape[1], device=values.device)[None])
    mask = torch.cat([_mask(part) for part in parts], dim=1)
    return Tokens(values, mask, (mask.cumsum(1) - 1).clamp(min=0))


def append_steps(front: Tokens, steps: Tokens) -> Tokens:
    """Put a window's steps behind the tokens in front of them."""
    values = torch.cat((front.values, steps.values), dim=1)
    rows = (values.shape[0], -1)
    mask = None
    if front.mask is not None or steps.mask is not None:
        mask = torch.cat([_mask(Part(tokens.values, tokens.mask)) for tokens in (front, steps)], dim=1)
    return Tokens(values, mask, torch.cat((front.positions.expand(rows), steps.positions.expand(rows)), dim=1))


def place_steps(values: Float[Tensor, "N T D"], mask: Bool[Tensor, "N T"] | None, front: Tokens | None) -> Tokens:
    """The tokens of a window's steps behind `front`: a step has its place whether or not others are padding."""
    start = 0
    if front is not None:
        count = _count(front)
        start = count if count.shape[0] == 1 else count.repeat_interleave(values.shape[0] // count.shape[0], dim=0)
    return Tokens(values, mask, start + torch.arange(values.shape[1], device=values.device)[None])


def _count(tokens: Tokens) -> Tensor:
    """Tokens that may be seen, (B or 1, 1)."""
    if tokens.mask is not None:
        return tokens.mask.sum(1, keepdim=True)
    return torch.full((1, 1), tokens.values.shape[1], device=tokens.values.device)


def _mask(part: Part) -> Tensor:
    if part.mask is not None:
        return part.mask
    return torch.ones(part.values.shape[:2], dtype=torch.bool, device=part.values.device)
