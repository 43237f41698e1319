"""Batches of text into the inputs of a causal language model: predict each token from those before it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_foundry.batch import IGNORE_INDEX, Batch, Documents
from vla_foundry.models.base import count_valid_targets
from vla_foundry.models.registry import register_batch_handler
from vla_foundry.params.experiment import TrainExperimentParams


@register_batch_handler("transformer")
@register_batch_handler("transformer_hf")
class TextBatchHandler:
    """Rows of T + 1 tokens -> T inputs and the T tokens that follow them."""

    def __init__(self, params: TrainExperimentParams) -> None:
        self.z_loss_coefficient = params.hparams.z_loss_coefficient

    def prepare(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        """Return input_ids, targets [B, T] (IGNORE_INDEX where not supervised), documents, z_loss_coefficient."""
        tokens: Tensor = batch["input_ids"]
        documents: Documents | None = batch.get("documents")
        if documents is not None and documents.is_padding.any():
            # what padding holds is unspecified, and might not be a row of the embedding
            is_padding = np.repeat(documents.is_padding, documents.lengths).reshape(tuple(tokens.shape))
            tokens = tokens.masked_fill(torch.from_numpy(is_padding), 0)
        targets = tokens[:, 1:].long().masked_fill(~batch["target_mask"][:, 1:], IGNORE_INDEX)
        return {
            "input_ids": tokens[:, :-1].contiguous().to(device, non_blocking=True),
            "targets": targets.to(device, non_blocking=True),
            "documents": None if documents is None else documents.trimmed(tokens.shape[1] - 1),
            "z_loss_coefficient": self.z_loss_coefficient,
        }

    def count_targets(self, inputs: dict[str, Any]) -> Tensor:
        """The number of supervised tokens."""
        return count_valid_targets(inputs["targets"])
