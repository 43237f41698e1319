"""The image-only backbone: outputs all patches of all images and ignores the instruction."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vla_foundry.batch import Batch
from vla_foundry.models.backbones.backbone import (
    Backbone,
    Conditioning,
    read_image_mask,
    register_backbone,
    register_observation,
)
from vla_foundry.models.batch_handlers import normalize_batch_images
from vla_foundry.models.registry import create_model
from vla_foundry.params.models.backbones import ViTBackboneParams


class ViTBackbone(Backbone):
    """Maps images to patch tokens, image by image."""

    # within a vision-language model's checkpoint
    part_name = "vit"

    def forward(
        self, pixel_values: Float[Tensor, "M 3 H W"], *, num_images: int, image_mask: Bool[Tensor, "B N"] | None
    ) -> Conditioning:
        """Encode B x N images; `num_images` is N, the number per sample."""
        tokens = self.model(pixel_values)
        if tokens.ndim == 2:
            # the class token alone
            tokens = tokens.unsqueeze(1)  # (B N, T, C)
        per_image = tokens.shape[1]
        mask = None if image_mask is None else image_mask.repeat_interleave(per_image, dim=1)
        return Conditioning(tokens.unflatten(0, (-1, num_images)).flatten(1, 2), mask)

    def blocks(self) -> list[nn.Module]:
        """Return the encoder's blocks."""
        return self.model.list_blocks()

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of one image divided by the tokens of a row."""
        return self.model.num_flops_per_image() / seq_len


@register_backbone("vit_backbone")
def create_vit_backbone(params: ViTBackboneParams, load_pretrained: bool = True) -> ViTBackbone:
    """Build the backbone.

    Raises:
        ValueError: a checkpoint does not fit, or the published encoder does not exist.
    """
    model: Any = create_model(params.vit, load_pretrained=load_pretrained)
    return ViTBackbone(model, model.hidden_dim)


@register_observation("vit_backbone")
def prepare_observation(params: ViTBackboneParams, batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """Return what ViTBackbone.forward takes."""
    return {
        "pixel_values": normalize_batch_images(batch, device),
        "num_images": batch["image_mask"].shape[1],
        "image_mask": read_image_mask(batch, device),
    }
