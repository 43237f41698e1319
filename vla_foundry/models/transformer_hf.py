"""Any Hugging Face causal language model, with the native transformer's forward.

Attention is Hugging Face's SDPA. If a batch has documents, an attention function registered with transformers attends
to each document separately, so that no T x T mask is built.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vla_foundry.batch import Documents, LanguageModelOutput, LossOutput
from vla_foundry.models.attention import Segments, attend, create_segments
from vla_foundry.models.hugging_face import (
    HuggingFaceLanguageModel,
    evaluating,
    example_tokens,
    is_close,
    load_published_model,
    require_known,
    select_states,
)
from vla_foundry.models.registry import register_model
from vla_foundry.params.models.transformer import TransformerHFParams

ATTENTION_NAME = "vla_foundry"
# what architectures raise when they are tried on inputs that they cannot take
_TRIAL_ERRORS = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
# kinds that keep documents, padding and caches as they should
_KNOWN = {"gemma", "llama", "mistral", "qwen2", "qwen3"}
# layers whose tokens interact only through attention
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def attend_documents(
    module: nn.Module,
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B G S K"],
    value: Float[Tensor, "B G S K"],
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B T H K"], None]:
    """Attention function with transformers' signature; given `segments`, it attends within each of them."""
    if segments is None:
        options["sliding_window"] = sliding_window
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    output = attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        segments=segments,
        is_causal=bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal,
        dropout=dropout,
        scale=scaling,
        window=sliding_window,
    )
    return output, None


AttentionInterface.register(ATTENTION_NAME, attend_documents)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


class TransformerHF(HuggingFaceLanguageModel):
    """Wraps a transformers causal language model; parameters keep their names, prefixed with `model.`"""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config = model.config
        layer_types = set(getattr(config, "layer_types", None) or _ATTENTION_LAYERS)
        self.keeps_documents = (
            model._supports_sdpa
            and model._supports_attention_backend
            and not model._is_stateful
            and layer_types <= _ATTENTION_LAYERS
            and getattr(config, "attn_logit_softcapping", None) is None
        )
        if self.keeps_documents:
            model.set_attn_implementation(ATTENTION_NAME)
        # whether the model takes positions that skip padding, whether padding before a row leaves its outputs as they
        # are, and whether the KV cache can be used
        self.takes_positions = self.keeps_padding = self.keeps_cache = True
        if not next(model.parameters()).is_meta:
            with torch.no_grad(), evaluating(model):
                self._try_rows()
        else:
            require_known(model, _KNOWN)

    def _try_rows(self) -> None:
        """Compare the two halves of a row, each computed alone, with what this architecture makes of them together.

        Raises:
            ValueError: it cannot compute finite logits, or tokens see later ones.
        """
        ids = example_tokens(self.model, 9)
        try:
            alone = [self.model(part, use_cache=False).logits for part in (ids[:, :4], ids[:, 4:])]
            together = self.model(ids, use_cache=False).logits
        except _TRIAL_ERRORS as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(
                f"model.hf_pretrained: {type(self.model).__name__} cannot compute logits of nine tokens ({reason})."
            ) from error
        if not together.isfinite().all():
            raise ValueError(
                f"model.hf_pretrained: {type(self.model).__name__} gives logits that are not finite: its weights are "
                "damaged."
            )
        if not is_close(together[:, :4], alone[0]):
            raise ValueError(
                f"model.hf_pretrained: in {type(self.model).__name__} tokens see later ones, so it cannot learn to "
                f"predict them. Use a causal model; for an encoder, set is_decoder to true in its config.json."
            )
        halves = Documents(
            lengths=np.array([4, 5], dtype=np.int32),
            num_per_row=np.array([2], dtype=np.int32),
            is_padding=np.zeros(2, dtype=bool),
        )
        padding = torch.ones_like(ids)
        padding[:, :4] = 0
        self.keeps_documents = self.keeps_documents and self._gives(torch.cat(alone, 1), ids, documents=halves)
        self.keeps_padding = self._gives(alone[1], ids, attention_mask=padding)
        if not self.keeps_padding:
            self.takes_positions = False
            self.keeps_padding = self._gives(alone[1], ids, attention_mask=padding)
        try:
            cache = self.decode(ids[:, :8], torch.ones_like(ids[:, :8])).past_key_values
            if cache is not None:
                last = self.decode(ids[:, 8:], torch.ones_like(ids), past_key_values=cache).logits
                self.keeps_cache = is_close(last, together[:, 8:])
        except _TRIAL_ERRORS:
            self.keeps_cache = False

    def _gives(self, expected: Tensor, ids: Tensor, **rows: Any) -> bool:
        try:
            logits = self(ids, **rows).logits[:, -expected.shape[1] :]
        except _TRIAL_ERRORS:  # an architecture that cannot take such rows
            return False
        return is_close(logits, expected)

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
        """Return the loss if there are targets, else logits; see the native transformer.

        Raises:
            ValueError: `documents` are given, but this architecture cannot keep them apart.
        """
        rows = self._arrange(input_ids, attention_mask, documents, None)
        inputs = {"input_ids": input_ids.long(), "use_cache": False, **rows}
        if targets is not None:
            return self.compute_loss(inputs, targets, z_loss_coefficient)
        output = self.model(**inputs, output_hidden_states=output_hidden_states)
        return LanguageModelOutput(output.logits, output.hidden_states)

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
        """Return the loss; see the native transformer.

        Raises:
            ValueError: `sees_ahead` is given, but some layers of this architecture see only nearby tokens.
        """
        rows = self._arrange(inputs_embeds, attention_mask, documents, sees_ahead)
        return self.compute_loss(
            {"inputs_embeds": inputs_embeds, "use_cache": False, **rows}, targets, z_loss_coefficient
        )

    def decode(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        documents: Documents | None = None,
        sees_ahead: np.ndarray | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
    ) -> LanguageModelOutput:
        """Return logits, and the KV cache for the next call (None without one); see the native transformer."""
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        output = self.model(
            input_ids=None if input_ids is None else input_ids.long(),
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=(use_cache and self.keeps_cache) or past_key_values is not None,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
            **self._arrange(given, attention_mask, documents, sees_ahead, past_key_values),
        )
        # some architectures have no such cache: rows are recomputed for each token
        cache = getattr(output, "past_key_values", None) if self.keeps_cache else None
        return LanguageModelOutput(output.logits, getattr(output, "hidden_states", None), cache)

    def encode(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        documents: Documents | None = None,
        *,
        sees_ahead: np.ndarray | None = None,
        num_states: int = 1,
        at: Int[Tensor, " B"] | None = None,
        normalize: bool = True,
    ) -> list[Float[Tensor, "B S D"]]:
        """Return the outputs of the last `num_states` blocks; see the native transformer.

        Raises:
            ValueError: `normalize` is false; the last output is always normalised here.
        """
        if not normalize:
            raise ValueError("A Hugging Face model gives its last hidden state after the final norm only.")
        inputs = self._arrange(inputs_embeds, None, documents, sees_ahead)
        output = self.model.base_model(
            inputs_embeds=inputs_embeds, use_cache=False, output_hidden_states=True, **inputs
        )
        return select_states(output.hidden_states, num_states, at)

    def embed_tokens(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Look up token embeddings, to be passed as inputs_embeds."""
        return self.model.get_input_embeddings()(input_ids.long())

    def _check_sees_ahead(self, past_key_values: Any) -> None:
        config = self.model.config
        if past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError("Tokens that follow a cache cannot see ahead. Give all images with the first tokens.")
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not self.keeps_documents or layer_types != {"full_attention"}:
            raise ValueError(
                f"model.hf_pretrained: {type(self.model).__name__} cannot let image tokens see ahead. "
                f"Set --model.image_attention causal."
            )

    def _arrange(
        self,
        given: Tensor,
        attention_mask: Tensor | None,
        documents: Documents | None,
        sees_ahead: np.ndarray | None,
        past_key_values: Any = None,
    ) -> dict[str, Any]:
        """Return visibility and positions as keyword arguments for transformers."""
        sees_ahead = sees_ahead if sees_ahead is not None and sees_ahead.any() else None
        if sees_ahead is not None:
            self._check_sees_ahead(past_key_values)
            if attention_mask is not None:
                documents, attention_mask = _padding_as_documents(attention_mask), None
        if documents is not None or sees_ahead is not None:
            if attention_mask is not None:
                raise ValueError("Give attention_mask or documents, not both.")
            segments = create_segments(documents, True, given.device, sees_ahead=sees_ahead)
            if segments is None:
                return {}
            if not self.keeps_documents:
                raise ValueError(
                    f"model.hf_pretrained: {type(self.model).__name__} cannot keep the documents of a row apart. "
                    f"Set --data.mask_documents false."
                )
            # transformers passes a 4-D mask on unchanged; an empty one fails loudly if `segments` gets lost
            mask = torch.empty(given.shape[0], 1, 1, 0, device=given.device)
            return {"segments": segments, "position_ids": segments.positions, "attention_mask": mask}
        if attention_mask is None:
            return {}
        if not self.takes_positions:
            return {"attention_mask": attention_mask}
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return {"attention_mask": attention_mask, "position_ids": positions[:, -given.shape[1] :]}

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of forward and backward per token; see `count_flops`."""
        return self.count_flops(self.model, seq_len)


def _padding_as_documents(attention_mask: Tensor) -> Documents:
    """Convert a padding mask to stretches of tokens and of padding. Synchronises the device."""
    is_real = attention_mask.cpu().numpy().astype(bool)
    changes = np.ones_like(is_real)
    changes[:, 1:] = is_real[:, 1:] != is_real[:, :-1]
    starts = np.flatnonzero(changes)
    return Documents(
        lengths=np.diff(starts, append=is_real.size).astype(np.int32),
        num_per_row=changes.sum(1).astype(np.int32),
        is_padding=~is_real.reshape(-1)[starts],
    )


@register_model("transformer_hf")
def create_transformer_hf(params: TransformerHFParams, load_pretrained: bool = True) -> TransformerHF:
    """Build the model that `params.hf_pretrained` names, in fp32; code shipped with it is never run.

    Raises:
        ValueError: the model does not exist, or transformers does not support it.
    """
    model = load_published_model(AutoModelForCausalLM, params, load_pretrained=load_pretrained)
    return TransformerHF(model.train())
