"""A block of the native transformer: attention with rotary positions, and a feed-forward."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vla_foundry.models.layers.attention import Segments, attend, attend_cached
from vla_foundry.models.layers.feed_forward import SwiGLU, create_feed_forward
from vla_foundry.models.layers.kv_cache import CacheStep, LayerCache
from vla_foundry.models.layers.norms import create_norm
from vla_foundry.models.layers.rotary import Rotation, rotate
from vla_foundry.params.models.transformer import TransformerParams


class Attention(nn.Module):
    """Multi-head attention; n_kv_heads < n_heads is grouped-query attention."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.head_dim = params.head_dim or params.hidden_dim // params.n_heads
        self.num_heads = params.n_heads
        self.num_kv_heads = params.n_kv_heads or params.n_heads
        self.widths = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        self.in_proj = nn.Linear(params.hidden_dim, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(self.widths[0], params.hidden_dim, bias=False)
        if params.qk_norm:
            self.q_norm = create_norm(params.norm_type, self.widths[0], params.norm_eps)
            self.k_norm = create_norm(params.norm_type, self.widths[1], params.norm_eps)
        else:
            self.q_norm = self.k_norm = None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Rotation | None,
        segments: Segments | None,
        is_causal: bool,
        cache: LayerCache | None,
        cache_step: CacheStep | None,
        at: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Attend within segments, or to the cache where `cache_step` says so; `at`: see Block."""
        if at is not None:
            return self._attend_at(x, rotation, at)
        queries, keys, values = self.in_proj(x).split(self.widths, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            # over all heads at once; an fp32 norm under autocast must not change the dtype of attention
            queries, keys = self.q_norm(queries).to(values.dtype), self.k_norm(keys).to(values.dtype)
        queries, keys, values = (t.unflatten(-1, (-1, self.head_dim)) for t in (queries, keys, values))  # (B, T, H, K)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if cache is not None:
            keys, values = cache.write(keys, values, cache_step)
        if cache_step is not None:
            output = attend_cached(queries, keys, values, cache_step.mask)
        else:
            output = attend(queries, keys, values, segments=segments, is_causal=is_causal)
        return self.out_proj(output.flatten(2))  # (B, T, D)

    def _attend_at(self, x: Tensor, rotation: Rotation | None, at: Tensor) -> Tensor:
        """What the token `at` a place of each row gets of those up to it, (B, 1, D)."""
        weights = self.in_proj.weight.split([self.widths[0], 2 * self.widths[1]])
        queries = F.linear(take_token(x, at), weights[0])
        keys, values = F.linear(x, weights[1]).chunk(2, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries).to(values.dtype), self.k_norm(keys).to(values.dtype)
        queries, keys, values = (t.unflatten(-1, (-1, self.head_dim)) for t in (queries, keys, values))
        if rotation is not None:
            keys = rotate(keys, rotation)
            # (T, 1, K/2) for all rows, or (B, T, 1, K/2)
            tables = (rotation.cos, rotation.sin)
            cos, sin = (t[at, None] if t.ndim == 3 else t[torch.arange(len(at)), at, None] for t in tables)
            queries = rotate(queries, Rotation(cos, sin, rotation.in_float32))
        is_seen = torch.arange(x.shape[1], device=x.device) <= at[:, None]
        return self.out_proj(attend_cached(queries, keys, values, is_seen[:, None, None]).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to what came in."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.attention = Attention(params)
        self.feed_forward = create_feed_forward(params.ffn_type, params.hidden_dim)
        self.attention_norm = create_norm(params.norm_type, params.hidden_dim, params.norm_eps)
        self.ffn_norm = create_norm(params.norm_type, params.hidden_dim, params.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Rotation | None = None,
        segments: Segments | None = None,
        is_causal: bool = True,
        cache: LayerCache | None = None,
        cache_step: CacheStep | None = None,
        at: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Return x with what this block adds.

        Args:
            at: compute only the token at this place of each row, which sees those up to it (S is 1, else T).
        """
        added = self.attention(self.attention_norm(x), rotation, segments, is_causal, cache, cache_step, at)
        x = (x if at is None else take_token(x, at)) + added
        return x + self.feed_forward(self.ffn_norm(x))


def take_token(x: Float[Tensor, "B T D"], at: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
    """The token at one place of each row."""
    return x[torch.arange(x.shape[0], device=x.device), at].unsqueeze(1)


@torch.no_grad()
def init_block(block: Any, index: int, dim: int) -> None:
    """Draw the matrices of a block's attention and feed-forward: sigma 1/sqrt(dim).

    What writes to the residual stream has its sigma divided by sqrt(2 (index + 1)).
    """
    ffn = block.feed_forward
    inner, outer = (ffn.w12, ffn.w3) if isinstance(ffn, SwiGLU) else (ffn[0], ffn[2])
    for weight in (block.attention.in_proj.weight, inner.weight):
        init_normal(weight, dim**-0.5)
    for weight in (block.attention.out_proj.weight, outer.weight):
        init_normal(weight, dim**-0.5 / (2 * (index + 1)) ** 0.5)


def init_normal(weight: Tensor, std: float) -> None:
    """Draw from a normal distribution that is cut off at 3 sigma."""
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
