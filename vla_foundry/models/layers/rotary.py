"""Rotary position embedding (Su et al. 2021, in GPT-NeoX's half rotation), from fp32 tables made once per model."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Rotation(NamedTuple):
    """The angles of a batch of tokens."""

    # (T, 1, K/2), or (B, T, 1, K/2) where rows differ
    cos: Float[Tensor, "... 1 half"]
    sin: Float[Tensor, "... 1 half"]
    # rotate in fp32 whatever the dtype of queries and keys
    in_float32: bool


class RotaryTables(nn.Module):
    """cos and sin of position x frequency, for positions 0 .. max_seq_len - 1 and frequencies theta^(-2i/K).

    The tables stay fp32 in a model that is cast to another dtype (bf16 tables are off by up to 0.86 at position 2047),
    and are made again whenever the module is moved, so that a model made on the meta device gets them with its memory.
    They are no part of a checkpoint.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, *, max_seq_len: int, theta: float, bf16_frequencies: bool, rotate_in_float32: bool
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.theta = theta
        # Parity with checkpoints that were trained in bf16 by a codebase that rounded the frequencies to bf16 (each is
        # off by up to 0.4%, so far positions turn by visibly other angles). New models have no use for it.
        self.bf16_frequencies = bf16_frequencies
        self.rotate_in_float32 = rotate_in_float32
        self.register_buffer("cos", torch.empty(max_seq_len, head_dim // 2, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty_like(self.cos), persistent=False)
        self._fill(self.cos.device)

    def forward(self, positions: Int[Tensor, "B T"] | int) -> Rotation:
        """The angles at `positions`, or at 0 .. positions - 1 where it is one number for all rows."""
        if isinstance(positions, int):
            cos, sin = self.cos[:positions], self.sin[:positions]
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        return Rotation(cos.unsqueeze(-2), sin.unsqueeze(-2), self.rotate_in_float32)

    def _fill(self, device: torch.device) -> None:
        if device.type == "meta":
            return
        # on the CPU and in fp64, so that every device has the same tables, correct to the last bit of fp32
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
        frequencies = self.theta**-exponents
        if self.bf16_frequencies:
            frequencies = frequencies.to(torch.bfloat16).double()
        positions = torch.arange(self.max_seq_len, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * frequencies
        self.cos = angles.cos().float().to(device)
        self.sin = angles.sin().float().to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryTables":
        super()._apply(fn, recurse)
        self._fill(self.cos.device)
        return self


def rotate(x: Float[Tensor, "B T H K"], rotation: Rotation) -> Float[Tensor, "B T H K"]:
    """Turn each pair (x[i], x[i + K/2]) by its angle."""
    dtype = torch.promote_types(x.dtype, torch.float32) if rotation.in_float32 else x.dtype
    cos, sin = rotation.cos.to(dtype), rotation.sin.to(dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
