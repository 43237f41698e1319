"""Models, their losses and batch handlers; importing this package does not import torch."""

from typing import TYPE_CHECKING

from vla_foundry.models.registry import create_batch_handler, create_model, register_batch_handler, register_model
from vla_foundry.registry import import_lazily

if TYPE_CHECKING:
    from vla_foundry.models.weights import load_model_checkpoint

__all__ = [
    "create_batch_handler",
    "create_model",
    "load_model_checkpoint",
    "register_batch_handler",
    "register_model",
]

__getattr__, __dir__ = import_lazily(__name__, {"load_model_checkpoint": "vla_foundry.models.weights"})
