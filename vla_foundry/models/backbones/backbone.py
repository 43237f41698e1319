"""The backbone base class and the registries of backbones and of the functions that prepare their inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_foundry.batch import Batch
from vla_foundry.models.batch_handlers import to_device
from vla_foundry.models.weights import load_part_checkpoint
from vla_foundry.params.models.backbones import BackboneParams
from vla_foundry.registry import Registry


class Conditioning(NamedTuple):
    """A backbone's output for B samples."""

    # (B, K, C)
    tokens: Tensor
    # bool (B, K), True where a token is visible; None: all visible
    mask: Tensor | None = None


class Backbone(nn.Module):
    """Encodes observations: `forward` takes the output of its observation function and returns Conditioning.

    A base class, not a protocol: since Python 3.12 a protocol's isinstance check does not see submodules.
    """

    # the wrapped model; the backbone can start from its checkpoints
    model: Any
    # name of that model within larger models' checkpoints
    part_name: str
    # width of its tokens
    conditioning_dim: int

    def blocks(self) -> list[nn.Module]:
        """Return the modules that activation checkpointing, compilation and sharding wrap."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Give every parameter its initial value."""
        raise NotImplementedError

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of forward and backward per token, for rows of `seq_len` tokens."""
        raise NotImplementedError


# (params, load_pretrained) -> backbone; create_backbone handles checkpoints and freezing
BackboneFactory = Callable[..., Backbone]
# (params, batch of modality "robotics" with or without actions, device) -> keyword arguments of forward
PrepareObservation = Callable[[Any, Batch, torch.device | str], dict[str, Any]]

_PATH = "model.vision_language_backbone"
BACKBONES: "Registry[BackboneFactory]" = Registry(
    f"{_PATH}.type", package="vla_foundry.models", decorator="register_backbone"
)
OBSERVATIONS: "Registry[PrepareObservation]" = Registry(
    f"{_PATH}.type", package="vla_foundry.models", decorator="register_observation"
)


def register_backbone(name: str) -> Callable[[BackboneFactory], BackboneFactory]:
    """Register a factory `(params, load_pretrained=True) -> backbone` as the backbone called `name`."""
    return BACKBONES.register(name)


def register_observation(name: str) -> Callable[[PrepareObservation], PrepareObservation]:
    """Register the function that prepares batches for backbone `name`; it must not synchronise with the device."""
    return OBSERVATIONS.register(name)


def create_backbone(params: BackboneParams, load_pretrained: bool = True) -> Backbone:
    """Build the backbone; if `load_pretrained`, load its checkpoint or its published weights.

    Raises:
        ValueError: the type is not registered, or the checkpoint does not fit.
        FileNotFoundError: the checkpoint does not exist.
    """
    checkpoint = params.resume_from_checkpoint if load_pretrained else None
    backbone = BACKBONES.get(params.type)(params, load_pretrained=load_pretrained and checkpoint is None)
    if checkpoint is not None:
        load_part_checkpoint(backbone.model, checkpoint, part=backbone.part_name, path=_PATH)
    if params.freeze:
        backbone.requires_grad_(False)
    return backbone


def read_image_mask(batch: Batch, device: torch.device | str) -> Tensor | None:
    """Return `image_mask` on the device, or None if no image is missing."""
    image_mask: Tensor | None = batch.get("image_mask")
    return None if image_mask is None or image_mask.all() else to_device(image_mask, device)
