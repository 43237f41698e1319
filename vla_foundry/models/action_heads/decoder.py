"""The transformer inside action heads: action tokens attend to the conditioning.

The blocks read conditioning in one of four ways:

  joint   conditioning tokens come before the action tokens in one sequence; there is no separate context
  prefix  context tokens come first and see each other but not the actions, so their keys and values can be cached
  cross   each block reads context tokens by cross-attention after its self-attention; they can be cached too
  layers  the context is the hidden states of the backbone's last N layers at all tokens; each block's self-attention
          also attends to keys and values of the layer at the same height, with projections of its own; cached likewise
          (after the joint attention of pi0, Black et al. 2024, whose head uses the backbone's projections)

Blocks and their names are those of the native transformer. With adaLN-Zero (Peebles and Xie 2023) each branch y becomes
gate * y(norm(x) * (1 + scale) + shift), where gate, scale and shift start at zero; the context is not conditioned on
time.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vla_foundry.models.attention import attend_cached
from vla_foundry.models.layers import (
    Attention,
    RMSNorm,
    Rotation,
    create_feed_forward,
    create_norm,
    create_rotary,
    init_block,
    init_normal,
    rotate,
)
from vla_foundry.params.models.transformer import TransformerParams

# longest period of the sines, divided by 2 pi
_LONGEST_PERIOD = 1e4

Reading = Literal["joint", "prefix", "cross", "layers"]
# tokens (B, S, D) and bool (B, S), True where visible; None: all visible
Part = tuple[Tensor, Tensor | None]


class Tokens(NamedTuple):
    """Rows of tokens."""

    # (B, S, D)
    values: Tensor
    # bool (B, S), True where a token is visible; None: all visible
    mask: Tensor | None
    # int64 (B or 1, S)
    positions: Tensor


class KeyValues(NamedTuple):
    """The KV cache of the context in one block, (B, C, G, K)."""

    keys: Tensor
    values: Tensor


class Visibility(NamedTuple):
    """Positions and masks, shared by all blocks; a mask is True where a token may look, None: everywhere."""

    rotation: Rotation | None
    context_rotation: Rotation | None
    # from the tokens to a prefix and themselves
    mask: Tensor | None
    # from the tokens to the context, by cross-attention
    cross_mask: Tensor | None
    # from the context to itself
    context_mask: Tensor | None
    # rows of tokens per row of context
    num_draws: int


class CrossAttention(nn.Module):
    """Cross-attention from tokens to context, without positions."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.head_dim = params.head_dim or params.hidden_dim // params.n_heads
        kv_width = (params.n_kv_heads or params.n_heads) * self.head_dim
        self.q_proj = nn.Linear(params.hidden_dim, params.n_heads * self.head_dim, bias=False)
        self.kv_proj = nn.Linear(params.hidden_dim, 2 * kv_width, bias=False)
        self.out_proj = nn.Linear(params.n_heads * self.head_dim, params.hidden_dim, bias=False)

    def project_context(self, context: Float[Tensor, "B C D"]) -> KeyValues:
        """Return the keys and values of the context."""
        keys, values = self.kv_proj(context).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        return KeyValues(keys, values)

    def forward(self, x: Float[Tensor, "N S D"], cache: KeyValues, visibility: Visibility) -> Float[Tensor, "N S D"]:
        """Attend to the context; all draws of a sample share it."""
        queries = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        # view (B R, S, ...) as (B, R S, ...), so that the context is not copied
        queries = queries.unflatten(0, (-1, visibility.num_draws)).flatten(1, 2)
        output = attend_cached(queries, cache.keys, cache.values, visibility.cross_mask).flatten(2)
        return self.out_proj(output.unflatten(1, (visibility.num_draws, -1)).flatten(0, 1))


class LayerKeys(nn.Module):
    """Keys and values of one of the backbone's layers, for self-attention."""

    def __init__(self, params: TransformerParams, layer_dim: int) -> None:
        super().__init__()
        self.head_dim = params.head_dim or params.hidden_dim // params.n_heads
        width = (params.n_kv_heads or params.n_heads) * self.head_dim
        self.norm = create_norm(params.norm_type, layer_dim, params.norm_eps)
        self.proj = nn.Linear(layer_dim, 2 * width, bias=False)

    def forward(self, state: Float[Tensor, "B C D"], rotation: Rotation | None) -> KeyValues:
        """Project a layer's hidden states."""
        keys, values = (
            self.proj(self.norm(state.to(self.proj.weight.dtype))).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        )
        return KeyValues(keys if rotation is None else rotate(keys, rotation), values)


class DecoderBlock(nn.Module):
    """Self-attention, optional cross-attention, and feed-forward."""

    def __init__(self, params: TransformerParams, *, reading: Reading, is_modulated: bool, layer_dim: int) -> None:
        super().__init__()
        dim = params.hidden_dim
        self.reading: Reading = reading
        self.attention = Attention(params)
        self.feed_forward = create_feed_forward(params.ffn_type, dim)
        self.attention_norm = create_norm(params.norm_type, dim, params.norm_eps)
        self.ffn_norm = create_norm(params.norm_type, dim, params.norm_eps)
        self.cross_norm = self.cross_attention = None
        if reading == "cross":
            self.cross_norm = create_norm(params.norm_type, dim, params.norm_eps)
            self.cross_attention = CrossAttention(params)
        self.layer_keys = LayerKeys(params, layer_dim) if reading == "layers" else None
        # adaLN-Zero
        self.modulation = nn.Linear(dim, 6 * dim) if is_modulated else None

    def forward(
        self,
        x: Float[Tensor, "N S D"] | None,
        time: Float[Tensor, "N D"] | None,
        context: Float[Tensor, "B C E"] | None,
        cache: KeyValues | None,
        visibility: Visibility,
        *,
        modulation: Float[Tensor, "M D6"] | None = None,
        num_outputs: int | None = None,
        is_last: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, KeyValues | None]:
        """Return the tokens, the context, and the context's keys and values; `cache` replaces the context.

        Without tokens, return the modulation of each time in their place; `modulation` replaces the time.
        """
        if cache is None and context is not None:
            cache, context = self._read_context(context, visibility, is_last)
        if self.modulation is not None and time is not None:
            modulation = self.modulation(F.silu(time))
        if x is None:
            return modulation, context, cache
        shifts: tuple[Tensor, ...] = ()
        if modulation is not None:
            shifts = modulation.unsqueeze(1).chunk(6, dim=-1)  # (N, 1, D) each
        h = _modulate(self.attention_norm(x), shifts[:2])
        added = self._attend(h, None if self.reading == "cross" else cache, visibility, num_outputs)
        x = x if num_outputs is None else x[:, -num_outputs:]
        x = x + (added * shifts[2] if shifts else added)
        if self.cross_attention is not None and self.cross_norm is not None:
            assert cache is not None
            x = x + self.cross_attention(self.cross_norm(x), cache, visibility)
        added = self.feed_forward(_modulate(self.ffn_norm(x), shifts[3:5]))
        return x + (added * shifts[5] if shifts else added), context, cache

    def _read_context(self, context: Tensor, visibility: Visibility, is_last: bool) -> tuple[KeyValues, Tensor]:
        if self.cross_attention is not None:
            return self.cross_attention.project_context(context), context
        if self.layer_keys is not None:
            return self.layer_keys(context, visibility.context_rotation), context
        queries, keys, values = self.attention.project(self.attention_norm(context), visibility.context_rotation)
        if not is_last:
            output = attend_cached(queries, keys, values, visibility.context_mask)
            context = context + self.attention.out_proj(output.flatten(2))
            context = context + self.feed_forward(self.ffn_norm(context))
        return KeyValues(keys, values), context

    def _attend(self, h: Tensor, cache: KeyValues | None, visibility: Visibility, num_outputs: int | None) -> Tensor:
        rotation, mask = visibility.rotation, visibility.mask
        if num_outputs is None:
            queries, keys, values = self.attention.project(h, rotation)
        else:
            last = None if rotation is None else rotation.last(num_outputs)
            queries, keys, values = self.attention.project(h, rotation, h[:, -num_outputs:], last)
            if mask is not None and mask.shape[2] > 1:
                mask = mask[:, :, -num_outputs:]
        if cache is not None:
            keys, values = (
                torch.cat((repeat(old, visibility.num_draws), new), dim=1)
                for old, new in zip(cache, (keys, values), strict=True)
            )
        return self.attention.out_proj(attend_cached(queries, keys, values, mask).flatten(2))


class ActionDecoder(nn.Module):
    """The blocks of a head. Parameter names match published heads where these have the parameter."""

    def __init__(
        self,
        params: TransformerParams,
        *,
        reading: Reading,
        is_modulated: bool,
        final_norm: bool,
        layer_dim: int = 0,
    ) -> None:
        super().__init__()
        self.params = params
        self.reading: Reading = reading
        # width of one of the backbone's layers, whose states stand side by side in the context
        self.layer_dim = layer_dim
        self.layers = nn.ModuleList(
            DecoderBlock(params, reading=reading, is_modulated=is_modulated, layer_dim=layer_dim)
            for _ in range(params.n_layers)
        )
        self.norm = create_norm(params.norm_type, params.hidden_dim, params.norm_eps) if final_norm else None
        self.rotary = create_rotary(params)

    def forward(
        self,
        tokens: Tokens,
        context: Tokens | None,
        *,
        time: Float[Tensor, "N D"] | None = None,
        cache: list[KeyValues] | None = None,
        modulations: Sequence[Float[Tensor, "M D6"]] | None = None,
        num_outputs: int | None = None,
    ) -> Float[Tensor, "N S D"]:
        """Return the tokens after the last block.

        Args:
            tokens: N = B x R rows; the R draws of a sample are adjacent.
            context: B rows; None: joint.
            time: encoded time, for adaLN-Zero.
            cache: result of `cache_context`; the values of `context` are then not read.
            modulations: result of `cache_context`, in place of `time`: one row, or one for each of the tokens.
            num_outputs: return only this many last tokens.
        """
        visibility = self._find_visibility(tokens, context)
        x: Tensor | None = tokens.values
        values = None if context is None or cache is not None else context.values
        for i, block in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            kept = None if cache is None else cache[i]
            outputs = num_outputs if is_last else None
            values = self._select_layer(context, values, i)
            shifts = None if modulations is None else modulations[i]
            x, values, _ = block(
                x, time, values, kept, visibility, modulation=shifts, num_outputs=outputs, is_last=is_last
            )
        assert x is not None
        return x if self.norm is None else self.norm(x)

    def cache_context(
        self, context: Tokens, time: Float[Tensor, "S D"] | None = None
    ) -> tuple[list[KeyValues], list[Tensor] | None]:
        """Return what each block needs of the context and of S encoded times, for reuse across calls.

        Returns:
            The context's keys and values, and the modulations of adaLN-Zero, (S, 6 D).
        """
        visibility = self._find_visibility(None, context)
        values: Tensor = context.values
        cache, modulations = [], []
        for i, block in enumerate(self.layers):
            states = self._select_layer(context, values, i)
            shifts, values, kept = block(None, time, states, None, visibility, is_last=i == len(self.layers) - 1)
            cache.append(kept)
            modulations.append(shifts)
        return cache, None if time is None else modulations

    def _select_layer(self, context: Tokens | None, values: Tensor | None, i: int) -> Tensor | None:
        """Return what block i reads: the context so far, or the states of the backbone's layer at its height."""
        if self.reading != "layers" or values is None or context is None:
            return values
        num_layers = context.values.shape[-1] // self.layer_dim
        layer = i * num_layers // len(self.layers)
        return context.values[..., layer * self.layer_dim : (layer + 1) * self.layer_dim]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise the weights as the native transformer does; adaLN-Zero weights start at zero."""
        dim = self.params.hidden_dim
        layers: Any = self.layers
        for i, block in enumerate(layers):
            init_block(block, i, dim)
            if block.cross_attention is not None:
                init_normal(block.cross_attention.q_proj.weight, dim**-0.5)
                init_normal(block.cross_attention.kv_proj.weight, dim**-0.5)
                init_normal(block.cross_attention.out_proj.weight, dim**-0.5 / (2 * (i + 1)) ** 0.5)
            if block.layer_keys is not None:
                init_normal(block.layer_keys.proj.weight, self.layer_dim**-0.5)
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)
                nn.init.zeros_(block.modulation.bias)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | RMSNorm):
                module.reset_parameters()

    def _find_visibility(self, tokens: Tokens | None, context: Tokens | None) -> Visibility:
        is_causal = self.params.is_causal
        num_draws, mask, cross_mask, context_mask, rotation, context_rotation = 1, None, None, None, None, None
        if context is not None:
            if self.reading != "cross":
                context_mask = _make_causal(context.mask, context, 0, is_causal)
                context_rotation = self._rotate(context.positions)
            elif context.mask is not None:
                cross_mask = context.mask[:, None, None]
        if tokens is not None:
            rotation = self._rotate(tokens.positions)
            seen, num_context = tokens.mask, 0
            if context is not None:
                num_draws = tokens.values.shape[0] // context.values.shape[0]
            if context is not None and self.reading != "cross":
                num_context = context.values.shape[1]
                if context.mask is not None or tokens.mask is not None:
                    seen = torch.cat((repeat(_mask_of(context), num_draws), _mask_of(tokens)), dim=1)
            mask = _make_causal(seen, tokens, num_context, is_causal)
        return Visibility(rotation, context_rotation, mask, cross_mask, context_mask, num_draws)

    def _rotate(self, positions: Int[Tensor, "B S"]) -> Rotation | None:
        if self.rotary is None:
            return None
        if positions.shape[1] > self.params.max_seq_len:
            raise ValueError(
                f"An action head of {positions.shape[1]} tokens is longer than model.action_head.transformer."
                f"max_seq_len ({self.params.max_seq_len}). Raise it."
            )
        return self.rotary(positions)


def join_parts(parts: Sequence[Part]) -> Tokens:
    """Concatenate parts.

    Positions count visible tokens, so they do not depend on how much a batch is padded.
    """
    values = torch.cat([part for part, _ in parts], dim=1)
    positions = torch.arange(values.shape[1], device=values.device)[None]
    if all(mask is None for _, mask in parts):
        return Tokens(values, None, positions)
    mask = torch.cat([_mask_of(Tokens(part, mask, positions)) for part, mask in parts], dim=1)
    return Tokens(values, mask, (mask.cumsum(1) - 1).clamp(min=0))


def place_steps(values: Float[Tensor, "N T D"], mask: Bool[Tensor, "N T"] | None, front: Tokens | None) -> Tokens:
    """Build the tokens of a window's steps, positioned after `front`; positions do not depend on padding."""
    start: Any = 0
    if front is not None and front.mask is None:
        start = front.values.shape[1]
    elif front is not None and front.mask is not None:
        count = front.mask.sum(1, keepdim=True)
        start = count if count.shape[0] == 1 else repeat(count, values.shape[0] // count.shape[0])
    return Tokens(values, mask, start + torch.arange(values.shape[1], device=values.device)[None])


def place_after(tokens: Tokens, context: Tokens) -> Tokens:
    """Return the tokens with positions that follow those of the context."""
    count: Any = context.values.shape[1]
    if context.mask is not None:
        count = repeat(context.mask.sum(1, keepdim=True), tokens.values.shape[0] // context.values.shape[0])
    return tokens._replace(positions=tokens.positions + count)


def append_steps(front: Tokens, steps: Tokens) -> Tokens:
    """Append a window's steps to the tokens before them."""
    values = torch.cat((front.values, steps.values), dim=1)
    rows = (values.shape[0], -1)
    mask = None
    if front.mask is not None or steps.mask is not None:
        mask = torch.cat((_mask_of(front), _mask_of(steps)), dim=1)
    return Tokens(values, mask, torch.cat((front.positions.expand(rows), steps.positions.expand(rows)), dim=1))


def encode_sines(places: Tensor, width: int) -> Float[Tensor, "N {width}"]:
    """Encode places as fp32 sines, then cosines, at frequencies from 1 down to 1/10000 (Vaswani et al. 2017)."""
    half = width // 2
    steps = torch.arange(half, device=places.device, dtype=torch.float32)
    angles = places.float()[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) / max(1, half - 1) * steps)
    return F.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, width - 2 * half))


def init_maps(*maps: nn.Linear | None) -> None:
    """Initialise linear maps: Xavier-uniform weights, zero biases."""
    for module in maps:
        if module is not None:
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def repeat(x: Tensor, num_draws: int) -> Tensor:
    """Repeat each row once per draw."""
    return x if num_draws == 1 else x.repeat_interleave(num_draws, dim=0)


def _modulate(x: Tensor, shifts: tuple[Tensor, ...]) -> Tensor:
    return x * (1 + shifts[1]) + shifts[0] if shifts else x


def _mask_of(tokens: Tokens) -> Tensor:
    if tokens.mask is not None:
        return tokens.mask
    return torch.ones(tokens.values.shape[:2], dtype=torch.bool, device=tokens.values.device)


def _make_causal(seen: Tensor | None, tokens: Tokens, num_context: int, is_causal: bool) -> Tensor | None:
    """Return a mask (N or 1, 1, S or 1, context + S), True where visible; a causal mask depends on the token."""
    mask = None if seen is None else seen[:, None, None]
    if not is_causal:
        return mask
    S = tokens.values.shape[1]
    causal = torch.ones(S, num_context + S, dtype=torch.bool, device=tokens.values.device).tril(num_context)
    return causal[None, None] if mask is None else mask & causal
