"""Draws depend on their key alone."""

import numpy as np

from vla_foundry.randomness import draw_below, draw_index, draw_uniforms, hash_int, hash_ints


def test_a_draw_is_a_function_of_its_key() -> None:
    first = draw_uniforms(5, seed=1, position=7, purpose="crop")
    draw_uniforms(3, seed=1, position=8, purpose="crop")
    np.testing.assert_array_equal(first, draw_uniforms(5, seed=1, position=7, purpose="crop"))
    # these numbers are part of every run that resumes: a change of them is a change of the data
    np.testing.assert_array_equal(first[:2], [0.84918366947868, 0.49280833824004766])


def test_seed_position_and_purpose_each_change_the_draw() -> None:
    draws = [
        draw_uniforms(4, seed=seed, position=position, purpose=purpose)
        for seed in (0, 1, -1)
        for position in (0, 1, 2**40)
        for purpose in ("crop", "prompt")
    ]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_more_draws_only_append() -> None:
    np.testing.assert_array_equal(
        draw_uniforms(9, seed=3, position=4, purpose="a")[:4], draw_uniforms(4, seed=3, position=4, purpose="a")
    )


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    draws = np.concatenate([draw_uniforms(4, seed=0, position=position, purpose="a") for position in range(5000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    # 2000 each, standard deviation 42
    assert abs(counts - 2000).max() < 210


def test_index_is_below_its_bound_and_each_as_likely() -> None:
    counts = np.bincount([draw_index(3, seed=5, position=position, purpose="a") for position in range(3000)])
    assert len(counts) == 3
    assert abs(counts - 1000).max() < 130


def test_large_seeds_that_differ_in_their_last_bit_draw_differently() -> None:
    draws = {draw_uniforms(1, seed=seed, position=0, purpose="noise")[0] for seed in range(2**64 - 4, 2**64)}
    assert len(draws) == 4


def test_vector_hash_equals_scalar_hash() -> None:
    assert hash_ints(hash_int(5, 6), np.asarray([9, 10])).tolist() == [hash_int(5, 6, 9), hash_int(5, 6, 10)]


def test_draws_cover_their_range_evenly() -> None:
    draws = draw_below(hash_ints(1, np.arange(30_000)), 3)
    counts = np.bincount(draws.astype(np.int64), minlength=4)
    assert counts[3] == 0
    assert (abs(counts[:3] - 10_000) < 400).all()
