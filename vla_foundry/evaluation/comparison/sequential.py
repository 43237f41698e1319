"""STEP: a test of two success rates that may be looked at after every pair of rollouts (Snyder et al. 2025).

The null hypothesis is p0 = p1; one side of the test rejects it for p0 < p1. After t rollouts of each policy the state
is (x, y), the successes of each. The number of rollouts n_max is fixed in advance, and with it the risk budget: under
the null hypothesis, whatever p0 = p1 is, at most alpha (t - d + 1) / (n_max - d + 1) of all runs may have been
rejected by time t, where d = max(4, floor(log2 n_max) + 1); none is rejected up to time d. At each t a linear program
rejects as many states as the budget allows, with a probability each; (x, y) and (t - y, t - x) are treated alike.

The probability of a state is w p^s (1 - p)^(2t - s), where s = x + y, and w counts the ways that lead there without a
rejection. It depends on p through s only, which makes the programs small: of the states at one s, those with the
fewest ways come first.

Paired rollouts start at the same seeds. Their state counts the pairs in which one policy alone succeeded, its
probability is w q^s (1 - 2q)^(t - s), and the null hypothesis is that either policy is the one with probability q.

The tables in step_tables.npz were made by `python -m vla_foundry.evaluation.comparison.sequential`.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from vla_foundry.randomness import create_key, hash_ints
from vla_foundry.storage.uri import write_bytes

# tables take memory and time as its square
MAX_ROLLOUTS = 500
SHIPPED = Path(__file__).with_name("step_tables.npz")


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTable:
    """One side of the test: when it rejects p0 = p1 for p0 < p1 (paired: for more pairs in which only 1 succeeded)."""

    n_max: int
    # least upper bound of the error of this side
    alpha: Fraction
    is_paired: bool
    # (n_max + 1, n_max + 1): at time t and state (x, y) it rejects if y >= first[t, x]
    first: np.ndarray
    # (E, 3): t, x, y of states in which it rejects with a probability between 0 and 1; and these probabilities (E,)
    states: np.ndarray
    chances: np.ndarray

    def rejections(self, t: int) -> np.ndarray:
        """Return the probability to reject in state (x, y) at time t, (t + 1, t + 1)."""
        ys = np.arange(t + 1)
        chance = (ys[None] >= self.first[t, : t + 1, None]).astype(float)
        here = self.states[:, 0] == t
        chance[self.states[here, 1], self.states[here, 2]] = self.chances[here]
        return chance

    @cached_property
    def randomised(self) -> tuple[np.ndarray, np.ndarray]:
        """The states in which a draw decides, as sorted numbers (512 t + x) 512 + y, and their probabilities."""
        t, x, y = self.states.astype(np.int64).T
        keys = (t * 512 + x) * 512 + y
        order = np.argsort(keys)
        # with an end, so that every search finds a place
        return np.append(keys[order], 2**62), np.append(self.chances[order], 0)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a test found."""

    # the policy that is better, 0 or 1; None: not decided
    better: int | None
    # rollouts of each policy up to the decision, or all that there were
    stop: int


def dead_time(n_max: int) -> int:
    """Return the number of first rollouts after which nothing is decided."""
    return max(4, n_max.bit_length())


def as_fraction(alpha: float | Fraction) -> Fraction:
    """Return alpha as the fraction that was meant: 1 - 0.95 is 1/20."""
    exact = Fraction(alpha)
    return alpha if isinstance(alpha, Fraction) else exact.limit_denominator(1_000_000) or exact


def make_table(n_max: int, alpha: float | Fraction, *, is_paired: bool = False) -> StepTable:
    """Make one side of a test; n_max = 200 takes seconds.

    Raises:
        ValueError: n_max or alpha is out of range, or SciPy is not installed.
    """
    if not dead_time(max(n_max, 1)) < n_max <= MAX_ROLLOUTS:
        raise ValueError(
            f"A sequential test needs 5 to {MAX_ROLLOUTS} rollouts of each policy (max_sample_size), not {n_max}."
        )
    alpha = as_fraction(alpha)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}.")
    points = _points(n_max, is_paired, refinement=4)
    if find_spec("scipy") is None:
        raise ValueError(
            f"A sequential test of {n_max} rollouts at alpha {alpha} has no table yet, and making it needs scipy, "
            "which is not installed: uv pip install 'vla-foundry[evaluation]'"
        )
    # between the points of the programs the risk is a little higher
    target = 0.9998 * float(alpha)
    while True:
        table = _pack(n_max, alpha, is_paired, _solve(n_max, target, is_paired))
        worst = one_sided_errors(table, points).max()
        if worst <= alpha:
            return table
        target *= 0.9999 * float(alpha) / worst


def _points(n_max: int, is_paired: bool, *, refinement: int = 1) -> np.ndarray:
    """Return null rates, 128 or a fixed part of a standard error apart: p up to 1/2, or q."""
    num = refinement * max(128, int(np.ceil(9 * np.sqrt(n_max))))
    shares = np.sin(np.linspace(0, np.pi / (2 if is_paired else 4), num + 1)[1:]) ** 2
    # a symmetric test has the same risk at p and 1 - p; paired, a share 2q of the pairs differs
    return shares / 2 if is_paired else shares


def _advance(ways: np.ndarray, same: float, one: float, two: float, both: float) -> np.ndarray:
    """Return the weights of states after one more pair: neither count, the first, the second or both grow."""
    after = same * ways
    after[1:] += one * ways[:-1]
    after[:, 1:] += two * ways[:, :-1]
    after[1:, 1:] += both * ways[:-1, :-1]
    return after


def _solve(n_max: int, alpha: float, is_paired: bool) -> dict[int, np.ndarray]:
    """Return the probability to reject in each state at each time, {t: (t + 1, t + 1)}."""
    points = _points(n_max, is_paired)
    dead = dead_time(n_max)
    per_step = alpha / (n_max - dead + 1)
    risk = np.zeros(len(points))
    ways = _no_ways(n_max)
    chances = {}
    for t in range(1, n_max + 1):
        ways = _add_ways(ways, is_paired)
        if t > dead:
            slack = np.maximum(per_step * (t - dead + 1) - risk, 0)
            kernel = _kernel(t, points, is_paired)
            inner = ways[: t + 1, : t + 1]
            chances[t] = _solve_step(inner, kernel, slack / per_step, per_step, is_paired)
            risk += kernel @ _reject(inner, chances[t], kernel.shape[1])
    return chances


def one_sided_errors(table: StepTable, points: np.ndarray) -> np.ndarray:
    """Compute exactly how often one side alone rejects at null rates: p0 = p1 = point (paired: q = point)."""
    risk = np.zeros(len(points))
    ways = _no_ways(table.n_max)
    for t in range(1, table.n_max + 1):
        ways = _add_ways(ways, table.is_paired)
        if t > dead_time(table.n_max):
            kernel = _kernel(t, points, table.is_paired)
            risk += kernel @ _reject(ways[: t + 1, : t + 1], table.rejections(t), kernel.shape[1])
    return risk


def _no_ways(n_max: int) -> np.ndarray:
    ways = np.zeros((n_max + 1, n_max + 1))
    ways[0, 0] = 1
    return ways


def _add_ways(ways: np.ndarray, is_paired: bool) -> np.ndarray:
    # as probabilities if all ways of a step are equally likely, which keeps them within range
    return _advance(ways, 1 / 3, 1 / 3, 1 / 3, 0.0) if is_paired else _advance(ways, *[1 / 4] * 4)


def _reject(ways: np.ndarray, chance: np.ndarray, num_levels: int) -> np.ndarray:
    """Take the rejected ways out of `ways`; return their sum at each level x + y."""
    xs, ys = np.nonzero(chance * ways)
    rejected = ways[xs, ys] * chance[xs, ys]
    ways[xs, ys] -= rejected
    return np.bincount(xs + ys, rejected, num_levels)


def _kernel(t: int, points: np.ndarray, is_paired: bool) -> np.ndarray:
    """Return the probability of a way of t steps to level s relative to equally likely steps, (points, levels)."""
    levels = np.arange(t + 1 if is_paired else 2 * t + 1)
    rest = np.maximum(1 - (2 * points if is_paired else points), 1e-300)
    exponent = levels * np.log(points)[:, None] + (levels[-1] - levels) * np.log(rest)[:, None]
    return np.exp(exponent + t * np.log(3 if is_paired else 4))


def _solve_step(ways: np.ndarray, kernel: np.ndarray, slack: np.ndarray, unit: float, is_paired: bool) -> np.ndarray:
    """Choose which states to reject at one time: as many as the slack of the budget (in units) allows."""
    from scipy.optimize import linprog

    t = len(ways) - 1
    chance = np.zeros_like(ways)
    states, costs = [], []
    for level in range(1, t + 1):
        cost = kernel[:, level] if is_paired or level == t else kernel[:, level] + kernel[:, 2 * t - level]
        xs = np.arange(max(0, level - t), (level + 1) // 2)
        weights = ways[xs, level - xs]
        spent = np.zeros(len(slack))
        for number in np.argsort(weights, kind="stable"):
            x, weight = int(xs[number]), weights[number]
            # states that are never reached cost nothing; what is dearer than the whole slack can only be a last one
            if weight == 0:
                chance[x, level - x] = 1
            elif (spent > slack).any():
                break
            else:
                states.append((x, level - x))
                costs.append(cost * (weight / unit))
                spent += costs[-1]
    if states:
        worth = [1 if is_paired or x + y == t else 2 for x, y in states]
        found = linprog(-np.array(worth), A_ub=np.array(costs).T, b_ub=slack, bounds=(0, 1), method="highs")
        assert found.success, found.message
        chance[tuple(np.array(states).T)] = np.clip(found.x, 0, 1)
    if is_paired:
        chance[np.add.outer(range(t + 1), range(t + 1)) > t] = 1
    else:
        chance = np.maximum(chance, chance[::-1, ::-1].T)
    return chance


def _pack(n_max: int, alpha: Fraction, is_paired: bool, chances: dict[int, np.ndarray]) -> StepTable:
    first = np.full((n_max + 1, n_max + 1), n_max + 1, np.int16)
    states, randomised = [], []
    for t, chance in chances.items():
        chance = np.where(chance < 1e-6, 0, np.where(chance > 1 - 1e-9, 1, chance))
        # from the last state that is not rejected for sure
        below = np.where(chance < 1, np.arange(t + 1), -1).max(axis=1)
        first[t, : t + 1] = np.where(below == t, n_max + 1, below + 1)
        xs, ys = np.nonzero(chance * (np.arange(t + 1) < first[t, : t + 1, None]))
        states += [(t, x, y) for x, y in zip(xs, ys, strict=True)]
        randomised += list(chance[xs, ys].astype(np.float32))
    return StepTable(
        n_max=n_max,
        alpha=alpha,
        is_paired=is_paired,
        first=first,
        states=np.array(states, np.int16).reshape(-1, 3),
        chances=np.array(randomised, np.float32),
    )


def error_rates(table: StepTable, p0: float, p1: float | None = None) -> tuple[float, float, float]:
    """Compute exactly what the two-sided test, made of two copies of one side, does.

    Args:
        p0: success rate of policy 0 (paired: probability that only policy 0 succeeds); p1: likewise; None: as p0.

    Returns:
        The probabilities that policy 1 and policy 0 are found better, and the expected number of rollouts of each.
    """
    p1 = p0 if p1 is None else p1
    steps = (
        (1 - p0 - p1, p0, p1, 0.0) if table.is_paired else ((1 - p0) * (1 - p1), p0 * (1 - p1), (1 - p0) * p1, p0 * p1)
    )
    weights = np.zeros((table.n_max + 1, table.n_max + 1))
    weights[0, 0] = 1
    found, expected = [0.0, 0.0], 0.0
    for t in range(1, table.n_max + 1):
        expected += weights.sum()
        weights = _advance(weights, *steps)
        if t > dead_time(table.n_max):
            chance = table.rejections(t)
            inner = weights[: t + 1, : t + 1]
            ones, zeros = inner * np.triu(chance, 1), inner * np.triu(chance, 1).T
            found = [found[0] + ones.sum(), found[1] + zeros.sum()]
            inner -= ones + zeros
    return float(found[0]), float(found[1]), float(expected)


def run_test(table: StepTable, outcomes: Sequence[Sequence[bool]], *, seed: int, purpose: str) -> Decision:
    """Run the two-sided test, whose error is at most twice the table's alpha, on the outcomes that there are.

    Args:
        outcomes: successes of policies 0 and 1 in the order of the rollouts; of different lengths, the shorter counts
            (paired: one length, by seeds). More than n_max are not looked at.
        seed: seed of the draws that decide in a few states.
        purpose: name of the comparison; others have draws of their own.

    Returns:
        The same for a prefix of the outcomes, unless it is not decided there.
    """
    num = min(len(outcomes[0]), len(outcomes[1]), table.n_max)
    first, second = (np.asarray(each[:num], bool)[None] for each in outcomes)
    better, stop = run_tests(table, first, second, np.array([num]), draws=draw_decisions([purpose], table.n_max, seed))
    return Decision(better=None if better[0] < 0 else int(better[0]), stop=int(stop[0]))


def run_tests(
    table: StepTable, first: np.ndarray, second: np.ndarray, nums: np.ndarray, *, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Run the test on many pairs of policies at once.

    Args:
        first: successes (bool) of policy 0 in the order of the rollouts, (pairs, N); second: of policy 1.
        nums: rollouts that there are of each pair, (pairs,); what lies behind is not looked at.
        draws: numbers in [0, 1), (pairs, at least N).

    Returns:
        The better policy, 0 or 1 (-1: not decided), and the rollouts that it took or that there are, (pairs,) each.
    """
    num = min(first.shape[1], table.n_max)
    counts = [first[:, :num].astype(np.int32), second[:, :num].astype(np.int32)]
    if table.is_paired:
        # only pairs that differ count
        counts = [counts[0] * (1 - counts[1]), counts[1] * (1 - counts[0])]
    counts = [np.cumsum(each, axis=1) for each in counts]
    t = np.arange(1, num + 1)
    low, high = np.minimum(*counts), np.maximum(*counts)
    keys, chances = table.randomised
    code = (t * 512 + low) * 512 + high
    place = np.searchsorted(keys, code)
    chance = np.where(keys[place] == code, chances[place], 0)
    rejects = (low < high) & ((high >= table.first[t, low]) | (draws[:, :num] < chance)) & (t <= nums[:, None])
    decided = rejects.any(axis=1)
    place = np.argmax(rejects, axis=1) if num else np.zeros(len(first), int)
    rows = np.arange(len(first))
    is_one = counts[1][rows, place] > counts[0][rows, place] if num else decided
    return np.where(decided, is_one.astype(int), -1), np.where(decided, place + 1, np.minimum(nums, table.n_max))


def draw_decisions(purposes: Sequence[str], num: int, seed: int) -> np.ndarray:
    """Return the draws of comparisons with these names, (purposes, num)."""
    keys = np.array([create_key(seed, f"STEP: {purpose}") for purpose in purposes], np.uint64)
    return (hash_ints(keys[:, None], np.arange(num)) >> np.uint64(11)).astype(float) * 2.0**-53


@lru_cache(maxsize=256)
def find_table(n_max: int, alpha: Fraction, *, is_paired: bool = False) -> StepTable:
    """Return a table that ships with the package or that this user made before; else make it and keep it.

    Raises:
        ValueError: n_max or alpha is out of range.
    """
    name = f"{'paired' if is_paired else 'step'}-{n_max}-{alpha.numerator}-{alpha.denominator}"
    own = _cache_folder() / f"{name}.npz"
    for path in (SHIPPED, own):
        if table := _read_table(path, name, n_max, alpha, is_paired):
            return table
    table = make_table(n_max, alpha, is_paired=is_paired)
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
        write_tables(own, [table])
    except OSError:
        # it is made again next time
        pass
    return table


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla-foundry" / "step"


def write_tables(path: Path, tables: Iterable[StepTable]) -> None:
    """Write tables to one file."""
    arrays = {}
    for table in tables:
        kind = "paired" if table.is_paired else "step"
        name = f"{kind}-{table.n_max}-{table.alpha.numerator}-{table.alpha.denominator}"
        # the other half mirrors it
        kept = table.states[:, 1] + table.states[:, 2] <= table.states[:, 0]
        arrays[f"{name}/first"] = table.first
        arrays[f"{name}/states"], arrays[f"{name}/chances"] = table.states[kept], table.chances[kept]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(str(path), buffer.getvalue())


def _read_table(path: Path, name: str, n_max: int, alpha: Fraction, is_paired: bool) -> StepTable | None:
    """Read one table; None if the file does not hold it, or is broken."""
    try:
        # opened here: NumPy leaves a broken file open
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if f"{name}/first" not in file:
                return None
            first, states, chances = (file[f"{name}/{part}"] for part in ("first", "states", "chances"))
    except (OSError, EOFError, TypeError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    if first.shape != (n_max + 1, n_max + 1) or states.shape != (len(chances), 3) or chances.dtype != np.float32:
        return None
    if not is_paired:
        inner = states[:, 1] + states[:, 2] < states[:, 0]
        t, x, y = states[inner].T
        states = np.concatenate([states, np.stack([t, t - y, t - x], axis=1)])
        chances = np.concatenate([chances, chances[inner]])
    return StepTable(n_max=n_max, alpha=alpha, is_paired=is_paired, first=first, states=states, chances=chances)


# numbers of comparisons whose share of an error of 5% has a table: all pairs of 2 to 12, 16 and 21 policies
SIZES = (1, 2, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66, 120, 210)


def main() -> None:
    """Make the tables that ship with the package."""
    tables = []
    for n_max in (20, 50, 100, 200):
        tables += [make_table(n_max, Fraction(1, 40 * size)) for size in SIZES]
        tables += [make_table(n_max, Fraction(1, 40), is_paired=True)]
    # the one-sided test whose states are published
    tables += [make_table(200, Fraction(1, 20))]
    write_tables(SHIPPED, tables)


if __name__ == "__main__":
    main()
