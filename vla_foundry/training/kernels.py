"""Optional kernels of a run: matrix products in 8-bit floats (`hparams.fp8`, torchao), and FlashAttention 3."""

import logging
from typing import Any

import torch
import torch.nn.attention
from torch import nn

from vla_foundry.models.layers import LoRALinear

# what fp8's kernels take
_MULTIPLE, _LEAST_CAPABILITY = 16, (8, 9)


def use_float8_products(blocks: list[nn.Module], device: str) -> None:
    """Let the linear layers of blocks multiply in fp8, forward and backward, in place.

    Before each product, inputs and weights are scaled to the range of e4m3 and gradients to that of e5m2, each tensor
    by its largest value. Weights, their names and the optimizer do not change. Layers keep bf16 if a width is not a
    multiple of 16, or if an adapter is added to them.

    Args:
        blocks: of bf16 weights in their forward pass.

    Raises:
        ValueError: torchao is missing, the GPU has no fp8, or no layer fits.
    """
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        raise ValueError(
            f"hparams.fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper), but "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}. "
            "Leave it out."
        )
    log = logging.getLogger("torch.utils._pytree")
    level = log.level
    log.setLevel(logging.ERROR)  # torchao registers constants in an older way
    try:
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError as error:
        raise ValueError(f"hparams.fp8 needs torchao ({error}): uv pip install 'vla-foundry[fp8]'.") from error
    finally:
        log.setLevel(level)
    modules = [module for block in blocks for module in block.modules()]
    adapters = {part for module in modules if isinstance(module, LoRALinear) for part in module.modules()}
    fitting = {
        module
        for module in modules
        # subclasses compute something else
        if type(module) is nn.Linear
        and module not in adapters
        and not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)
    }
    if not fitting:
        raise ValueError(
            "hparams.fp8: no linear layer in the model's blocks has widths that are multiples of 16. Leave it out."
        )
    # the number of tokens is the inner size of a weight's gradient, and need not be a multiple of 16
    config = Float8LinearConfig(pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=lambda module, name: module in fitting)


def use_flash_attention_3(device: str) -> None:
    """Let attention in bf16 run in FlashAttention 3 in this process, through torch, in place of FlashAttention 2.

    Raises:
        ValueError: the GPU, torch or the kernels' package does not have it.
    """
    is_hopper = device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] == 9
    if not is_hopper:
        raise ValueError(
            f"hparams.flash_attention_3 needs a GPU of compute capability 9 (Hopper), but the device is '{device}'. "
            "Leave it out."
        )
    # newer than the oldest torch that we support
    activate: Any = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise ValueError(f"hparams.flash_attention_3 needs a newer torch than {torch.__version__}. Leave it out.")
    try:
        activate("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"hparams.flash_attention_3 needs the package flash_attn_interface of FlashAttention 3: {error}. "
            "Install it, or leave the option out."
        ) from error
