"""The test of the mean over tasks keeps its error and loses little power against one look at the end."""

import numpy as np
import pytest
from scipy import stats

from vla_foundry.evaluation.comparison.aggregate import (
    Stratum,
    boundaries,
    estimate_difference,
    follow_aggregate,
    macro_difference,
)


def simulate(
    rates0: np.ndarray, rates1: np.ndarray, n_max: int, *, seed: int, is_paired: bool = False
) -> list[Stratum]:
    generator = np.random.default_rng(seed)
    first, second = generator.random((2, len(rates0), n_max))
    if is_paired:
        # half of the starts are as hard for both
        second = np.where(generator.random(first.shape) < 0.5, first, second)
    return [
        Stratum(outcomes=(a < p0, b < p1), n_max=n_max)
        for a, b, p0, p1 in zip(first, second, rates0, rates1, strict=True)
    ]


def count_decisions(rates0: np.ndarray, rates1: np.ndarray, num: int, n_max: int, *, is_paired: bool = False) -> int:
    strata = (simulate(rates0, rates1, n_max, seed=seed, is_paired=is_paired) for seed in range(num))
    return sum(follow_aggregate(each, is_paired=is_paired).decide(0.05).better is not None for each in strata)


# success rates of two policies on tasks: equal ones, equal means, rare successes, one task
NULLS = {
    "equal": (np.linspace(0.1, 0.9, 8), np.linspace(0.1, 0.9, 8)),
    "equal means": (np.array([0.1, 0.9, 0.5, 0.3]), np.array([0.6, 0.4, 0.2, 0.6])),
    "rare": (np.full(4, 0.01), np.full(4, 0.01)),
    "one": (np.array([0.5]), np.array([0.5])),
}


@pytest.mark.parametrize("is_paired", [False, True])
@pytest.mark.parametrize("null", NULLS)
def test_equal_means_are_told_apart_in_at_most_5_percent(null: str, is_paired: bool) -> None:
    num = 300
    found = count_decisions(*NULLS[null], num, 100, is_paired=is_paired)
    assert found <= stats.binom.ppf(0.999, num, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("null", NULLS)
def test_equal_means_are_told_apart_in_at_most_5_percent_of_many_runs(null: str) -> None:
    num = 4000
    # the normal approximation may be off by half a point
    assert count_decisions(*NULLS[null], num, 100) <= stats.binom.ppf(0.99, num, 0.05)


@pytest.mark.parametrize("alpha", [0.025, 0.025 / 66])
def test_limits_spend_the_error_and_little_power_is_lost(alpha: float) -> None:
    limits = np.array(boundaries(alpha))
    assert (np.diff(limits[3:]) < 0).all()
    assert limits[20] == pytest.approx(stats.norm.isf(alpha), abs=0.25)
    generator = np.random.default_rng(0)
    looks = np.arange(1, 21)
    paths = np.cumsum(generator.normal(size=(50_000, 20)), axis=1) / np.sqrt(looks)
    error = (paths >= limits[1:]).any(axis=1).mean()
    assert error == pytest.approx(alpha, abs=4 * np.sqrt(alpha / len(paths)))
    for power in (0.5, 0.8, 0.9):
        drift = (stats.norm.isf(alpha) + stats.norm.ppf(power)) * np.sqrt(looks / 20)
        assert (paths + drift >= limits[1:]).any(axis=1).mean() >= power - 0.03


def test_more_rollouts_never_take_a_decision_back() -> None:
    strata = simulate(np.full(3, 0.3), np.full(3, 0.7), 60, seed=0)
    whole = follow_aggregate(strata, is_paired=False).decide(0.05)
    assert whole.better == 1
    assert whole.stop < 180
    decided = False
    for num in range(0, 61, 3):
        cut = [Stratum(outcomes=(s.outcomes[0][:num], s.outcomes[1][:num]), n_max=60) for s in strata]
        found = follow_aggregate(cut, is_paired=False).decide(0.05)
        decided |= found.better is not None
        assert (found == whole) if decided else (found.better is None)
    assert decided


def test_the_difference_of_means_uses_all_data_and_pairs_narrow_it() -> None:
    first, second = np.array([True, False, True, False]), np.array([True, True])
    assert estimate_difference(first, second, is_paired=False)[0] == 0.5
    strata = [Stratum(outcomes=(first, second), n_max=4), Stratum(outcomes=(second, second), n_max=4)]
    assert macro_difference(strata, is_paired=False)[0] == 0.25
    rates = np.full(5, 0.5)
    pairs = simulate(rates, rates, 200, seed=1, is_paired=True)
    assert macro_difference(pairs, is_paired=True)[1] < 0.8 * macro_difference(pairs, is_paired=False)[1]


def test_nothing_is_decided_without_rollouts() -> None:
    none = np.zeros(0, bool)
    assert follow_aggregate([Stratum(outcomes=(none, none), n_max=5)], is_paired=False).decide(0.05).better is None
