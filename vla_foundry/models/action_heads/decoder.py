"""The transformer of action heads: tokens of actions that read conditioning.

Conditioning comes in one of three ways:

  joint   it stands among the tokens, in front of the actions; there is no context
  prefix  context tokens in front, which see each other but not the actions: their keys and values can be kept
  cross   context tokens that each block reads by cross-attention after its own attention: likewise

A block is that of the native transformer, with its names. Told the time by its norms (Peebles and Xie 2023), each of
its branches y becomes gate * y(norm(x) * (1 + scale) + shift), all three zero at first; context is not told the time.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vla_foundry.models.layers.attention import attend_cached
from vla_foundry.models.layers.block import Attention, init_block, init_normal
from vla_foundry.models.layers.feed_forward import create_feed_forward
from vla_foundry.models.layers.norms import RMSNorm, create_norm
from vla_foundry.models.layers.rotary import RotaryTables, Rotation, rotate
from vla_foundry.params.models.transformer import TransformerParams

Reading = Literal["joint", "prefix", "cross"]


class Tokens(NamedTuple):
    """Rows of tokens."""

    # (B, S, D)
    values: Tensor
    # bool (B, S), True where a token may be seen; None: everywhere
    mask: Tensor | None
    # int64 (B or 1, S)
    positions: Tensor


class Memory(NamedTuple):
    """The keys and values of context in one block, (B, C, G, K)."""

    keys: Tensor
    values: Tensor


class Plan(NamedTuple):
    """What is the same in all blocks."""

    # of the tokens, and of the context
    rotation: Rotation | None
    context_rotation: Rotation | None
    # bool, True where a token may look, of (tokens' own and prefix), cross-attention, context to itself; None: anywhere
    mask: Tensor | None
    cross_mask: Tensor | None
    context_mask: Tensor | None
    # draws of each row of context
    num_draws: int


class CrossAttention(nn.Module):
    """Attention of tokens to context; no positions."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.head_dim = params.head_dim or params.hidden_dim // params.n_heads
        kv_width = (params.n_kv_heads or params.n_heads) * self.head_dim
        self.q_proj = nn.Linear(params.hidden_dim, params.n_heads * self.head_dim, bias=False)
        self.kv_proj = nn.Linear(params.hidden_dim, 2 * kv_width, bias=False)
        self.out_proj = nn.Linear(params.n_heads * self.head_dim, params.hidden_dim, bias=False)

    def remember(self, context: Float[Tensor, "B C D"]) -> Memory:
        """The keys and values of context."""
        keys, values = self.kv_proj(context).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        return Memory(keys, values)

    def forward(self, x: Float[Tensor, "N S D"], memory: Memory, plan: Plan) -> Float[Tensor, "N S D"]:
        """Attend; the draws of a sample share its memory."""
        queries = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        # (B R, S, ...) as (B, R S, ...): nothing of the memory is copied
        queries = queries.unflatten(0, (-1, plan.num_draws)).flatten(1, 2)
        output = attend_cached(queries, memory.keys, memory.values, plan.cross_mask).flatten(2)
        return self.out_proj(output.unflatten(1, (plan.num_draws, -1)).flatten(0, 1))


class DecoderBlock(nn.Module):
    """Attention, perhaps cross-attention, and feed-forward."""

    def __init__(self, params: TransformerParams, *, reading: Reading, is_modulated: bool) -> None:
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
        self.modulation = nn.Linear(dim, 6 * dim) if is_modulated else None

    def forward(
        self,
        x: Float[Tensor, "N S D"] | None,
        time: Float[Tensor, "N D"] | None,
        context: Float[Tensor, "B C D"] | None,
        memory: Memory | None,
        plan: Plan,
        *,
        num_outputs: int | None = None,
        is_last: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Memory | None]:
        """Return the tokens, the context and its memory after this block; `memory` given, context is not needed."""
        if memory is None and context is not None:
            memory, context = self._read(context, plan, is_last)
        if x is None:
            return None, context, memory
        shifts: tuple[Tensor, ...] = ()
        if self.modulation is not None:
            assert time is not None
            shifts = self.modulation(F.silu(time)).unsqueeze(1).chunk(6, dim=-1)  # (N, 1, D) each
        h = _modulate(self.attention_norm(x), shifts[:2])
        added = self._attend(h, memory if self.reading == "prefix" else None, plan, num_outputs)
        x = x if num_outputs is None else x[:, -num_outputs:]
        x = x + (added * shifts[2] if shifts else added)
        if self.cross_attention is not None and self.cross_norm is not None:
            assert memory is not None
            x = x + self.cross_attention(self.cross_norm(x), memory, plan)
        added = self.feed_forward(_modulate(self.ffn_norm(x), shifts[3:5]))
        return x + (added * shifts[5] if shifts else added), context, memory

    def _read(self, context: Tensor, plan: Plan, is_last: bool) -> tuple[Memory, Tensor]:
        if self.cross_attention is not None:
            return self.cross_attention.remember(context), context
        queries, keys, values = self._project(self.attention_norm(context), plan.context_rotation, None)
        memory = Memory(keys, values)
        if not is_last:
            output = attend_cached(queries, keys, values, plan.context_mask)
            context = context + self.attention.out_proj(output.flatten(2))
            context = context + self.feed_forward(self.ffn_norm(context))
        return memory, context

    def _attend(self, h: Tensor, memory: Memory | None, plan: Plan, num_outputs: int | None) -> Tensor:
        queries, keys, values = self._project(h, plan.rotation, num_outputs)
        mask = plan.mask
        if memory is not None:
            keys, values = (
                torch.cat((_repeat(old, plan.num_draws), new), dim=1)
                for old, new in zip(memory, (keys, values), strict=True)
            )
        if mask is not None and num_outputs is not None and mask.shape[2] > 1:
            mask = mask[:, :, -num_outputs:]
        return self.attention.out_proj(attend_cached(queries, keys, values, mask).flatten(2))

    def _project(self, h: Tensor, rotation: Rotation | None, num_queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the last `num_queries` tokens, and keys and values of all."""
        attention = self.attention
        if num_queries is None:
            queries, keys, values = attention.in_proj(h).split(attention.widths, dim=-1)
        else:
            weights = attention.in_proj.weight.split([attention.widths[0], 2 * attention.widths[1]])
            queries = F.linear(h[:, -num_queries:], weights[0])
            keys, values = F.linear(h, weights[1]).chunk(2, dim=-1)
        if attention.q_norm is not None and attention.k_norm is not None:
            queries, keys = attention.q_norm(queries).to(values.dtype), attention.k_norm(keys).to(values.dtype)
        queries, keys, values = (t.unflatten(-1, (-1, attention.head_dim)) for t in (queries, keys, values))
        if rotation is not None:
            last = rotation
            if num_queries is not None:
                last = rotation._replace(cos=rotation.cos[:, -num_queries:], sin=rotation.sin[:, -num_queries:])
            queries, keys = rotate(queries, last), rotate(keys, rotation)
        return queries, keys, values


class ActionDecoder(nn.Module):
    """The blocks of a head. Parameters are those of published heads, where these have them."""

    def __init__(self, params: TransformerParams, *, reading: Reading, is_modulated: bool, final_norm: bool) -> None:
        super().__init__()
        self.params = params
        self.reading: Reading = reading
        self.layers = nn.ModuleList(
            DecoderBlock(params, reading=reading, is_modulated=is_modulated) for _ in range(params.n_layers)
        )
        self.norm = create_norm(params.norm_type, params.hidden_dim, params.norm_eps) if final_norm else None
        self.rotary = None
        if params.positional_embedding_type != "none":
            self.rotary = RotaryTables(
                params.head_dim or params.hidden_dim // params.n_heads,
                max_seq_len=params.max_seq_len,
                theta=params.rope_theta,
                bf16_frequencies=params.rope_bf16_frequencies,
                rotate_in_float32=params.positional_embedding_type == "rotary_float32",
            )

    def forward(
        self,
        tokens: Tokens,
        context: Tokens | None,
        *,
        time: Float[Tensor, "N D"] | None = None,
        memories: list[Memory] | None = None,
        num_outputs: int | None = None,
    ) -> Float[Tensor, "N S D"]:
        """Return what becomes of the tokens.

        Args:
            tokens: N = B x R rows, the R draws of a sample next to each other.
            context: B rows; None: joint.
            time: encoded, where the norms are told it.
            memories: what `remember` made of the context; its values are not looked at then.
            num_outputs: of the last so many tokens only.
        """
        plan = self._plan(tokens, context)
        x: Tensor | None = tokens.values
        values = None if context is None or memories is not None else context.values
        for i, block in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            memory = None if memories is None else memories[i]
            outputs = num_outputs if is_last else None
            x, values, _ = block(x, time, values, memory, plan, num_outputs=outputs, is_last=is_last)
        assert x is not None
        return x if self.norm is None else self.norm(x)

    def remember(self, context: Tokens) -> list[Memory]:
        """Return the keys and values of context in each block, for several calls with the same one."""
        plan = self._plan(None, context)
        values: Tensor = context.values
        memories = []
        for i, block in enumerate(self.layers):
            _, values, memory = block(None, None, values, None, plan, is_last=i == len(self.layers) - 1)
            memories.append(memory)
        return memories

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights as the native transformer does; what tells the time starts at zero."""
        dim = self.params.hidden_dim
        layers: Any = self.layers
        for i, block in enumerate(layers):
            init_block(block, i, dim)
            if block.cross_attention is not None:
                init_normal(block.cross_attention.q_proj.weight, dim**-0.5)
                init_normal(block.cross_attention.kv_proj.weight, dim**-0.5)
                init_normal(block.cross_attention.out_proj.weight, dim**-0.5 / (2 * (i + 1)) ** 0.5)
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)
                nn.init.zeros_(block.modulation.bias)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | RMSNorm):
                module.reset_parameters()

    def _plan(self, tokens: Tokens | None, context: Tokens | None) -> Plan:
        is_causal = self.params.is_causal
        num_draws, mask, cross_mask, context_mask, rotation, context_rotation = 1, None, None, None, None, None
        if context is not None:
            if self.reading == "prefix":
                context_mask = _join_masks(context.mask, context, 0, is_causal)
                context_rotation = self._rotate(context.positions)
            elif context.mask is not None:
                cross_mask = context.mask[:, None, None]
        if tokens is not None:
            rotation = self._rotate(tokens.positions)
            seen, num_context = tokens.mask, 0
            if context is not None:
                num_draws = tokens.values.shape[0] // context.values.shape[0]
            if context is not None and self.reading == "prefix":
                num_context = context.values.shape[1]
                seen = _append_mask(context, tokens, num_draws)
            mask = _join_masks(seen, tokens, num_context, is_causal)
        return Plan(rotation, context_rotation, mask, cross_mask, context_mask, num_draws)

    def _rotate(self, positions: Int[Tensor, "B S"]) -> Rotation | None:
        if self.rotary is None:
            return None
        if positions.shape[1] > self.params.max_seq_len:
            raise ValueError(
                f"An action head of {positions.shape[1]} tokens is longer than model.action_head.transformer."
                f"max_seq_len ({self.params.max_seq_len}). Raise it."
            )
        return self.rotary(positions)


def _modulate(x: Tensor, shifts: tuple[Tensor, ...]) -> Tensor:
    return x * (1 + shifts[1]) + shifts[0] if shifts else x


def _repeat(x: Tensor, num_draws: int) -> Tensor:
    return x if num_draws == 1 else x.repeat_interleave(num_draws, dim=0)


def _append_mask(context: Tokens, tokens: Tokens, num_draws: int) -> Bool[Tensor, "N S"] | None:
    """Which of context and tokens may be seen; None: all."""
    if context.mask is None and tokens.mask is None:
        return None
    masks = []
    for part, draws in ((context, num_draws), (tokens, 1)):
        shape = part.values.shape[:2]
        mask = torch.ones(shape, dtype=torch.bool, device=part.values.device) if part.mask is None else part.mask
        masks.append(_repeat(mask, draws))
    return torch.cat(masks, dim=1)


def _join_masks(seen: Tensor | None, tokens: Tokens, num_context: int, is_causal: bool) -> Tensor | None:
    """(N or 1, 1, S or 1, context + S): what may be seen, and under a causal mask by whom."""
    mask = None if seen is None else seen[:, None, None]
    if not is_causal:
        return mask
    S = tokens.values.shape[1]
    causal = torch.ones(S, num_context + S, dtype=torch.bool, device=tokens.values.device).tril(num_context)
    return causal[None, None] if mask is None else mask & causal
