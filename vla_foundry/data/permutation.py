"""Keyed hashes and permutations of 0 .. n - 1 that need no memory: the source of all order and all draws in the data.

Everything is integer arithmetic modulo 2**64, so that every machine gives the same numbers.
"""

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB
# fewer rounds leave visible patterns among the orders of small domains
_ROUND_KEYS = np.arange(1, 13, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93)


def hash_int(*parts: int) -> int:
    """Hash integers to one of 64 bits, scalar twin of `hash_ints`."""
    state = 0
    for part in parts:
        state = (state + _GOLDEN + part) & _MASK
        state = ((state ^ (state >> 30)) * _FACTOR_1) & _MASK
        state = ((state ^ (state >> 27)) * _FACTOR_2) & _MASK
        state ^= state >> 31
    return state


def hash_ints(key: int | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Extend hashes by one part each: `hash_ints(hash_int(a), [b])` is `[hash_int(a, b)]`.

    Args:
        key: uint64 scalar or array that broadcasts against `values`.
        values: integers of any shape.

    Returns:
        uint64 hashes of the broadcast shape.
    """
    state = values.astype(np.uint64) + (np.asarray(key, np.uint64) + np.uint64(_GOLDEN))
    state ^= state >> np.uint64(30)
    state *= np.uint64(_FACTOR_1)
    state ^= state >> np.uint64(27)
    state *= np.uint64(_FACTOR_2)
    state ^= state >> np.uint64(31)
    return state


def draw_below(hashes: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Map 64-bit hashes to integers in 0 .. bound - 1, evenly; `bound` below 2**32."""
    return ((hashes >> np.uint64(32)) * np.asarray(bound, np.uint64)) >> np.uint64(32)


def permute(indices: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Return where a keyed permutation of 0 .. size - 1 sends each index.

    A Feistel network over a rectangle that just covers the domain; what lands outside it is sent on until it is back
    inside (about one index in sqrt(size)).

    Args:
        indices: int64 [n], each in 0 .. size - 1.
        size: size of the domain, below 2**62; one for all or one per index.
        key: 64-bit key; one for all or one per index.

    Returns:
        int64 [n]; for one size and key, a bijection.
    """
    size = np.broadcast_to(np.asarray(size, np.uint64), indices.shape)
    key = np.broadcast_to(np.asarray(key, np.uint64), indices.shape)
    result = _feistel(indices.astype(np.uint64), size, key)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], size[outside], key[outside])
        outside = outside[result[outside] >= size[outside]]
    return result.astype(np.int64)


def _feistel(indices: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permute the cells of a rectangle of width x height >= size, row by row."""
    width = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    height = (size + width - np.uint64(1)) // width
    left, right = np.divmod(indices, width)  # left < height, right < width
    for round_number in range(len(_ROUND_KEYS)):
        round_key = key + _ROUND_KEYS[round_number]
        if round_number % 2 == 0:
            left = (left + draw_below(hash_ints(round_key, right), height)) % height
        else:
            right = (right + draw_below(hash_ints(round_key, left), width)) % width
    return left * width + right
