"""Draws that are a function of (seed, position, purpose): never of what was drawn before, or in which process."""

import hashlib
from functools import lru_cache

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@lru_cache(maxsize=1024)
def create_key(seed: int, purpose: str) -> int:
    """Return the 64 bits that all draws of a seed for a purpose start from."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """Scramble 64 bits (the finalizer of SplitMix64, a bijection)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _draw_words(count: int, *, seed: int, position: int, purpose: str) -> list[int]:
    """Return `count` words of 64 random bits; in Python, because numpy's generators take longer to set up."""
    start = _mix((create_key(seed, purpose) + _GOLDEN * (position + 1)) & _MASK)
    return [_mix((start + _GOLDEN * number) & _MASK) for number in range(1, count + 1)]


def draw_uniforms(count: int, *, seed: int, position: int, purpose: str) -> np.ndarray:
    """Return `count` numbers in [0, 1), float64 [count]; a larger `count` only appends to a smaller one.

    Args:
        seed: of the run.
        position: of the sample in the plan, or the number of the step.
        purpose: what the draw is for; draws for different purposes are independent.
    """
    words = _draw_words(count, seed=seed, position=position, purpose=purpose)
    return np.array([(word >> 11) * 2.0**-53 for word in words])


def draw_index(bound: int, *, seed: int, position: int, purpose: str) -> int:
    """Return an integer in 0 .. bound - 1, each as likely."""
    return _draw_words(1, seed=seed, position=position, purpose=purpose)[0] * bound >> 64
