"""Draw counter-based random numbers: each depends only on its key, never on earlier draws or on the process.

All draws use SplitMix64, integer arithmetic modulo 2**64, so every machine gets the same numbers. `hash_int` and
`hash_ints` give the data order; `draw_uniforms` and `draw_index` give a sample's draws. models/action_heads/noise.py
draws the same words on the device.
"""

import hashlib
from functools import lru_cache

import numpy as np

_MASK = (1 << 64) - 1
# SplitMix64: the increment of its counter, and the factors of its finalizer
GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix(value: int) -> int:
    """Scramble 64 bits (the finalizer of SplitMix64, a bijection)."""
    value = ((value ^ (value >> 30)) * FACTORS[0]) & _MASK
    value = ((value ^ (value >> 27)) * FACTORS[1]) & _MASK
    return value ^ (value >> 31)


def hash_int(*parts: int) -> int:
    """Hash integers to 64 bits; the scalar twin of `hash_ints`."""
    state = 0
    for part in parts:
        state = mix((state + GOLDEN + part) & _MASK)
    return state


def hash_ints(key: int | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Extend hashes by one part each: `hash_ints(hash_int(a), [b])` is `[hash_int(a, b)]`.

    Args:
        key: uint64 scalar or array that broadcasts against `values`.
        values: integers of any shape.

    Returns:
        uint64 hashes of the broadcast shape.
    """
    state = values.astype(np.uint64) + (np.asarray(key, np.uint64) + np.uint64(GOLDEN))
    state ^= state >> np.uint64(30)
    state *= np.uint64(FACTORS[0])
    state ^= state >> np.uint64(27)
    state *= np.uint64(FACTORS[1])
    state ^= state >> np.uint64(31)
    return state


def draw_below(hashes: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Map 64-bit hashes evenly to integers in 0 .. bound - 1; `bound` is below 2**32."""
    return ((hashes >> np.uint64(32)) * np.asarray(bound, np.uint64)) >> np.uint64(32)


@lru_cache(maxsize=1024)
def create_key(seed: int, purpose: str) -> int:
    """Return the 64-bit key for all draws with this seed and purpose."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "little")


def _draw_words(count: int, *, seed: int, position: int, purpose: str) -> list[int]:
    """Return `count` words of 64 random bits; in Python, because NumPy's generators take longer to set up."""
    start = mix((create_key(seed, purpose) + GOLDEN * (position + 1)) & _MASK)
    return [mix((start + GOLDEN * number) & _MASK) for number in range(1, count + 1)]


def draw_uniforms(count: int, *, seed: int, position: int, purpose: str) -> np.ndarray:
    """Return `count` numbers in [0, 1), float64 [count]; a larger `count` only appends to a smaller one.

    Args:
        seed: seed of the run.
        position: position of the sample in the plan, or the step number.
        purpose: purpose of the draw; draws for different purposes are independent.
    """
    words = _draw_words(count, seed=seed, position=position, purpose=purpose)
    return np.array([(word >> 11) * 2.0**-53 for word in words])


def draw_index(bound: int, *, seed: int, position: int, purpose: str) -> int:
    """Return an integer in 0 .. bound - 1, all equally likely."""
    return _draw_words(1, seed=seed, position=position, purpose=purpose)[0] * bound >> 64
