"""The native vision-language backbone: hidden states of the last layers, without the output head."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vla_foundry.batch import Batch, Documents
from vla_foundry.models.backbones.backbone import (
    Backbone,
    Conditioning,
    register_backbone,
    register_observation,
)
from vla_foundry.models.backbones.observation_token import (
    arrange_rows,
    documents_of,
    drop_missing_images,
    mask_of,
    put_token,
)
from vla_foundry.models.batch_handlers import normalize_batch_images, to_device
from vla_foundry.models.registry import create_model
from vla_foundry.params.models.backbones import VLMFoundryBackboneParams
from vla_foundry.params.models.vlm import VLMParams


class VLMFoundryBackbone(Backbone):
    """Maps images and an instruction to hidden states at the observation token or at every token (prefix)."""

    part_name = "vision_language_backbone.model"

    def __init__(self, params: VLMFoundryBackboneParams, model: Any) -> None:
        super().__init__()
        self.num_states = params.num_vlm_layers_to_use
        self.final_norm = params.final_norm
        self.model: Any = model
        width = model.transformer.hidden_dim
        self.conditioning_dim = self.num_states * width
        self.observation_token = None
        if params.conditioning == "observation_token":
            self.observation_token = nn.Parameter(torch.empty(width))
            self._init_token()
        self._freeze_unused()

    def forward(
        self,
        input_ids: Int[Tensor, "B W"],
        *,
        pixel_values: Float[Tensor, "N 3 H V"] | None,
        image_positions: Int[Tensor, " n"],
        documents: Documents,
        sees_ahead: np.ndarray | None,
        observation_places: Int[Tensor, " B"] | None,
        token_mask: Bool[Tensor, "B W"] | None,
    ) -> Conditioning:
        """Encode.

        Args:
            documents: each row as one document and its padding.
            observation_places: position of the observation token in each row, after all text.
            token_mask: True at tokens that the head may see (prefix only); None: all.
        """
        embeds = self.model.embed(input_ids, pixel_values, image_positions)
        if self.observation_token is not None:
            assert observation_places is not None
            embeds = put_token(embeds, self.observation_token, observation_places)
        states = self.model.transformer.encode(
            embeds,
            documents,
            sees_ahead=sees_ahead if self.model.sees_ahead else None,
            num_states=self.num_states,
            at=observation_places,
            normalize=self.final_norm,
        )
        return Conditioning(torch.cat(states, dim=-1), token_mask)

    def blocks(self) -> list[nn.Module]:
        """Return the model's blocks."""
        return self.model.blocks()

    def init_weights(self) -> None:
        """Initialise the model's weights; draw the observation token like an embedding."""
        self.model.init_weights()
        self._init_token()

    @torch.no_grad()
    def _init_token(self) -> None:
        if self.observation_token is not None:
            nn.init.normal_(self.observation_token, std=self.observation_token.numel() ** -0.5)

    def _freeze_unused(self) -> None:
        """Freeze weights that get no gradient: an untied output head, and the final norm if it is skipped."""
        transformer = self.model.transformer
        is_native = hasattr(transformer, "layers")
        head = transformer.output if is_native else transformer.model.get_output_embeddings()
        table = transformer.embeddings if is_native else transformer.model.get_input_embeddings()
        self._head_size = 0 if head is None else head.weight.numel()
        if head is not None and head.weight is not table.weight:
            head.requires_grad_(False)
        if is_native and not self.final_norm:
            transformer.norm.requires_grad_(False)

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the model's FLOPs without its output head."""
        return self.model.num_flops_per_token(seq_len) - 6.0 * self._head_size

    def save_files(self, folder: Path) -> None:
        """Write the architecture of the Hugging Face parts."""
        self.model.save_files(folder)


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
    is_token = mask_of(rows)
    if vlm.image_token_id == 0:
        is_image &= is_token
        if rows.places is not None:
            is_image[torch.arange(len(rows.places)), rows.places] = False
    return {
        "input_ids": to_device(rows.input_ids, device),
        "pixel_values": normalize_batch_images(batch, device),
        "image_positions": to_device(is_image.flatten().nonzero().squeeze(1), device),
        "documents": documents_of(rows),
        "sees_ahead": is_image.numpy() if vlm.image_attention == "bidirectional" else None,
        "observation_places": None if rows.places is None else to_device(rows.places, device),
        "token_mask": None if has_token or is_token.all() else to_device(is_token, device),
    }
