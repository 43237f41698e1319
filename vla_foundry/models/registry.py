"""The registry of models and batch handlers by `model.type`; importing this file does not import torch."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from vla_foundry.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vla_foundry.batch import Batch
    from vla_foundry.params.experiment import TrainExperimentParams
    from vla_foundry.params.models.roles import ModelParams


@runtime_checkable
class BatchHandler(Protocol):
    """Turns a batch (see batch.py) into the model's forward arguments."""

    def prepare(self, batch: "Batch", device: "torch.device | str") -> dict[str, Any]:
        """Return forward's keyword arguments on `device`, without synchronising."""
        ...

    def count_targets(self, inputs: dict[str, Any]) -> "Tensor":
        """Count the valid targets of prepared inputs; returns a scalar on their device."""
        ...


H = TypeVar("H", bound="Callable[[TrainExperimentParams], BatchHandler]")

MODELS: "Registry[Callable[..., nn.Module]]" = Registry(
    "model.type", package="vla_foundry.models", decorator="register_model"
)
BATCH_HANDLERS: "Registry[Callable[[TrainExperimentParams], BatchHandler]]" = Registry(
    "batch handler of model.type", package="vla_foundry.models", decorator="register_batch_handler"
)


def register_model(name: str) -> "Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]":
    """Register a factory `(params, load_pretrained=True) -> nn.Module` as the model called `name`.

    The factory builds the module and, if `load_pretrained`, loads any published weights that its params name.
    `create_model` handles `resume_from_checkpoint`, `freeze` and `lora`.
    """
    return MODELS.register(name)


def register_batch_handler(name: str) -> "Callable[[H], H]":
    """Register the batch handler of the model called `name`: a factory that takes the root params."""
    return BATCH_HANDLERS.register(name)


def create_model(params: "ModelParams", load_pretrained: bool = True) -> "nn.Module":
    """Build the model that `params` describe, on torch's default device.

    Args:
        params: params of any registered model.
        load_pretrained: false: initialise new weights and ignore checkpoints and published weights. Use it for a model
            whose weights are loaded later, or that is built on the meta device.

    Raises:
        ValueError: the type is not registered, or a checkpoint does not fit.
        FileNotFoundError: the checkpoint does not exist.
    """
    factory = MODELS.get(params.type)
    checkpoint = params.resume_from_checkpoint if load_pretrained else None
    model: Any = factory(params, load_pretrained=load_pretrained and checkpoint is None)
    if not hasattr(model, "state_dict"):
        raise ValueError(f"model.type '{params.type}': its factory returned {type(model).__name__}, not a module.")
    if checkpoint is not None:
        from vla_foundry.models.weights import load_model_checkpoint

        load_model_checkpoint(model, checkpoint)
    if params.freeze:
        model.requires_grad_(False)
    if params.lora is not None:
        from vla_foundry.models.layers import add_adapters

        add_adapters(model, params.lora)
    return model


def create_batch_handler(params: "TrainExperimentParams") -> "BatchHandler":
    """Build the batch handler of the model in `params`: its own, or else the one of its kind.

    Raises:
        ValueError: there is neither.
    """
    name = params.model.type
    if name not in BATCH_HANDLERS.names():
        if params.model.batch_handler is None:
            raise ValueError(
                f"model.type '{name}' has no batch handler, so it cannot be trained. Register one with "
                f"@register_batch_handler('{name}'), or derive its params from LanguageModelParams, VLMParams or "
                "RobotPolicyParams."
            )
        name = params.model.batch_handler
    return BATCH_HANDLERS.get(name)(params)


def list_blocks(model: "nn.Module") -> "list[nn.Module]":
    """Return the blocks that are sharded, compiled and checkpointed one by one.

    They are what its method `blocks` returns, or else the members of its outermost module lists.
    """
    from torch import nn

    own: Any = getattr(model, "blocks", None)
    if own is not None and not isinstance(own, nn.Module):
        return own()
    blocks: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList) and parent not in inner:
            blocks += parent
            inner.update(part for block in parent for part in block.modules())
    return list(dict.fromkeys(blocks))


def count_flops_per_token(model: "nn.Module", seq_len: int) -> float:
    """Return the FLOPs of a training step per token.

    They are what its method `num_flops_per_token` returns, or else 6 for each trained matrix weight outside embeddings.
    """
    from torch import nn

    own: Any = getattr(model, "num_flops_per_token", None)
    if own is not None:
        return own(seq_len)
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    matrices = (p for p in model.parameters() if p.ndim >= 2 and p.requires_grad and id(p) not in tables)
    return 6.0 * sum(matrix.numel() for matrix in matrices)


def save_model_files(model: "nn.Module", folder: Path) -> None:
    """Write what a model needs beside its params and weights to be reloaded; most models need nothing."""
    save: Any = getattr(model, "save_files", None)
    if save is not None:
        save(folder)


def create_natively(cls: "Callable[[Any], Any]", params: Any) -> Any:
    """Build a model from `params` on torch's default device and initialise its weights.

    It is built on the meta device first, because torch would initialise weights that `init_weights` then replaces. A
    model without this method keeps torch's own initial weights.
    """
    import torch

    device = torch.get_default_device()
    with torch.device("meta"):
        model = cls(params)
    if not hasattr(model, "init_weights"):
        return cls(params)
    if device.type != "meta":
        model.to_empty(device=device)
        model.init_weights()
    return model
