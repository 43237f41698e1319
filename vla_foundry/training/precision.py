"""What `hparams.precision` means: how parameters are kept, and what the forward pass computes in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def cast_parameters(model: nn.Module, precision: str) -> None:
    """Give parameters the precision they are kept in, in place: fp32, but for pure_bf16 and fp64.

    Buffers keep theirs (tables of rotary frequencies need fp32), but for fp64, where all of them follow.
    """
    if precision == "fp64":
        model.double()
    elif precision == "pure_bf16":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    else:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()


def autocast(precision: str, device: str) -> AbstractContextManager[object]:
    """Compute in bf16 inside this context, if the precision asks for it."""
    if precision in ("amp_bfloat16", "pure_bf16"):
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()
