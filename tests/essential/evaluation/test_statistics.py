"""Intervals, posteriors and tests for a fixed number of rollouts."""

import itertools

import numpy as np
import pytest
from scipy import stats

from vla_foundry.evaluation.comparison.published import find_published
from vla_foundry.evaluation.results import SuccessRate
from vla_foundry.evaluation.statistics import (
    beta_posterior,
    boschloo_p_value,
    clopper_pearson,
    credible_interval,
    difference_interval,
    holm,
    macro_posterior,
    posterior_density,
    stratified_p_value,
)


def rate(num_successes: int, num_trials: int) -> SuccessRate:
    return SuccessRate(num_successes=num_successes, num_trials=num_trials)


def test_credible_intervals_are_the_published_ones() -> None:
    for successes, trials, low, high in [(2654, 3200, 81.6, 84.2), (90, 600, 12.4, 18.1), (2, 600, 0.1, 1.2)]:
        assert np.round(100 * np.array(credible_interval(successes, trials)), 1).tolist() == [low, high]


def test_clopper_pearson_covers_the_rate_at_least_as_often_as_it_says() -> None:
    intervals = [clopper_pearson(successes, 20) for successes in range(21)]
    assert clopper_pearson(0, 0) == (0, 1)
    assert (intervals[0][0], intervals[20][1]) == (0, 1)
    for p in np.linspace(0.01, 0.99, 49):
        covered = [low <= p <= high for low, high in intervals]
        assert stats.binom.pmf(np.arange(21), 20, p)[covered].sum() >= 0.95
    exact = stats.binomtest(7, 20).proportion_ci(0.9, method="exact")
    assert clopper_pearson(7, 20, confidence=0.9) == pytest.approx((exact.low, exact.high))


def test_the_macro_posterior_has_the_moments_of_the_mean_over_tasks() -> None:
    rates = [rate(3, 10), rate(49, 50), rate(0, 5)]
    a, b = macro_posterior(rates)
    generator = np.random.default_rng(0)
    # a third of a uniform prior each
    posteriors = [(1 / 3 + found.num_successes, 1 / 3 + found.num_trials - found.num_successes) for found in rates]
    draws = np.mean([generator.beta(*parameters, 200_000) for parameters in posteriors], axis=0)
    assert stats.beta(a, b).mean() == pytest.approx(np.mean([10 / 32, 148 / 152, 1 / 17]))
    assert stats.beta(a, b).std() == pytest.approx(draws.std(), rel=0.01)
    grid = np.linspace(0, 1, 2001)
    assert np.trapezoid(posterior_density((a, b), grid), grid) == pytest.approx(1, abs=1e-6)
    # 16 uniform priors would put the mean's interval above the mean
    low, high = stats.beta(*macro_posterior([rate(0, 200)] * 14 + [rate(10, 200), rate(21, 200)])).interval(0.95)
    assert (low, high) == (pytest.approx(0.007, abs=5e-4), pytest.approx(0.0135, abs=5e-4))
    assert macro_posterior([rate(3, 10)]) == pytest.approx(beta_posterior(3, 10))


def test_boschloo_agrees_with_an_independent_implementation_and_with_fisher() -> None:
    for first, second in [((7, 12), (1, 13)), ((3, 20), (9, 17)), ((0, 10), (4, 10))]:
        table = [[first[0], second[0]], [first[1] - first[0], second[1] - second[0]]]
        expected = 2 * min(stats.boschloo_exact(table, alternative=side, n=64).pvalue for side in ("less", "greater"))
        p = boschloo_p_value(rate(*first), rate(*second))
        assert p == pytest.approx(expected, rel=0.02)
        assert p == pytest.approx(boschloo_p_value(rate(*second), rate(*first)), rel=1e-6)
    assert boschloo_p_value(rate(5, 9), rate(5, 9)) == 1
    assert boschloo_p_value(rate(0, 0), rate(5, 9)) == 1
    # StackPlates of LBM-MT and CS Qwen3VLA-2.1B; Fisher's p-value is 0.164
    assert 0.14 < boschloo_p_value(rate(175, 200), rate(164, 200)) < 0.164


@pytest.mark.parametrize(("num0", "num1"), [(8, 8), (12, 7)])
def test_boschloo_never_errs_more_often_than_alpha(num0: int, num1: int) -> None:
    tables = list(itertools.product(range(num0 + 1), range(num1 + 1)))
    rejected = [boschloo_p_value(rate(s0, num0), rate(s1, num1)) <= 0.05 for s0, s1 in tables]
    for p in np.linspace(0.01, 0.99, 33):
        weights = [stats.binom.pmf(s0, num0, p) * stats.binom.pmf(s1, num1, p) for s0, s1 in tables]
        assert np.dot(weights, rejected) <= 0.05 + 1e-9


def test_the_stratified_test_is_the_convolution_of_hypergeometric_distributions() -> None:
    first, second = [rate(2, 5), rate(3, 4)], [rate(5, 5), rate(3, 4)]
    chances = [{s: stats.hypergeom.pmf(s, 10, 7, 5) for s in range(2, 6)}]
    chances += [{s: stats.hypergeom.pmf(s, 8, 6, 4) for s in range(2, 5)}]
    outcomes = [
        ((2 * a - 7) / 5 + (2 * b - 6) / 4, chances[0][a] * chances[1][b]) for a, b in itertools.product(*chances)
    ]
    tail = sum(weight for difference, weight in outcomes if difference >= 3 / 5 - 1e-9)
    assert stratified_p_value(first, second) == pytest.approx(2 * tail)


def test_the_stratified_test_holds_its_level_where_rates_differ_but_not_their_mean() -> None:
    generator = np.random.default_rng(3)
    p0, p1, num, found = np.array([0.1, 0.5, 0.9, 0.5]), np.array([0.5, 0.5, 0.5, 0.5]), 40, []
    for _ in range(200):
        s0, s1 = generator.binomial(num, p0), generator.binomial(num, p1)
        found.append(stratified_p_value([rate(int(s), num) for s in s0], [rate(int(s), num) for s in s1]) <= 0.05)
    assert np.mean(found) <= 0.05


def test_a_published_pair_has_the_p_value_of_the_stratified_z_test() -> None:
    multi, single = find_published("CS/LBM-MT"), find_published("CS/LBM-ST")
    p = stratified_p_value([multi[task].rate for task in multi], [single[task].rate for task in multi])
    assert p == pytest.approx(0.034, abs=0.006)


def test_unequal_numbers_of_rollouts_are_compared_by_rates() -> None:
    exact = stratified_p_value([rate(30, 97), rate(40, 101)], [rate(50, 89), rate(60, 103)])
    assert exact == pytest.approx(
        stratified_p_value([rate(31, 100), rate(40, 100)], [rate(56, 100), rate(58, 100)]), rel=0.7
    )
    assert exact < 0.001


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998, table II, example (a): 56/70 - 48/80
    assert difference_interval(rate(48, 80), rate(56, 70)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference_interval(rate(0, 0), rate(1, 1)) == (-1, 1)


def test_holm_rejects_step_by_step() -> None:
    assert holm([0.04, 0.01, 0.02, 0.6]) == [False, True, False, False]
    assert holm([0.01, 0.02, 0.03]) == [True, True, True]
    assert holm([]) == []
