"""Any Hugging Face image-text model (Qwen3-VL, PaliGemma, SmolVLM2, Idefics3, ...), with the native forward."""

from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vla_foundry.batch import LanguageModelOutput, LossOutput
from vla_foundry.models.hugging_face import HuggingFaceLanguageModel, load_published_model, select_states
from vla_foundry.models.registry import register_model
from vla_foundry.params.models.vlm import VLMHFParams

# families whose images have a leading sample dimension
_GROUPED = {"idefics2", "idefics3", "smolvlm"}
# position of the first token
_FIRST_POSITION = {"paligemma": 1}


class VLMCache:
    """A transformers KV cache, and each row's offset between positions and token count."""

    def __init__(self, cache: Any, offsets: Tensor | None) -> None:
        self.cache = cache
        # int64 [B, 1]; with spatial positions (height and width), an image takes fewer positions than tokens
        self.offsets = offsets

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.cache.batch_select_indices(rows)
        if self.offsets is not None:
            self.offsets = self.offsets[rows]


class VLMHF(HuggingFaceLanguageModel):
    """Wraps a transformers image-text model; parameters keep their names, prefixed with `model.`"""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config: Any = model.config
        self.is_grouped = config.model_type in _GROUPED
        self.first_position = _FIRST_POSITION.get(config.model_type, 0)
        # token types mark the prompt, which is attended to in both directions
        self.takes_prompt_types = config.model_type == "paligemma"
        # positions with height and width (multimodal rotary embedding)
        self.has_spatial_positions = hasattr(model.base_model, "get_rope_index")
        tokens = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        self.image_token_id: Any = next((token for token in tokens if token is not None), None)
        if fault := self._find_fault():
            raise ValueError(
                f"model.hf_pretrained: {type(model).__name__} {fault}. "
                "Use another model, such as Qwen3-VL, PaliGemma or SmolVLM2."
            )

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Float[Tensor, "M ..."] | None = None,
        targets: Int[Tensor, "B T"] | None = None,
        z_loss_coefficient: float = 0.0,
        output_hidden_states: bool = False,
        **extras: Tensor,
    ) -> LossOutput | LanguageModelOutput:
        """Return the loss if there are targets, else logits; see the native transformer for the other arguments.

        Args:
            pixel_values: normalised images or patches, in the order of their tokens.
            extras: further inputs of this architecture, such as image_grid_thw.
        """
        inputs, _ = self._arrange(input_ids, attention_mask, pixel_values, None, extras)
        inputs["use_cache"] = False
        if targets is not None:
            return self._loss(inputs, targets, z_loss_coefficient, has_images=pixel_values is not None)
        self._mark_prompt(inputs)
        output = self.model(**inputs, output_hidden_states=output_hidden_states)
        return LanguageModelOutput(output.logits, output.hidden_states)

    def decode(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Float[Tensor, "M ..."] | None = None,
        past_key_values: VLMCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        **extras: Tensor,
    ) -> LanguageModelOutput:
        """Return logits, and keys and values for the next call; see `forward` and the native transformer."""
        use_cache = use_cache or past_key_values is not None
        inputs, offsets = self._arrange(input_ids, attention_mask, pixel_values, past_key_values, extras)
        if past_key_values is None:
            self._mark_prompt(inputs)
        output = self.model(
            **inputs, use_cache=use_cache, logits_to_keep=logits_to_keep, output_hidden_states=output_hidden_states
        )
        cache = VLMCache(output.past_key_values, offsets) if use_cache else None
        return LanguageModelOutput(output.logits, output.hidden_states, cache)

    def _mark_prompt(self, inputs: dict[str, Any]) -> None:
        if self.takes_prompt_types:
            inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))

    def encode(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Float[Tensor, "M ..."] | None = None,
        num_states: int = 1,
        at: Int[Tensor, " B"] | None = None,
        **extras: Tensor,
    ) -> list[Float[Tensor, "B S D"]]:
        """Return the outputs of the last `num_states` blocks, without the output head; see the native transformer."""
        inputs, _ = self._arrange(input_ids, attention_mask, pixel_values, None, extras)
        self._mark_prompt(inputs)
        output = self.model.base_model(**inputs, use_cache=False, output_hidden_states=True)
        return select_states(output.hidden_states, num_states, at)

    def _arrange(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        past_key_values: VLMCache | None,
        extras: dict[str, Tensor],
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Return the model's inputs, and the offset between positions and token counts."""
        position_ids, offsets = self._positions(input_ids, attention_mask, past_key_values, extras)
        inputs: dict[str, Any] = {
            "input_ids": input_ids.long(),
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": None if past_key_values is None else past_key_values.cache,
            **extras,
        }
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values.unsqueeze(0) if self.is_grouped else pixel_values
        return inputs, offsets

    def _loss(
        self, inputs: dict[str, Any], targets: Tensor, z_loss_coefficient: float, *, has_images: bool
    ) -> LossOutput:
        # a rank without images must join the other ranks' image-encoder collectives at the same point
        unused = None if has_images else 0.0 * self._encode_plain_image()
        loss = self.compute_loss(inputs, targets, z_loss_coefficient)
        return loss if unused is None else loss._replace(sum=loss.sum + unused.to(loss.sum.dtype))

    def _encode_plain_image(self) -> Tensor:
        """Return the summed features of an image of one colour."""
        device = next(self.model.parameters()).device
        inputs = {name: each.to(device) for name, each in self._plain_image().items()}
        features = self.model.base_model.get_image_features(**inputs)
        parts = [*features.pooler_output, *getattr(features, "deepstack_features", ())]
        return torch.stack([part.sum() for group in parts for part in _tensors(group)]).sum()

    def _plain_image(self) -> dict[str, Tensor]:
        """Return an image of the smallest size the architecture allows; not zeros, which some take for padding."""
        config = self.model.config.vision_config
        if "image_grid_thw" in signature(self.model.base_model.get_image_features).parameters:
            side = config.spatial_merge_size
            width = config.in_channels * config.temporal_patch_size * config.patch_size**2
            return {"pixel_values": torch.ones(side**2, width), "image_grid_thw": torch.tensor([[1, side, side]])}
        size = config.image_size
        image = torch.ones(1, 3, *([size] * 2 if isinstance(size, int) else size))
        return {"pixel_values": image.unsqueeze(0) if self.is_grouped else image}

    def _find_fault(self) -> str | None:
        """Return why a plain image cannot be encoded; None if it can."""
        if self.image_token_id is None:
            return "has no token that stands for an image in its text"
        try:
            given, inputs = self._plain_image(), signature(self.model.base_model.get_image_features).parameters
        except AttributeError:
            return "has an image encoder of an unknown kind"
        needed = [name for name, each in inputs.items() if each.default is each.empty]
        unknown = [name for name in needed if name not in (*given, "kwargs")]
        return f"cannot encode an image without {unknown[0]}" if unknown else None

    def _positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, past: VLMCache | None, extras: dict[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return position_ids (None: the default) and their offset from the token counts."""
        num_tokens = input_ids.shape[1]
        if past is None and self.has_spatial_positions and extras.get("image_grid_thw") is not None:
            types = extras.pop("mm_token_type_ids", None)
            if types is None:
                types = (input_ids == self.image_token_id).int()
            return self.model.base_model.get_rope_index(
                input_ids.long(),
                mm_token_type_ids=types,
                image_grid_thw=extras["image_grid_thw"],
                attention_mask=attention_mask,
            )
        extras.pop("mm_token_type_ids", None)
        offsets = None if past is None else past.offsets
        if attention_mask is None:
            if past is None:
                return None, None
            start = past.cache.get_seq_length()
            positions = torch.arange(start, start + num_tokens, device=input_ids.device).expand_as(input_ids)
        else:
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -num_tokens:]
        positions = positions + self.first_position
        if offsets is not None:
            positions = positions + offsets
        return positions, offsets

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the language model's FLOPs of forward and backward per token; see `count_flops`."""
        return self.count_flops(self.model.base_model.get_decoder(), seq_len)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


@register_model("vlm_hf")
def create_vlm_hf(params: VLMHFParams, load_pretrained: bool = True) -> VLMHF:
    """Build the model that `params.hf_pretrained` names, in fp32; code shipped with it is never run.

    Raises:
        ValueError: the model does not exist, or transformers does not support it.
    """
    model = load_published_model(AutoModelForImageTextToText, params, load_pretrained=load_pretrained)
    module = VLMHF(model.train())
    if params.vocab_size is not None:
        module.resize_token_embeddings(params.vocab_size)
    return module
