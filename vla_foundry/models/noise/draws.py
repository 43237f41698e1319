"""Draws on a device that are a function of (seed, sample, purpose): never of the batch, the rank or what came before.

The same words as randomness.py, vectorised: sample s draws word n = 1, 2, ... as mix(start_s + n * golden), with
start_s = mix(key(seed, purpose) + golden * (s + 1)) and SplitMix64's finalizer as mix, all modulo 2^64.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_foundry.randomness import FACTORS, GOLDEN, create_key


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(GOLDEN)
_FACTORS = tuple(map(_signed, FACTORS))


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FACTORS[0]
    value = (value ^ _shift(value, 27)) * _FACTORS[1]
    return value ^ _shift(value, 31)


def draw_words(samples: Int[Tensor, " S"], count: int, *, seed: int, purpose: str) -> Int[Tensor, "S {count}"]:
    """Return `count` words of 64 random bits for each sample."""
    start = _mix((samples.long() + 1) * _GOLDEN + _signed(create_key(seed, purpose)))
    numbers = torch.arange(1, count + 1, device=samples.device) * _GOLDEN
    return _mix(start[:, None] + numbers)


def draw_uniforms(samples: Int[Tensor, " S"], count: int, *, seed: int, purpose: str) -> Float[Tensor, "S {count}"]:
    """Return numbers in [0, 1) for each sample, fp32; a larger `count` only appends to a smaller one."""
    return _shift(draw_words(samples, count, seed=seed, purpose=purpose), 40).float() * 2.0**-24


def draw_normals(
    samples: Int[Tensor, " S"], shape: Sequence[int], *, seed: int, purpose: str
) -> Float[Tensor, "S *shape"]:
    """Return standard normal numbers of `shape` for each sample, fp32 (Box and Muller 1958); |x| < 5.9."""
    count = math.prod(shape)
    words = draw_words(samples, -(-count // 2), seed=seed, purpose=purpose)
    # 24 bits each, from the two halves of a word; the first never 0
    first = (_shift(words, 40).float() + 0.5) * 2.0**-24
    second = ((words >> 8) & 0xFFFFFF).float() * (2.0**-24 * 2 * math.pi)
    radius = (-2 * first.log()).sqrt()
    pairs = torch.stack((radius * second.cos(), radius * second.sin()), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape)
