"""Success rates and their differences for a fixed number of rollouts: posteriors, exact intervals and tests.

For tests that may be looked at while rollouts come in, see comparison/sequential.py.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import stats
from scipy.special import gammaln

from vla_foundry.evaluation.results import SuccessRate, wilson_interval

# rates with unlike numbers of rollouts are rounded to multiples of its inverse
_LATTICE = 4000


def beta_posterior(num_successes: int, num_trials: int) -> tuple[float, float]:
    """Return the parameters of the Beta distribution of a success rate, given a uniform prior."""
    assert 0 <= num_successes <= num_trials, (num_successes, num_trials)
    return 1.0 + num_successes, 1.0 + num_trials - num_successes


def credible_interval(num_successes: int, num_trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the equal-tailed interval of the posterior."""
    low, high = stats.beta(*beta_posterior(num_successes, num_trials)).interval(confidence)
    return float(low), float(high)


def posterior_density(parameters: tuple[float, float], rates: np.ndarray) -> np.ndarray:
    """Return the density of a Beta distribution at success rates, of their shape."""
    return stats.beta.pdf(rates, *parameters)


def macro_posterior(rates: Sequence[SuccessRate]) -> tuple[float, float]:
    """Return the Beta distribution with the mean and variance of the mean of independent posteriors, one per task.

    Every task counts alike, whatever its number of rollouts. The tasks share the weight of one uniform prior: one for
    each would draw the mean of many tasks to 50%, so far that a rate near 0 or 1 falls out of its own interval.
    """
    a = np.array([rate.num_successes for rate in rates]) + 1 / len(rates)
    b = np.array([rate.num_trials - rate.num_successes for rate in rates]) + 1 / len(rates)
    mean = float(np.mean(a / (a + b)))
    variance = float(np.sum(a * b / (a + b) ** 2 / (a + b + 1))) / len(rates) ** 2
    strength = mean * (1 - mean) / variance - 1
    return mean * strength, (1 - mean) * strength


def clopper_pearson(num_successes: int, num_trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a success rate (Clopper and Pearson 1934); (0, 1) without trials."""
    assert 0 <= num_successes <= num_trials, (num_successes, num_trials)
    tail, num_failures = (1 - confidence) / 2, num_trials - num_successes
    low = stats.beta.ppf(tail, num_successes, num_failures + 1) if num_successes else 0.0
    high = stats.beta.ppf(1 - tail, num_successes + 1, num_failures) if num_failures else 1.0
    return float(low), float(high)


def difference_interval(first: SuccessRate, second: SuccessRate, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the second rate minus the first (Newcombe 1998, method 10, from Wilson intervals)."""
    if not first.num_trials or not second.num_trials:
        return -1.0, 1.0
    (low0, high0), (low1, high1) = (
        wilson_interval(rate.num_successes, rate.num_trials, confidence=confidence) for rate in (first, second)
    )
    p0, p1 = first.num_successes / first.num_trials, second.num_successes / second.num_trials
    return p1 - p0 - math.hypot(p1 - low1, high0 - p0), p1 - p0 + math.hypot(high1 - p1, p0 - low0)


def boschloo_p_value(first: SuccessRate, second: SuccessRate) -> float:
    """Return the two-sided p-value of Boschloo's exact test that two success rates are equal.

    It is twice the smaller one-sided p-value. Each is the largest probability, over all rates p0 = p1, of a table whose
    p-value by Fisher's test is at most that of the table found (Boschloo 1970); it is never larger than Fisher's.
    """
    sizes = (first.num_trials, second.num_trials)
    if not all(sizes):
        return 1.0
    ordering, found = _fisher(*sizes), (first.num_successes, second.num_successes)
    flipped = sizes[0] - found[0], sizes[1] - found[1]
    return min(1.0, 2 * min(_worst_case(ordering, *found), _worst_case(ordering, *flipped)))


@lru_cache(maxsize=32)
def _fisher(num0: int, num1: int) -> np.ndarray:
    """Return Fisher's p-value, one-sided for p0 < p1, of each table (num0 + 1, num1 + 1)."""
    counts = [gammaln(n + 1) - gammaln(np.arange(n + 1) + 1) - gammaln(n - np.arange(n + 1) + 1) for n in (num0, num1)]
    total = np.add.outer(np.arange(num0 + 1), np.arange(num1 + 1))
    ways = gammaln(num0 + num1 + 1) - gammaln(total + 1) - gammaln(num0 + num1 - total + 1)
    p_values = np.exp(np.add.outer(*counts) - ways)
    # of one sum of successes, all tables with a larger s1
    for s0 in range(1, num0 + 1):
        p_values[s0, :-1] += p_values[s0 - 1, 1:]
    return p_values


def _worst_case(ordering: np.ndarray, s0: int, s1: int) -> float:
    # equal p-values may differ in their last bits; for each s0 the tables with the largest s1 count
    first = (ordering > ordering[s0, s1] * (1 + 1e-9)).sum(axis=1)
    num0, num1 = (size - 1 for size in ordering.shape)
    return float((_binomial(num0)[0] * _binomial(num1)[1][:, first]).sum(axis=1).max())


@lru_cache(maxsize=32)
def _binomial(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, at many success rates, the probability of each count, and of at least each count 0 .. num + 1."""
    rates = np.sin(np.linspace(0, np.pi / 2, 1025)) ** 2
    pmf = stats.binom.pmf(np.arange(num + 1), num, rates[:, None])
    tails = np.cumsum(pmf[:, ::-1], axis=1)[:, ::-1]
    return pmf, np.concatenate([tails, np.zeros((len(rates), 1))], axis=1)


def stratified_p_value(first: Sequence[SuccessRate], second: Sequence[SuccessRate]) -> float:
    """Return the two-sided p-value that the mean success rate over tasks is equal, given the successes of each task.

    The statistic is the difference of the macro means. Its distribution is exact if the rates are equal in every task:
    given the sum of successes, those of one policy follow the hypergeometric distribution, independently of other
    tasks. It is wider, and the test conservative, if only the means are equal.
    """
    tasks = [(a, b) for a, b in zip(first, second, strict=True) if a.num_trials and b.num_trials]
    # a lattice of differences; rounding to it moves the sum by less than the margin
    scale = math.lcm(*(n for a, b in tasks for n in (a.num_trials, b.num_trials)))
    scale = scale if scale * len(tasks) <= 100_000 else _LATTICE
    total = np.ones(1)
    offset = found = 0
    for a, b in tasks:
        summed = a.num_successes + b.num_successes
        lows = np.arange(max(0, summed - a.num_trials), min(b.num_trials, summed) + 1)
        moves = np.rint(scale * (lows / b.num_trials - (summed - lows) / a.num_trials)).astype(int)
        pmf = np.zeros(moves[-1] - moves[0] + 1)
        pmf[moves - moves[0]] = stats.hypergeom.pmf(lows, a.num_trials + b.num_trials, summed, b.num_trials)
        total = np.convolve(total, pmf) if len(pmf) * len(total) < 1e7 else _fft_convolve(total, pmf)
        offset += int(moves[0])
        found += int(moves[b.num_successes - lows[0]])
    margin = len(tasks) if scale == _LATTICE else 0
    place = found - offset
    above, below = total[max(0, place - margin) :].sum(), total[: max(0, place + margin + 1)].sum()
    return float(min(1.0, 2 * min(above, below)))


def _fft_convolve(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    from scipy.signal import fftconvolve

    return np.maximum(fftconvolve(first, second), 0)


def holm(p_values: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Return which hypotheses are rejected with a family-wise error of at most alpha (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    rejected = [False] * len(p_values)
    for rank, number in enumerate(order):
        if p_values[number] > alpha / (len(p_values) - rank):
            break
        rejected[number] = True
    return rejected
