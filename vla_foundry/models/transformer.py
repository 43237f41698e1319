"""The native transformer: pre-norm blocks of attention with rotary positions and a gated feed-forward.

    x = post_embed_norm(embeddings(input_ids))
    for each block:  x = x + out_proj(attention(attention_norm(x)));  x = x + feed_forward(ffn_norm(x))
    logits = output(norm(x))

There are no biases. Module names and the row order of fused matrices match published checkpoints: in_proj is [q; k; v]
with the heads in order, w12 is [gate; up].

`forward` returns logits or a loss, `decode` continues rows with a KV cache, `encode` returns hidden states for a
policy. The block is in layers.py; attention kernels and the cache are in attention.py.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from vla_foundry.batch import Documents, LanguageModelOutput, LossOutput
from vla_foundry.models.attention import CacheStep, KVCache, Segments, create_segments
from vla_foundry.models.layers import (
    Block,
    RMSNorm,
    Rotation,
    create_norm,
    create_rotary,
    init_block,
    init_normal,
    take_token,
)
from vla_foundry.models.losses import language_model_loss
from vla_foundry.models.registry import create_natively, register_model
from vla_foundry.params.models.transformer import TransformerParams


class _Rows(NamedTuple):
    """Visibility and positions of a batch's tokens."""

    # int64 [B, T], permutation that moves each row's real tokens to the front; None if they are already there
    order: Tensor | None
    segments: Segments | None
    cache_step: CacheStep | None
    rotation: Rotation | None


class _MaskedRows(NamedTuple):
    """The row layout that a padding mask describes."""

    # each row as one document followed by padding, after sorting by `order`
    documents: Documents
    # int64 [B], real tokens
    counts: np.ndarray
    # int64 [B, T], permutation that moves real tokens to the front; None if they are already there
    order: np.ndarray | None


class Transformer(nn.Module):
    """Maps tokens or embeddings to hidden states, logits or a loss. `create_model` initialises its weights."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.params = params
        self.max_seq_len = params.max_seq_len
        # each token sees only itself and earlier ones
        self.is_causal = params.is_causal
        # set where blocks are compiled
        self.compiles_loss = False
        dim = params.hidden_dim
        self.embeddings = nn.Embedding(params.vocab_size, dim) if params.vocab_size else None
        self.post_embed_norm = create_norm(params.norm_type, dim, params.norm_eps) if params.post_embed_norm else None
        self.layers = nn.ModuleList(Block(params) for _ in range(params.n_layers))
        self.norm = create_norm(params.norm_type, dim, params.norm_eps)
        self.output = nn.Linear(dim, params.vocab_size, bias=False) if params.vocab_size else None
        self.rotary = create_rotary(params)
        self._tie()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        *,
        documents: Documents | None = None,
        targets: Int[Tensor, "B T"] | None = None,
        z_loss_coefficient: float = 0.0,
        output_hidden_states: bool = False,
    ) -> LossOutput | LanguageModelOutput:
        """Return the loss if there are targets, else logits.

        Args:
            attention_mask: (B, T), 1 for tokens, 0 for padding anywhere in a row. Padding is never attended to and
                takes no position. Reading the mask synchronises the device, so training passes `documents` instead.
            documents: the documents of each row; they do not see each other, and each starts at position 0.
            targets: token to predict at each position, or IGNORE_INDEX.

        Raises:
            ValueError: arguments exclude each other, or there are more tokens than model.max_seq_len.
        """
        embeds = self.embed_tokens(input_ids)
        rows: dict[str, Any] = {"attention_mask": attention_mask, "documents": documents}
        if targets is not None:
            return self.loss(embeds, targets, z_loss_coefficient=z_loss_coefficient, **rows)
        return self.decode(inputs_embeds=embeds, use_cache=False, output_hidden_states=output_hidden_states, **rows)

    def loss(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        targets: Int[Tensor, "B T"],
        *,
        attention_mask: Tensor | None = None,
        documents: Documents | None = None,
        sees_ahead: np.ndarray | None = None,
        z_loss_coefficient: float = 0.0,
    ) -> LossOutput:
        """Return the loss; see `forward`, and `create_segments` for `sees_ahead`."""
        if self.output is None:
            raise ValueError("model.vocab_size is 0: a model without an output head has no loss over tokens.")
        rows = self._arrange(inputs_embeds, attention_mask, documents, sees_ahead)
        hidden = self._hidden_states(inputs_embeds, rows)[-1]
        options: dict[str, Any] = {"z_loss_coefficient": z_loss_coefficient, "is_compiled": self.compiles_loss}
        return language_model_loss(hidden, self.output.weight, targets, **options)

    def decode(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        documents: Documents | None = None,
        sees_ahead: np.ndarray | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
    ) -> LanguageModelOutput:
        """Return logits, and keys and values for the next call; see `forward`.

        Args:
            attention_mask: (B, past + T) with a cache.
            inputs_embeds: in place of input_ids.
            sees_ahead: see `create_segments`; not supported for tokens that follow a cache.
            past_key_values: cache returned by the last call, which this call's tokens continue. Modified in place.
            use_cache: return a cache, whose keys and values have no gradient.
            logits_to_keep: return the logits of this many last positions; 0: all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x: Any = self.embed_tokens(input_ids) if input_ids is not None else inputs_embeds
        cache = (past_key_values or KVCache(len(self.layers))) if use_cache or past_key_values is not None else None
        rows = self._arrange(x, attention_mask, documents, sees_ahead, cache)
        hidden_states = self._hidden_states(x, rows, cache, keeps_all=output_hidden_states)
        logits = None
        if self.output is not None:
            logits = self.output(hidden_states[-1][:, -logits_to_keep:])
            logits = logits.float() if self.params.cast_output_to_float32 else logits
        return LanguageModelOutput(logits, tuple(hidden_states) if output_hidden_states else None, cache)

    def encode(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        documents: Documents | None = None,
        *,
        sees_ahead: np.ndarray | None = None,
        num_states: int = 1,
        at: Int[Tensor, " B"] | None = None,
        normalize: bool = True,
        mask: Bool[Tensor, "B 1 T T"] | None = None,
    ) -> list[Float[Tensor, "B S D"]]:
        """Return the outputs of the last `num_states` blocks, without an output head; see `forward`.

        Args:
            at: return only the token at this position of each row (S is 1) and skip other computation where possible.
                The token sees all tokens before it in its row.
            normalize: apply the final norm to the last output.
            mask: True where a token sees another, in place of documents: nothing is then decided on the host, as graphs
                need it.

        Raises:
            ValueError: the model has fewer blocks.
        """
        num_blocks = len(self.layers)
        if num_states > num_blocks:
            raise ValueError(f"The last {num_states} layers are requested, but the model has {num_blocks}.")
        if mask is None:
            rows = self._arrange(inputs_embeds, None, documents, sees_ahead)
        else:
            T = inputs_embeds.shape[1]
            slots = torch.arange(T, device=inputs_embeds.device)[None]
            rotation = None if self.rotary is None else self.rotary(T)
            rows = _Rows(None, None, CacheStep(slots=slots, start=0, num_slots=T, mask=mask), rotation)
        states: list[Tensor] = []
        for i, x in enumerate(self._run_blocks(self._norm_embeds(inputs_embeds), rows, at=at), start=1):
            if i > num_blocks - num_states:
                states.append(x if at is None or i == num_blocks else take_token(x, at))
        if normalize:
            states[-1] = self.norm(states[-1])
        return states

    def _hidden_states(
        self, inputs_embeds: Tensor, rows: _Rows, cache: KVCache | None = None, *, keeps_all: bool = False
    ) -> list[Tensor]:
        """Return the last block's normalised output; with `keeps_all`, first the embedding and all block outputs."""
        x = self._norm_embeds(inputs_embeds)
        if rows.order is not None:
            x = _reorder(x, rows.order)
        states = [x]
        output = x
        for output in self._run_blocks(x, rows, cache):
            if keeps_all:
                states.append(output)
        states[-1] = self.norm(output)
        return states if rows.order is None else [_reorder(state, rows.order.argsort(dim=1)) for state in states]

    def _run_blocks(
        self, x: Tensor, rows: _Rows, cache: KVCache | None = None, at: Tensor | None = None
    ) -> Iterator[Tensor]:
        for i, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            at_last = at if i == len(self.layers) - 1 else None
            x = block(x, rows.rotation, rows.segments, self.is_causal, layer_cache, rows.cache_step, at_last)
            yield x

    def _arrange(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        documents: Documents | None,
        sees_ahead: np.ndarray | None,
        cache: KVCache | None = None,
    ) -> _Rows:
        """Compute visibility and positions once for all blocks."""
        B, T, _ = x.shape
        if documents is not None and (attention_mask is not None or cache is not None):
            raise ValueError("documents exclude attention_mask and a cache of keys and values.")
        if cache is not None and not self.is_causal:
            raise ValueError("A cache of keys and values needs causal attention (model.is_causal).")
        masked = None if attention_mask is None else _read_mask(attention_mask[:, -T:])
        order = None if masked is None or masked.order is None else torch.from_numpy(masked.order).to(x.device)
        cache_step = None if cache is None else cache.advance(B, T, None if masked is None else masked.counts, x.device)
        segments = None
        if cache_step is not None and sees_ahead is not None and sees_ahead.any():
            raise ValueError("Tokens that follow a cache cannot see ahead. Give all images with the first tokens.")
        if cache_step is None:
            if sees_ahead is not None and masked is not None and masked.order is not None:
                sees_ahead = np.take_along_axis(sees_ahead, masked.order, axis=1)
            documents = documents if masked is None else masked.documents
            segments = create_segments(documents, self.is_causal, x.device, sees_ahead=sees_ahead)
        longest = T if segments is None else segments.max_length
        longest = longest if cache_step is None else cache_step.num_slots
        if longest > self.max_seq_len:
            raise ValueError(
                f"A sequence of {longest} tokens is longer than model.max_seq_len ({self.max_seq_len}). "
                f"Shorten it, or raise model.max_seq_len."
            )
        rotation = None
        if self.rotary is not None:
            rotation = self.rotary(
                cache_step.slots if cache_step is not None else T if segments is None else segments.positions
            )
        return _Rows(order, segments, cache_step, rotation)

    @property
    def hidden_dim(self) -> int:
        """Return the width of hidden states."""
        return self.params.hidden_dim

    def embed_tokens(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Look up token embeddings, to be passed as inputs_embeds."""
        if self.embeddings is None:
            raise ValueError("model.vocab_size is 0: a model without token embeddings takes inputs_embeds.")
        return self.embeddings(input_ids)

    def _norm_embeds(self, inputs_embeds: Tensor) -> Tensor:
        return inputs_embeds if self.post_embed_norm is None else self.post_embed_norm(inputs_embeds)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order."""
        return list(self.layers)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all weights: normal, truncated at 3 sigma, sigma 1/sqrt(D) (`init_block`); norms 1, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | RMSNorm):
                module.reset_parameters()
        for head in (self.embeddings, None if self.params.weight_tying else self.output):
            if head is not None:
                init_normal(head.weight, self.params.hidden_dim**-0.5)
        for i, block in enumerate(self.layers):
            init_block(block, i, self.params.hidden_dim)

    @torch.no_grad()
    def resize_token_embeddings(self, num_tokens: int, *, pad_to_multiple_of: int = 64) -> int:
        """Grow the token tables to hold `num_tokens` tokens; keep existing rows, initialise new ones as at the start.

        Args:
            pad_to_multiple_of: round the number of rows up to a multiple of this, for fast matrix products.

        Returns:
            The number of rows, never fewer than before.
        """
        if self.embeddings is None or self.output is None:
            raise ValueError("model.vocab_size is 0: there is no embedding to resize.")
        old = self.embeddings.weight
        rows = -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        if num_tokens <= old.shape[0]:
            return old.shape[0]
        for module in (self.embeddings, self.output):
            grown = module.weight.new_empty(rows, old.shape[1])
            init_normal(grown, old.shape[1] ** -0.5)
            grown[: old.shape[0]] = module.weight
            module.weight = nn.Parameter(grown, requires_grad=module.weight.requires_grad)
        self.embeddings.num_embeddings = self.output.out_features = rows
        self._tie()
        return rows

    def token_tables(self) -> list[str]:
        """Return the names of the weights that have one row per token."""
        return [f"{name}.weight" for name in ("embeddings", "output") if getattr(self, name) is not None]

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return 6 FLOPs per matrix weight plus 12 L H K seq_len for attention, causal or not (PaLM, appendix B)."""
        weights = sum(p.numel() for p in self.layers.parameters() if p.ndim == 2)
        weights += self.output.weight.numel() if self.output is not None else 0
        attention = self.params.n_heads * (self.params.head_dim or self.params.hidden_dim // self.params.n_heads)
        return 6.0 * weights + 12.0 * self.params.n_layers * attention * seq_len

    def _tie(self) -> None:
        if self.params.weight_tying and self.embeddings is not None and self.output is not None:
            self.output.weight = self.embeddings.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        # moving off the meta device creates a new parameter for each of two tied names
        super()._apply(fn, recurse)
        self._tie()
        return self


def _read_mask(attention_mask: Shaped[Tensor, "B T"]) -> _MaskedRows | None:
    """Describe a mask that is 0 at padding anywhere in a row; None if nothing is masked. Synchronises the device."""
    is_real = attention_mask.cpu().numpy().astype(bool)
    num_tokens = is_real.shape[1]
    counts = is_real.sum(1)
    if (counts == num_tokens).all():
        return None
    order = np.argsort(~is_real, axis=1, kind="stable")
    is_in_place = bool((order == np.arange(num_tokens)).all())
    return _MaskedRows(Documents.of_counts(counts, num_tokens), counts, None if is_in_place else order)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the tokens of each row of (B, T, D) by `order` (B, T)."""
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


@register_model("transformer")
def create_transformer(params: TransformerParams, load_pretrained: bool = True) -> Transformer:
    """Build the native transformer; it has no published weights, so `load_pretrained` has no effect."""
    return create_natively(Transformer, params)
