"""Models, their losses and batch handlers; importing this package does not import torch."""

from typing import TYPE_CHECKING, Any

from vla_foundry.models.registry import create_batch_handler, create_model, register_batch_handler, register_model

if TYPE_CHECKING:
    from vla_foundry.models.weights import load_model_checkpoint

__all__ = [
    "create_batch_handler",
    "create_model",
    "load_model_checkpoint",
    "register_batch_handler",
    "register_model",
]


def __getattr__(name: str) -> Any:
    """Import names that need torch on first use."""
    if name == "load_model_checkpoint":
        from vla_foundry.models.weights import load_model_checkpoint

        return load_model_checkpoint
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
