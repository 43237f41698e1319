"""The native vision-language backbone: hidden states of the last layers, without the output head."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vla_foundry.batch import Batch, Documents
from vla_foundry.models.backbones.backbone import (
    Conditioning,
    LanguageModelBackbone,
    Suffix,
    Writing,
    arrange_rows,
    drop_missing_images,
    register_backbone,
    register_observation,
)
from vla_foundry.models.batch_handlers import normalize_batch_images, to_device
from vla_foundry.models.layers import take_token
from vla_foundry.models.registry import create_model
from vla_foundry.params.models.backbones import VLMFoundryBackboneParams
from vla_foundry.params.models.vlm import VLMParams


class VLMFoundryBackbone(LanguageModelBackbone):
    """Maps images and an instruction to hidden states at the observation token or at every token (prefix)."""

    def __init__(self, params: VLMFoundryBackboneParams, model: Any) -> None:
        transformer, width = model.transformer, model.transformer.hidden_dim
        is_native = hasattr(transformer, "layers")
        head = transformer.output if is_native else transformer.model.get_output_embeddings()
        table = transformer.embeddings if is_native else transformer.model.get_input_embeddings()
        super().__init__(model, params, width=width, head=head, table=table, token_std=width**-0.5)
        self.final_norm = params.final_norm
        if is_native and not self.final_norm and not params.language_loss:
            # no gradient reaches it
            transformer.norm.requires_grad_(False)

    def forward(
        self,
        input_ids: Int[Tensor, "B W"],
        *,
        pixel_values: Float[Tensor, "N 3 H V"] | None,
        image_positions: Int[Tensor, " n"],
        documents: Documents | None,
        sees_ahead: np.ndarray | None,
        observation_places: Int[Tensor, " B"] | None,
        token_mask: Bool[Tensor, "B W"] | None,
        mask: Bool[Tensor, "B 1 W W"] | None = None,
        suffix: Suffix | None = None,
        image_features: Float[Tensor, "N S D"] | None = None,
    ) -> Conditioning:
        """Encode.

        Args:
            documents: each row as one document and its padding.
            observation_places: position of the observation token in each row, after all text.
            token_mask: True at tokens that the head may see (prefix only); None: all.
            mask: what each token sees, in place of documents and `sees_ahead`; native language models only.
            suffix: further tokens of each row.
            image_features: output of the model's `encode_images`, in place of pixel_values.
        """
        embeds = self.model.embed(input_ids, pixel_values, image_positions, image_features)
        embeds = self.put_embeddings(embeds, observation_places, suffix)
        rows = {"sees_ahead": sees_ahead if self.model.sees_ahead else None} if mask is None else {"mask": mask}
        states = self.model.transformer.encode(
            embeds,
            documents,
            **rows,
            num_states=self.num_states,
            at=observation_places if suffix is None else None,
            normalize=self.final_norm,
        )
        return self.read_states(states, observation_places, token_mask, suffix)

    def start_writing(
        self,
        input_ids: Int[Tensor, "B W"],
        *,
        pixel_values: Float[Tensor, "N 3 H V"] | None,
        image_positions: Int[Tensor, " n"],
        documents: Documents,
        sees_ahead: np.ndarray | None,
        observation_places: Int[Tensor, " B"] | None,
        token_mask: Bool[Tensor, "B W"] | None,
        suffix: Suffix,
        image_features: Float[Tensor, "N S D"] | None = None,
    ) -> Writing:
        """Read the prompt and the suffix, from which `continue_writing` goes on; see `forward`."""
        embeds = self.model.embed(input_ids, pixel_values, image_positions, image_features)
        embeds = self.put_embeddings(embeds, observation_places, suffix)
        mask = torch.from_numpy(~documents.padding_mask()).to(embeds.device).long()
        output = self.model.transformer.decode(
            attention_mask=mask,
            inputs_embeds=embeds,
            sees_ahead=sees_ahead if self.model.sees_ahead else None,
            logits_to_keep=1,
            output_hidden_states=True,
        )
        last = suffix.starts + suffix.values.shape[1] - 1
        return Writing(take_token(output.hidden_states[-1], last).squeeze(1), mask, output.past_key_values)

    def continue_writing(self, writing: Writing, token: Float[Tensor, "B D"]) -> Writing:
        """Read one more token in each row."""
        mask = torch.cat([writing.mask, torch.ones_like(writing.mask[:, :1])], dim=1)
        output = self.model.transformer.decode(
            attention_mask=mask,
            inputs_embeds=token.unsqueeze(1),
            past_key_values=writing.cache,
            logits_to_keep=1,
            output_hidden_states=True,
        )
        return Writing(output.hidden_states[-1][:, -1], mask, output.past_key_values)


@register_backbone("vlm_foundry_backbone")
def create_vlm_foundry_backbone(params: VLMFoundryBackboneParams, load_pretrained: bool = True) -> VLMFoundryBackbone:
    """Build the backbone; the weights of `params.resume_from_checkpoint` are loaded by create_backbone."""
    vlm = _architecture(params)
    return VLMFoundryBackbone(params, create_model(vlm, load_pretrained=load_pretrained))


def _architecture(params: VLMFoundryBackboneParams) -> VLMParams:
    if params.vlm is None:
        raise ValueError(
            "model.vision_language_backbone has no architecture. Give a run of type vlm in "
            "model.vision_language_backbone.resume_from_checkpoint, or the architecture in its `vlm`."
        )
    if params.vlm.image_token_id is None:
        raise ValueError(
            "model.vision_language_backbone.vlm.image_token_id is missing. Give it, or data with a processor."
        )
    return params.vlm


@register_observation("vlm_foundry_backbone")
def prepare_observation(params: VLMFoundryBackboneParams, batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """Return what VLMFoundryBackbone.forward takes; image tokens are located on the host."""
    vlm = _architecture(params)
    assert vlm.image_token_id is not None
    batch = drop_missing_images(batch, vlm.image_token_id)
    has_token = params.conditioning == "observation_token"
    rows = arrange_rows(batch, has_observation_token=has_token, is_trimmed=torch.device(device).type == "cpu")
    is_image = rows.input_ids == vlm.image_token_id
    is_token = rows.mask(rows.num_text)
    if vlm.image_token_id == 0:
        is_image &= rows.mask(rows.num_text)
    inputs = {
        "input_ids": to_device(rows.input_ids, device),
        "pixel_values": normalize_batch_images(batch, device),
        "image_positions": to_device(is_image.flatten().nonzero().squeeze(1), device),
        "documents": rows.documents(),
        "sees_ahead": is_image.numpy() if vlm.image_attention == "bidirectional" else None,
        "observation_places": None if rows.places is None else to_device(rows.places, device),
        "token_mask": None if has_token or is_token.all() else to_device(is_token, device),
    }
    return inputs if "num_suffix" not in batch else inputs | {"suffix_starts": to_device(rows.starts, device)}
