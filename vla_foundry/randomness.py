"""Draws that are a function of (seed, position, purpose): never of what was drawn before, or in which process."""

import hashlib
from functools import lru_cache

import numpy as np

_MASK = (1 << 64) - 1


@lru_cache(maxsize=1024)
def _hash_purpose(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def _draw_words(count: int, *, seed: int, position: int, purpose: str) -> np.ndarray:
    """Return `count` words of 64 random bits from the Philox stream of this key and counter."""
    stream = np.random.Philox(key=[seed & _MASK, _hash_purpose(purpose)], counter=[0, 0, position & _MASK, 0])
    return stream.random_raw(count)


def draw_uniforms(count: int, *, seed: int, position: int, purpose: str) -> np.ndarray:
    """Return `count` numbers in [0, 1), float64 [count]; a larger `count` only appends to a smaller one.

    Args:
        seed: of the run.
        position: of the sample in the plan, or the number of the step.
        purpose: what the draw is for; draws for different purposes are independent.
    """
    return (_draw_words(count, seed=seed, position=position, purpose=purpose) >> np.uint64(11)) * 2.0**-53


def draw_index(bound: int, *, seed: int, position: int, purpose: str) -> int:
    """Return an integer in 0 .. bound - 1, each as likely."""
    return int(_draw_words(1, seed=seed, position=position, purpose=purpose)[0]) * bound >> 64
