"""Params of the native transformer and of Hugging Face causal language models."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vla_foundry.config.schema import LEGACY, Bounds, Epsilon, NumTokens, Size
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.roles import (
    Depth,
    LanguageModelParams,
    PublishedParams,
    TokenLimits,
    register_model_params,
)


@register_model_params("transformer")
@dataclass(frozen=True, kw_only=True)
class TransformerParams(LanguageModelParams):
    """The native pre-norm transformer."""

    # normalisation before attention and feed-forward
    norm_type: Literal[
        "default_layer_norm",
        "lp_layer_norm",
        "gain_only_lp_layer_norm",
        "gain_only_layer_norm",
        "no_wb_layer_norm",
        "rms_norm",
    ] = "default_layer_norm"
    # feed-forward: gated SiLU, or GELU
    ffn_type: Literal["swiglu", "gelu"] = "swiglu"
    # normalise queries and keys over their full width
    qk_norm: bool = False
    # rotary (tables always fp32), or none; rotary_float32 also rotates in fp32
    positional_embedding_type: Literal["rotary", "rotary_float32", "none"] = "rotary"
    # base of the rotary frequencies
    rope_theta: Annotated[float, Bounds(least=1, most=10**15)] = 10000.0
    # legacy checkpoints trained in bf16: round the rotary frequencies to bf16 as their training did
    rope_bf16_frequencies: bool = field(default=False, metadata=LEGACY)
    # model width
    hidden_dim: Size = 96
    # number of blocks
    n_layers: Depth = 8
    # query heads
    n_heads: Size = 4
    # key and value heads (grouped-query attention); null: as many as query heads
    n_kv_heads: Size | None = None
    # width of a head; null: hidden_dim / n_heads
    head_dim: Size | None = None
    # rows of the token embedding; 0: no embedding and no output head
    vocab_size: Annotated[int, Bounds(least=0, most=100_000_000, fix="0 is a model without tokens.")] = 50432
    # normalise the token embeddings
    post_embed_norm: bool = False
    # epsilon of every norm
    norm_eps: Epsilon = 1e-5
    # share one matrix between the token embedding and the output head
    weight_tying: bool = False
    # return logits in fp32
    cast_output_to_float32: bool = False
    # longest sequence, tokens
    max_seq_len: NumTokens = 2048
    # each token sees only itself and earlier ones
    is_causal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None and self.hidden_dim % self.n_heads:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be a multiple of n_heads ({self.n_heads}). "
                f"Change one, or set head_dim."
            )
        head_dim = self.head_dim or self.hidden_dim // self.n_heads
        if self.positional_embedding_type != "none" and (head_dim < 2 or head_dim % 2):
            raise ValueError(f"head_dim ({head_dim}) must be even: rotary positions turn pairs of numbers.")
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads}): "
                f"each key head serves the same number of query heads."
            )

    def num_weights(self) -> int:
        """Return the number of weights, without norms and biases."""
        head_dim = self.head_dim or self.hidden_dim // self.n_heads
        heads = 2 * self.n_heads + 2 * (self.n_kv_heads or self.n_heads)
        tables = 0 if not self.vocab_size else 1 if self.weight_tying else 2
        # queries, keys, values and output; the feed-forward has 8 x hidden_dim^2 or a little more
        block = self.hidden_dim * head_dim * heads + 8 * self.hidden_dim**2
        return self.n_layers * block + tables * self.vocab_size * self.hidden_dim

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return its vocabulary size, longest sequence and number of blocks."""
        return TokenLimits(vocab_size=self.vocab_size or None, max_seq_len=self.max_seq_len, num_layers=self.n_layers)


@register_model_params("transformer_hf")
@dataclass(frozen=True, kw_only=True)
class TransformerHFParams(PublishedParams, LanguageModelParams):
    """Any Hugging Face causal language model (AutoModelForCausalLM)."""

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return the limits in the published config."""
        return self.published_limits(facts)
