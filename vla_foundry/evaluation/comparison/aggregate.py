"""Compare two policies over all tasks: the difference of their macro means, tested while rollouts come in.

The macro mean is the mean of the success rates of the tasks. Its test is a group-sequential one: the difference over
its standard error, estimated within each task (stratified) and, for equal seeds, from pairs, is looked at after each
20th of the planned rollouts. Under the null hypothesis it moves as Brownian motion does; by the share u of the
rollouts at most alpha u^4 of the error is spent (Kim and DeMets 1987), so that hardly any power is lost against one
look at the end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vla_foundry.evaluation.comparison.sequential import Decision

NUM_LOOKS = 20
_EXPONENT = 4
# before this look too few rollouts estimate the standard error
_FIRST_LOOK = 3
_MIN_ROLLOUTS = 10


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Successes (bool) of two policies on one task, in the order of the rollouts (paired: by seeds, of one length)."""

    outcomes: tuple[np.ndarray, np.ndarray]
    # rollouts planned for each policy
    n_max: int


def macro_difference(strata: Sequence[Stratum], *, is_paired: bool) -> tuple[float, float]:
    """Return the difference of the macro means, policy 1 minus policy 0, and its standard error, with all data."""
    means, variances = zip(*(estimate_difference(*each.outcomes, is_paired=is_paired) for each in strata), strict=True)
    return float(np.mean(means)), math.sqrt(sum(variances)) / len(strata)


@dataclass(frozen=True, kw_only=True)
class AggregatePath:
    """The standardised difference of the macro means at each look that is reached."""

    looks: tuple[int, ...]
    values: tuple[float, ...]
    # rollouts of each policy over all tasks
    stops: tuple[int, ...]

    def decide(self, alpha: float) -> Decision:
        """Run the two-sided test at a level; more rollouts never take a decision back."""
        limits = boundaries(alpha / 2)
        for look, value, stop in zip(self.looks, self.values, self.stops, strict=True):
            if abs(value) >= limits[look]:
                return Decision(better=int(value > 0), stop=stop)
        return Decision(better=None, stop=self.stops[-1] if self.stops else 0)


def follow_aggregate(strata: Sequence[Stratum], *, is_paired: bool) -> AggregatePath:
    """Compute the statistic of the aggregate test at each look.

    A look is reached when every task has its share of both policies' rollouts.
    """
    looks = np.arange(_FIRST_LOOK, NUM_LOOKS + 1)
    sizes = np.array([stratum.n_max * looks // NUM_LOOKS for stratum in strata])
    there = np.array([min(map(len, stratum.outcomes)) for stratum in strata])
    is_reached = (sizes <= there[:, None]).all(axis=0) & (sizes > 0).all(axis=0) & (sizes.sum(axis=0) >= _MIN_ROLLOUTS)
    looks, sizes = looks[is_reached], sizes[:, is_reached]
    total, variance = np.zeros(len(looks)), np.zeros(len(looks))
    for stratum, each in zip(strata, sizes, strict=True):
        difference, error = _differences(*stratum.outcomes, each, each, is_paired)
        total += difference
        variance += error
    values = total / np.sqrt(np.maximum(variance, 1e-300))
    stops = sizes.sum(axis=0)
    return AggregatePath(looks=tuple(looks.tolist()), values=tuple(values.tolist()), stops=tuple(stops.tolist()))


def estimate_difference(first: np.ndarray, second: np.ndarray, *, is_paired: bool) -> tuple[float, float]:
    """Return the difference of two rates, policy 1 minus policy 0, and its variance.

    A pseudo-count keeps the variance from 0 (Agresti and Caffo 2000; paired: Agresti and Min 2005).
    """
    difference, variance = _differences(first, second, np.array([len(first)]), np.array([len(second)]), is_paired)
    return float(difference[0]), float(variance[0])


def _differences(
    first: np.ndarray, second: np.ndarray, num0: np.ndarray, num1: np.ndarray, is_paired: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return differences and variances of the first num0 and num1 outcomes (paired: num0 of both)."""
    if is_paired:
        differences = second.astype(int) - first
        net, unequal = np.cumsum(differences)[num0 - 1], np.cumsum(np.abs(differences))[num0 - 1]
        return net / num0, ((unequal + 1) / (num0 + 2) - (net / (num0 + 2)) ** 2) / num0
    count0, count1 = np.cumsum(first)[num0 - 1], np.cumsum(second)[num1 - 1]
    rate0, rate1 = (count0 + 1) / (num0 + 2), (count1 + 1) / (num1 + 2)
    return count1 / num1 - count0 / num0, rate0 * (1 - rate0) / num0 + rate1 * (1 - rate1) / num1


# where the distribution of the standardised sum is computed
_GRID = np.linspace(-8, 8, 401)
_WIDTH = _GRID[1] - _GRID[0]


@lru_cache(maxsize=NUM_LOOKS)
def _transitions(look: int) -> np.ndarray:
    """Return the density of the standardised sum at a look, given that at the look before, (after, before)."""
    step = math.sqrt(1 / look)
    moves = np.exp(-(((_GRID[:, None] - math.sqrt((look - 1) / look) * _GRID) / step) ** 2) / 2)
    return moves * (_WIDTH / step / math.sqrt(2 * math.pi))


@lru_cache(maxsize=256)
def boundaries(alpha: float) -> tuple[float, ...]:
    """Return the limit of the standardised difference at each look 0 .. NUM_LOOKS, one-sided at level alpha.

    Found by integrating the distribution of the sum of independent normal steps that have not crossed a limit before.
    """
    limits = [math.inf] * _FIRST_LOOK
    density, spent = np.exp(-(_GRID**2) / 2) / math.sqrt(2 * math.pi), 0.0
    for look in range(_FIRST_LOOK, NUM_LOOKS + 1):
        if look > _FIRST_LOOK:
            density = _transitions(look) @ density
        share = alpha * (look / NUM_LOOKS) ** _EXPONENT - spent
        # the tail above the lower end of each cell
        tail = np.cumsum(density[::-1])[::-1] * _WIDTH
        place = int(np.searchsorted(-tail, -share))
        around = [place, place - 1]
        limit = float(np.interp(math.log(share), np.log(tail[around]), _GRID[around] - _WIDTH / 2))
        limits.append(limit)
        spent += share
        density = density * np.clip((limit - _GRID) / _WIDTH + 0.5, 0, 1)
    return tuple(limits)
