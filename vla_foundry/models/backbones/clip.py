"""The CLIP backbone (Hugging Face): one token for the instruction and one for each image."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModel, CLIPModel

from vla_foundry.batch import Batch
from vla_foundry.models.backbones.backbone import (
    Backbone,
    Conditioning,
    arrange_rows,
    read_image_mask,
    register_backbone,
    register_observation,
)
from vla_foundry.models.batch_handlers import normalize_batch_images, to_device
from vla_foundry.models.hugging_face import HuggingFaceModule, load_published_model
from vla_foundry.params.models.backbones import CLIPBackboneParams


class CLIPBackbone(Backbone):
    """Outputs the projections of both encoders as tokens, normalised to length 1."""

    def __init__(self, params: CLIPBackboneParams, model: HuggingFaceModule) -> None:
        clip = model.model
        super().__init__(model, clip.config.projection_dim)
        self.params = params
        # only CLIP's own loss uses this scale
        clip.logit_scale.requires_grad_(False)
        if params.disable_text or params.freeze_text_encoder:
            clip.text_model.requires_grad_(False)
            clip.text_projection.requires_grad_(False)
        if params.freeze_image_encoder:
            clip.vision_model.requires_grad_(False)
            clip.visual_projection.requires_grad_(False)

    def forward(
        self,
        pixel_values: Float[Tensor, "M 3 H W"],
        *,
        num_images: int,
        image_mask: Bool[Tensor, "B N"] | None,
        input_ids: Int[Tensor, "B T"] | None,
        attention_mask: Int[Tensor, "B T"] | None,
    ) -> Conditioning:
        """Encode B x N images; `num_images` is N, the number per sample."""
        clip = self.model.model
        images = clip.visual_projection(clip.vision_model(pixel_values=pixel_values).pooler_output)
        tokens = F.normalize(images, dim=-1).unflatten(0, (-1, num_images))  # (B, N, C)
        if input_ids is None:
            return Conditioning(tokens, image_mask)
        text = clip.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        if self.params.text_norm_before_projection:
            text = clip.text_projection(F.normalize(text, dim=-1))
        else:
            text = F.normalize(clip.text_projection(text), dim=-1)
        tokens = torch.cat((text.unsqueeze(1), tokens), dim=1)
        return Conditioning(tokens, None if image_mask is None else F.pad(image_mask, (1, 0), value=True))

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return 6 FLOPs per matrix weight of the text encoder; images are not counted."""
        return 6.0 * sum(p.numel() for p in self.model.model.text_model.encoder.parameters() if p.ndim == 2)


@register_backbone("clip_backbone")
def create_clip_backbone(params: CLIPBackboneParams, load_pretrained: bool = True) -> CLIPBackbone:
    """Build the backbone, in fp32.

    Raises:
        ValueError: the model does not exist or is not a CLIP model.
    """
    key = "model.vision_language_backbone.hf_pretrained"
    model = load_published_model(AutoModel, params, load_pretrained=load_pretrained, key=key)
    if not isinstance(model, CLIPModel):
        raise ValueError(
            f"model.vision_language_backbone.hf_pretrained '{params.hf_pretrained}' is a {type(model).__name__}, not a "
            "CLIP model. Use --model.vision_language_backbone.type vlm_backbone for an image-text model."
        )
    return CLIPBackbone(params, HuggingFaceModule(model.train()))


@register_observation("clip_backbone")
def prepare_observation(params: CLIPBackboneParams, batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """Return what CLIPBackbone.forward takes."""
    inputs: dict[str, Any] = {"input_ids": None, "attention_mask": None}
    if not params.disable_text:
        if "input_ids" not in batch:
            raise ValueError(
                "The data has no instructions, which clip_backbone reads. "
                "Use --model.vision_language_backbone.disable_text true."
            )
        rows = arrange_rows(batch, has_observation_token=False, is_trimmed=torch.device(device).type == "cpu")
        mask = rows.mask()
        inputs["input_ids"] = to_device(rows.input_ids, device)
        inputs["attention_mask"] = None if mask.all() else to_device(mask.long(), device)
    inputs["pixel_values"] = normalize_batch_images(batch, device)
    inputs["num_images"] = batch["image_mask"].shape[1]
    inputs["image_mask"] = read_image_mask(batch, device)
    return inputs
