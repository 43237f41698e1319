"""What the policy expects of a backbone, and the registries of backbones and of what prepares their inputs."""

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
    """What a backbone makes of the observations of B samples."""

    # (B, K, C)
    tokens: Tensor
    # bool (B, K), True where a token may be seen; None: everywhere
    mask: Tensor | None = None


class Backbone(nn.Module):
    """Encodes observations: `forward` takes what its observation function gives, and returns Conditioning.

    A base class, not a protocol: since Python 3.12 a protocol's isinstance check does not see submodules.
    """

    # the model that it wraps, whose checkpoints it can start from
    model: Any
    # what that model is called within larger models' checkpoints
    part_name: str
    # width of its tokens
    conditioning_dim: int

    def blocks(self) -> list[nn.Module]:
        """Return the units that activation checkpointing, compilation and sharding wrap."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Give every parameter its initial value."""
        raise NotImplementedError

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the operations of forward and backward per token of a row of `seq_len` tokens."""
        raise NotImplementedError


# (params, load_pretrained) -> backbone; checkpoints and freezing are dealt with by create_backbone
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
    """Register the function that prepares a batch for the backbone called `name`; nothing may wait for the device."""
    return OBSERVATIONS.register(name)


def create_backbone(params: BackboneParams, load_pretrained: bool = True) -> Backbone:
    """Build the backbone, with the weights of its checkpoint, or published ones, if `load_pretrained` is true.

    Raises:
        ValueError: the type is not registered, or the checkpoint does not fit.
        FileNotFoundError: there is no such checkpoint.
    """
    checkpoint = params.resume_from_checkpoint if load_pretrained else None
    backbone = BACKBONES.get(params.type)(params, load_pretrained=load_pretrained and checkpoint is None)
    if checkpoint is not None:
        load_part_checkpoint(backbone.model, checkpoint, part=backbone.part_name, path=_PATH)
    if params.freeze:
        backbone.requires_grad_(False)
    return backbone


def read_image_mask(batch: Batch, device: torch.device | str) -> Tensor | None:
    """Return `image_mask` on the device, or None where every image is there."""
    image_mask: Tensor | None = batch.get("image_mask")
    return None if image_mask is None or image_mask.all() else to_device(image_mask, device)
