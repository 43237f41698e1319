"""The block of the native transformer and its parts (norms, feed-forward, rotary positions, attention), and LoRA."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vla_foundry.models.attention import CacheStep, LayerCache, Segments, attend, attend_cached
from vla_foundry.params.models.roles import LoRAParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.registry import match_names


class LowPrecisionLayerNorm(nn.LayerNorm):
    """LayerNorm computed in autocast's dtype; the plain one would run in fp32."""

    def forward(self, input: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        """Normalise over the last dimension."""
        device_type = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        with torch.autocast(device_type, enabled=False):
            return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; normalises in at least fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Set the gain to 1."""
        nn.init.ones_(self.weight)

    def forward(self, input: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        """Normalise over the last dimension."""
        if input.dtype == self.weight.dtype:
            return F.rms_norm(input, self.weight.shape, self.weight, self.eps)
        # under autocast: the fused kernel takes a single dtype
        return F.rms_norm(input, self.weight.shape, None, self.eps) * self.weight


_NORMS: dict[str, tuple[type[nn.Module], dict[str, bool]]] = {
    "default_layer_norm": (nn.LayerNorm, {}),
    "gain_only_layer_norm": (nn.LayerNorm, {"bias": False}),
    "no_wb_layer_norm": (nn.LayerNorm, {"elementwise_affine": False}),
    "lp_layer_norm": (LowPrecisionLayerNorm, {}),
    "gain_only_lp_layer_norm": (LowPrecisionLayerNorm, {"bias": False}),
    "rms_norm": (RMSNorm, {}),
}


def create_norm(norm_type: str, dim: int, eps: float) -> nn.Module:
    """Return a norm over the last dimension, of width `dim`."""
    norm, options = _NORMS[norm_type]
    return norm(dim, eps=eps, **options)


def swiglu_hidden_dim(dim: int) -> int:
    """Return the inner width of a gated feed-forward: 8/3 of the model width, rounded up to a multiple of 256."""
    return 256 * -(-(8 * dim // 3) // 256)


class SwiGLU(nn.Module):
    """w3(silu(gate) * up), where the rows of w12 are [gate; up] (Shazeer 2020)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden_dim = swiglu_hidden_dim(dim)
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.w3 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Apply the layer to every token."""
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


def create_feed_forward(ffn_type: str, dim: int) -> nn.Module:
    """Return a feed-forward of model width `dim`: `swiglu`, or `gelu` with an inner width of 4 dim."""
    if ffn_type == "swiglu":
        return SwiGLU(dim)
    return nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles of a batch."""

    # (T, 1, K/2), or (B, T, 1, K/2) if rows differ
    cos: Float[Tensor, "... 1 half"]
    sin: Float[Tensor, "... 1 half"]
    # rotate in fp32 regardless of the dtype of queries and keys
    in_float32: bool

    def at(self, positions: Int[Tensor, " B"]) -> "Rotation":
        """Return the angles of one token per row, (B, 1, 1, K/2)."""
        rows = torch.arange(positions.shape[0], device=positions.device)
        cos, sin = (
            table[positions, None] if table.ndim == 3 else table[rows, positions, None]
            for table in (self.cos, self.sin)
        )
        return Rotation(cos, sin, self.in_float32)

    def last(self, num_tokens: int) -> "Rotation":
        """Return the angles of the last `num_tokens` tokens; rows may differ."""
        return self._replace(cos=self.cos[:, -num_tokens:], sin=self.sin[:, -num_tokens:])


class RotaryTables(nn.Module):
    """Rotary position embedding (Su et al. 2021, GPT-NeoX's half rotation): cos and sin of position x frequency.

    Positions are 0 .. max_seq_len - 1, frequencies theta^(-2i/K). The tables stay fp32 in a model that is cast to
    another dtype (bf16 tables are off by up to 0.86 at position 2047). They are rebuilt whenever the module moves, so a
    model created on the meta device gets them when it is materialised. Checkpoints do not store them.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, *, max_seq_len: int, theta: float, bf16_frequencies: bool, rotate_in_float32: bool
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.theta = theta
        # legacy checkpoints trained in bf16 rounded the frequencies to bf16: each is off by up to 0.4%, so angles at
        # far positions differ visibly
        self.bf16_frequencies = bf16_frequencies
        self.rotate_in_float32 = rotate_in_float32
        self.register_buffer("cos", torch.empty(max_seq_len, head_dim // 2, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty_like(self.cos), persistent=False)
        self._fill(self.cos.device)

    def forward(self, positions: Int[Tensor, "B T"] | int) -> Rotation:
        """Return the angles at `positions`; an int means 0 .. positions - 1 in every row."""
        if isinstance(positions, int):
            cos, sin = self.cos[:positions], self.sin[:positions]
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        return Rotation(cos.unsqueeze(-2), sin.unsqueeze(-2), self.rotate_in_float32)

    def _fill(self, device: torch.device) -> None:
        if device.type == "meta":
            return
        # compute on the CPU in fp64: every device gets the same tables, correct to the last bit of fp32
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
        frequencies = self.theta**-exponents
        if self.bf16_frequencies:
            frequencies = frequencies.to(torch.bfloat16).double()
        positions = torch.arange(self.max_seq_len, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * frequencies
        self.cos = angles.cos().float().to(device)
        self.sin = angles.sin().float().to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryTables":
        # not cast but made again: on the meta device there may be nothing to cast
        device = fn(torch.empty(0, dtype=torch.int32, device=self.cos.device)).device
        if device.type == "meta" and not self.cos.is_meta:
            super()._apply(fn, recurse)
        self._fill(device)
        return self


def rotate(x: Float[Tensor, "B T H K"], rotation: Rotation) -> Float[Tensor, "B T H K"]:
    """Rotate each pair (x[i], x[i + K/2]) by its angle."""
    dtype = torch.promote_types(x.dtype, torch.float32) if rotation.in_float32 else x.dtype
    cos, sin = rotation.cos.to(dtype), rotation.sin.to(dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


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
        self.q_norm = self.k_norm = None
        if params.qk_norm:
            self.q_norm = create_norm(params.norm_type, self.widths[0], params.norm_eps)
            self.k_norm = create_norm(params.norm_type, self.widths[1], params.norm_eps)

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
        """Attend within segments, or to the cache as `cache_step` describes; for `at` see Block."""
        if at is not None:
            # one query token per row, which sees the tokens up to itself
            at_rotation = None if rotation is None else rotation.at(at)
            queries, keys, values = self.project(x, rotation, take_token(x, at), at_rotation)
            is_seen = torch.arange(x.shape[1], device=x.device) <= at[:, None]
            return self.out_proj(attend_cached(queries, keys, values, is_seen[:, None, None]).flatten(2))
        queries, keys, values = self.project(x, rotation)
        if cache is not None:
            keys, values = cache.write(keys, values, cache_step)
        if cache_step is not None:
            output = attend_cached(queries, keys, values, cache_step.mask)
        else:
            output = attend(queries, keys, values, segments=segments, is_causal=is_causal)
        return self.out_proj(output.flatten(2))  # (B, T, D)

    def project(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Rotation | None,
        asking: Float[Tensor, "B S D"] | None = None,
        asking_rotation: Rotation | None = None,
    ) -> tuple[Float[Tensor, "B S H K"], Float[Tensor, "B T G K"], Float[Tensor, "B T G K"]]:
        """Return queries, keys and values, normalised and rotated.

        Args:
            asking: query tokens, rotated by `asking_rotation`; None: all of x.
        """
        if asking is None:
            asking_rotation = rotation
            queries, keys, values = self.in_proj(x).split(self.widths, dim=-1)
        else:
            queries = apply_rows(self.in_proj, asking, slice(self.widths[0]))
            keys, values = apply_rows(self.in_proj, x, slice(self.widths[0], None)).chunk(2, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            # normalise over all heads at once; an fp32 norm under autocast must not change attention's dtype
            queries, keys = self.q_norm(queries).to(values.dtype), self.k_norm(keys).to(values.dtype)
        queries, keys, values = (t.unflatten(-1, (-1, self.head_dim)) for t in (queries, keys, values))  # (B, T, H, K)
        if rotation is not None and asking_rotation is not None:
            queries, keys = rotate(queries, asking_rotation), rotate(keys, rotation)
        return queries, keys, values


class Block(nn.Module):
    """A pre-norm residual block: attention, then feed-forward."""

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
        """Return x plus this block's residuals.

        Args:
            at: compute only the token at this position of each row; it sees the tokens up to itself (S is 1, else T).
        """
        added = self.attention(self.attention_norm(x), rotation, segments, is_causal, cache, cache_step, at)
        x = (x if at is None else take_token(x, at)) + added
        return x + self.feed_forward(self.ffn_norm(x))


def take_token(x: Float[Tensor, "B T D"], at: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
    """Return the token at one position of each row."""
    return x[torch.arange(x.shape[0], device=x.device), at].unsqueeze(1)


@torch.no_grad()
def init_block(block: Any, index: int, dim: int) -> None:
    """Initialise the matrices of a block's attention and feed-forward with sigma 1/sqrt(dim).

    For matrices that write to the residual stream, divide sigma by sqrt(2 (index + 1)).
    """
    ffn = block.feed_forward
    inner, outer = (ffn.w12, ffn.w3) if isinstance(ffn, SwiGLU) else (ffn[0], ffn[2])
    for weight in (block.attention.in_proj.weight, inner.weight):
        init_normal(weight, dim**-0.5)
    for weight in (block.attention.out_proj.weight, outer.weight):
        init_normal(weight, dim**-0.5 / (2 * (index + 1)) ** 0.5)


def init_normal(weight: Tensor, std: float) -> None:
    """Draw from a normal distribution truncated at 3 sigma."""
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def create_rotary(params: TransformerParams) -> RotaryTables | None:
    """Build the rotary tables that `params` describe; None without positional embedding."""
    if params.positional_embedding_type == "none":
        return None
    return RotaryTables(
        params.head_dim or params.hidden_dim // params.n_heads,
        max_seq_len=params.max_seq_len,
        theta=params.rope_theta,
        bf16_frequencies=params.rope_bf16_frequencies,
        rotate_in_float32=params.positional_embedding_type == "rotary_float32",
    )


class LoRALinear(nn.Linear):
    """A linear layer with an adapter of low rank: W x + b + (alpha / rank) B A x (Hu et al. 2021, section 4.1).

    B is zero at first, so that the layer computes what it did before. `weight` and `bias` keep their names.
    """

    def __init__(self, linear: nn.Linear, params: LoRAParams) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        like: dict[str, Any] = {"bias": False, "device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_a = nn.Linear(self.in_features, params.rank, **like)
        self.lora_b = nn.Linear(params.rank, self.out_features, **like)
        nn.init.zeros_(self.lora_b.weight)
        self.scale, self.dropout = params.alpha / params.rank, params.dropout

    def forward(self, input: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape E"]:
        """Apply the layer and its adapter."""
        return super().forward(input) + self.scale * self.lora_b(self.narrow(input))

    def narrow(self, input: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape R"]:
        """Map the input to what the adapter's second matrix takes."""
        return self.lora_a(F.dropout(input, self.dropout, self.training))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the linear layer that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        update = self.lora_b.weight.double() @ self.lora_a.weight.double()
        linear.weight = nn.Parameter((self.weight.double() + self.scale * update).to(self.weight))
        linear.register_parameter("bias", self.bias)
        return linear


def apply_rows(linear: nn.Linear, x: Float[Tensor, "*shape D"], rows: slice) -> Float[Tensor, "*shape E"]:
    """Compute some of the outputs of a linear layer without bias, its adapter's share included."""
    output = F.linear(x, linear.weight[rows])
    if isinstance(linear, LoRALinear):
        output = output + linear.scale * F.linear(linear.narrow(x), linear.lora_b.weight[rows])
    return output


def add_adapters(model: nn.Module, params: LoRAParams) -> None:
    """Put adapters beside the linear layers that match; all else is frozen, except what `params.train` matches.

    Output heads, layers that share their weight, that are frozen or that are trained whole get no adapter.

    Raises:
        ValueError: a pattern matches nothing that can be adapted or trained.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    trained = set(match_names(params.train, weights, "model.lora.train", "weight that is not frozen"))
    shared = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    heads = {id(_output_head(part)) for part in model.modules()}
    linears = {
        name: part
        for name, part in model.named_modules()
        if type(part) is nn.Linear
        and id(part) not in heads
        and shared[id(part.weight)] == 1
        and f"{name}.weight" in weights.keys() - trained
    }
    targets = match_names(params.targets, linears, "model.lora.targets", "linear layer that can have an adapter")
    model.requires_grad_(False)
    adapted: dict[nn.Module, nn.Module] = {linears[name]: LoRALinear(linears[name], params) for name in targets}
    _replace_modules(model, adapted)
    for name in trained:
        weights[name].requires_grad_(True)


def merge_adapters(model: nn.Module) -> None:
    """Add each adapter to the weight beside it, so that plain linear layers compute the same."""
    _replace_modules(model, {part: part.merged() for part in model.modules() if isinstance(part, LoRALinear)})


def _replace_modules(model: nn.Module, changed: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in changed:
                parent.register_module(name, changed[child].train(child.training))


def _output_head(part: Any) -> nn.Module | None:
    """Return the head that maps to tokens: the loss takes its weight, and passes by its forward."""
    if callable(getattr(part, "get_output_embeddings", None)):
        return part.get_output_embeddings()
    return getattr(part, "output", None) if hasattr(part, "embeddings") else None
