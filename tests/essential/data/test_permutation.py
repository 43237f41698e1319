"""Keyed permutations and hashes."""

from collections import Counter

import numpy as np
import pytest

from vla_foundry.data.permutation import draw_below, hash_int, hash_ints, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 31, 1000, 4097, 65_536])
def test_permutation_is_a_bijection(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_every_order_of_four_is_about_equally_likely() -> None:
    num_keys = 24_000
    keys = hash_ints(7, np.arange(num_keys))
    orders = np.stack([permute(np.full(num_keys, index), 4, keys) for index in range(4)], axis=1)
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 24
    assert all(850 < count < 1150 for count in counts.values())  # mean 1000, standard deviation 31


def test_neighbours_do_not_stay_together() -> None:
    order = permute(np.arange(50_000), 50_000, 3)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(50_000), order)[0, 1]) < 0.02


def test_sizes_and_keys_may_differ_per_index() -> None:
    sizes, keys = np.asarray([5, 9, 1000]), np.asarray([3, 4, 5])
    together = permute(np.asarray([2, 2, 2]), sizes, keys)
    assert together.tolist() == [permute(np.asarray([2]), int(s), int(k))[0] for s, k in zip(sizes, keys, strict=True)]


def test_vector_hash_equals_scalar_hash() -> None:
    assert hash_ints(hash_int(5, 6), np.asarray([9, 10])).tolist() == [hash_int(5, 6, 9), hash_int(5, 6, 10)]


def test_hash_never_changes() -> None:
    # the order of every run hangs on these numbers
    assert hash_int(42, 1) == 0xFA4F945599F9054A
    assert permute(np.arange(6), 1000, 1).tolist() == [784, 523, 749, 6, 470, 584]


def test_draws_cover_their_range_evenly() -> None:
    draws = draw_below(hash_ints(1, np.arange(30_000)), 3)
    counts = np.bincount(draws.astype(np.int64), minlength=4)
    assert counts[3] == 0
    assert (abs(counts[:3] - 10_000) < 400).all()
