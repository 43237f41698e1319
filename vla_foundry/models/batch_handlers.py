"""Batch handlers of language and vision-language models: turn a batch into the inputs of forward.

Rows hold T + 1 tokens; the model reads the first T and predicts, at each, the token that follows. The policy's handler
is in policy.py.
"""

from typing import Any

import torch
from torch import Tensor

from vla_foundry.batch import IGNORE_INDEX, Batch, Documents
from vla_foundry.images.colors import normalize_images
from vla_foundry.models.losses import count_valid_targets
from vla_foundry.models.registry import register_batch_handler
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.models.vlm import VLMParams

# aligned with the tokens of a batch and cut like them
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# batch keys that are not passed to a Hugging Face model under their own name
NOT_INPUTS = {
    *("modality", "positions", "input_ids", "target_mask", "documents", "dropped", "pixel_maps"),
    *("pixel_values", "image_mean", "image_std", "color_factors", "image_index"),
}


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor without synchronising."""
    return tensor.to(device, non_blocking=True)


def normalize_batch_images(batch: Batch, device: torch.device | str) -> Tensor | None:
    """Move the images of a batch to a device and normalise them there; None without images."""
    pixel_values: Tensor | None = batch.get("pixel_values")
    if pixel_values is None or pixel_values.shape[0] == 0:
        return None
    options = {
        name: to_device(batch[name], device)
        for name in ("color_factors", "image_index")
        if batch.get(name) is not None and batch.get("color_factors") is not None
    }
    return normalize_images(to_device(pixel_values, device), batch["image_mean"], batch["image_std"], **options)


def split_targets(batch: Batch) -> tuple[Tensor, Tensor, Documents | None]:
    """Return inputs [B, T] with 0 in padding, targets [B, T] and documents, all on the host.

    Targets are IGNORE_INDEX where a token is not supervised.
    """
    tokens: Tensor = batch["input_ids"]
    documents: Documents | None = batch.get("documents")
    if documents is not None and documents.is_padding.any():
        # padding may hold any number, even one outside the embedding table
        tokens = tokens.masked_fill(torch.from_numpy(documents.padding_mask()), 0)
    targets = tokens[:, 1:].long().masked_fill(~batch["target_mask"][:, 1:], IGNORE_INDEX)
    trimmed = None if documents is None else documents.trimmed(tokens.shape[1] - 1)
    return tokens[:, :-1].contiguous(), targets, trimmed


@register_batch_handler("transformer")
@register_batch_handler("transformer_hf")
class TextBatchHandler:
    """Rows of one or more documents of text."""

    def __init__(self, params: TrainExperimentParams) -> None:
        self.z_loss_coefficient = params.hparams.z_loss_coefficient

    def prepare(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        """Return what Transformer.forward takes."""
        tokens, targets, documents = split_targets(batch)
        return {
            "input_ids": to_device(tokens, device),
            "targets": to_device(targets, device),
            "documents": documents,
            "z_loss_coefficient": self.z_loss_coefficient,
        }

    def count_targets(self, inputs: dict[str, Any]) -> Tensor:
        """Return the number of supervised tokens."""
        return count_valid_targets(inputs["targets"])


@register_batch_handler("vlm")
class VLMBatchHandler(TextBatchHandler):
    """Rows of one or more samples, and their images."""

    def __init__(self, params: TrainExperimentParams) -> None:
        super().__init__(params)
        model = params.model
        if not isinstance(model, VLMParams) or model.image_token_id is None:
            raise ValueError("model.image_token_id is missing. Give --model.image_token_id N.")
        self.image_token_id = model.image_token_id
        self.sees_ahead = model.image_attention == "bidirectional"

    def prepare(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        """Return what VLM.forward takes; image tokens are located on the host."""
        tokens, targets, documents = split_targets(batch)
        is_image = tokens == self.image_token_id
        if documents is not None and self.image_token_id == 0:
            is_image &= torch.from_numpy(~documents.padding_mask())
        return {
            "input_ids": to_device(tokens, device),
            "targets": to_device(targets, device),
            "documents": documents,
            "pixel_values": normalize_batch_images(batch, device),
            "image_positions": to_device(is_image.flatten().nonzero().squeeze(1), device),
            "sees_ahead": is_image.numpy() if self.sees_ahead else None,
            "z_loss_coefficient": self.z_loss_coefficient,
        }


@register_batch_handler("vlm_hf")
class VLMHFBatchHandler(TextBatchHandler):
    """Rows of one sample each, followed by padding, and their images."""

    def prepare(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        """Return what VLMHF.forward takes; tensors that are neither tokens nor images are passed on unchanged.

        Raises:
            ValueError: a row holds several samples.
        """
        tokens, targets, documents = split_targets(batch)
        inputs: dict[str, Any] = {
            "input_ids": to_device(tokens, device),
            "targets": to_device(targets, device),
            "pixel_values": normalize_batch_images(batch, device),
            "z_loss_coefficient": self.z_loss_coefficient,
        }
        if documents is not None:
            if documents.count_tokens() is None:
                raise ValueError(
                    "data.pack is true, but model.type vlm_hf takes one sample a row. Set --data.pack false."
                )
            if documents.is_padding.any():
                mask = torch.from_numpy(~documents.padding_mask()).long()
                inputs["attention_mask"] = to_device(mask, device)
        for name, value in batch.items():
            if name not in NOT_INPUTS and isinstance(value, Tensor):
                inputs[name] = to_device(value[:, :-1] if name in _TOKEN_TYPES else value, device)
        return inputs
