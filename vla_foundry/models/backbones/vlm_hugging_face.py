"""The backbone for any Hugging Face image-text model: hidden states of the last layers, without the output head."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vla_foundry.batch import Batch
from vla_foundry.models.backbones.backbone import (
    Conditioning,
    LanguageModelBackbone,
    arrange_rows,
    extend_columns,
    put_token,
    register_backbone,
    register_observation,
)
from vla_foundry.models.batch_handlers import NOT_INPUTS, normalize_batch_images, to_device
from vla_foundry.models.registry import create_model
from vla_foundry.params.models.backbones import VLMBackboneParams

# batch keys of robot data that are not inputs of an image-text model
_ROBOT_KEYS = {
    *("image_mask", "actions", "proprioception", "past_mask", "future_mask", "is_padding", "action_dim_mask"),
    *("anchors", "intrinsics", "extrinsics"),
}


class VLMBackbone(LanguageModelBackbone):
    """Maps images and an instruction to hidden states at the observation token or at every token (prefix)."""

    def __init__(self, params: VLMBackboneParams, model: Any) -> None:
        head, table = model.model.get_output_embeddings(), model.model.get_input_embeddings()
        super().__init__(model, params, width=model.hidden_dim, head=head, table=table, token_std=0.02)
        # position of the observation token, set during a forward
        self._places: Tensor | None = None
        if self.observation_token is not None:
            # architectures process embeddings differently, but all of them look tokens up in this table
            table.register_forward_hook(self._put_token)

    def forward(
        self,
        input_ids: Int[Tensor, "B W"],
        *,
        attention_mask: Int[Tensor, "B W"] | None,
        pixel_values: Float[Tensor, "M ..."] | None,
        observation_places: Int[Tensor, " B"] | None,
        token_mask: Bool[Tensor, "B W"] | None,
        **extras: Tensor,
    ) -> Conditioning:
        """Encode; for the arguments see VLMHF and VLMFoundryBackbone."""
        self._places = observation_places
        if self.model.takes_prompt_types and observation_places is not None:
            # prompt tokens see each other in both directions, but not the observation token
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            extras["token_type_ids"] = (columns == observation_places[:, None]).int()
        states = self.model.encode(
            input_ids,
            attention_mask,
            pixel_values=pixel_values,
            num_states=self.num_states,
            at=observation_places,
            **extras,
        )
        self._places = None
        return Conditioning(torch.cat(states, dim=-1), token_mask)

    def _put_token(self, module: nn.Module, inputs: Any, embeds: Tensor) -> Tensor:
        # some architectures also look up single tokens
        if self._places is None or self.observation_token is None or embeds.ndim != 3:
            return embeds
        return put_token(embeds, self.observation_token, self._places)


@register_backbone("vlm_backbone")
def create_vlm_backbone(params: VLMBackboneParams, load_pretrained: bool = True) -> VLMBackbone:
    """Build the backbone, in fp32.

    Raises:
        ValueError: the model does not exist, or transformers does not support it.
    """
    return VLMBackbone(params, create_model(params.model_params(), load_pretrained=load_pretrained))


@register_observation("vlm_backbone")
def prepare_observation(params: VLMBackboneParams, batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """Return what VLMBackbone.forward takes; inputs other than tokens and images are passed on unchanged.

    Missing images stay visible as black images: model families differ in how they match tokens to images.
    """
    has_token = params.conditioning == "observation_token"
    rows = arrange_rows(batch, has_observation_token=has_token, is_trimmed=torch.device(device).type == "cpu")
    mask = rows.mask()
    width = rows.input_ids.shape[1]
    inputs: dict[str, Any] = {
        "input_ids": to_device(rows.input_ids, device),
        "attention_mask": None if mask.all() else to_device(mask.long(), device),
        "pixel_values": normalize_batch_images(batch, device),
        "observation_places": None if rows.places is None else to_device(rows.places, device),
        "token_mask": None if has_token or mask.all() else to_device(mask, device),
    }
    for name, value in batch.items():
        if name in ("mm_token_type_ids", "token_type_ids"):
            inputs[name] = to_device(extend_columns(value, width), device)
        elif name not in NOT_INPUTS | _ROBOT_KEYS and isinstance(value, Tensor):
            inputs[name] = to_device(value, device)
    return inputs
