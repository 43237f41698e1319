"""The sketch: exact while small, within its bound above, whatever it was merged from."""

import numpy as np
import pytest

from vla_foundry.robotics.tdigest import (
    DEFAULT_COMPRESSION,
    Sketch,
    merge_cells,
    merge_sketches,
    rank_error,
    sketch_sorted,
)

FRACTIONS = np.array([0.01, 0.02, 0.05, 0.5, 0.95, 0.98, 0.99])


def sketch_of(values: np.ndarray, max_exact: int = 500) -> Sketch:
    return sketch_sorted(np.sort(values, axis=-1), max_exact=max_exact)


def distribution(name: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    return {
        "normal": lambda: rng.normal(size=size),
        "heavy tails": lambda: rng.standard_cauchy(size=size),
        "two modes": lambda: np.where(rng.random(size) < 0.3, rng.normal(size=size), 9 + rng.normal(size=size)),
        "steps": lambda: rng.integers(0, 4, size).astype(np.float64),
        "far from zero": lambda: 1e6 + rng.random(size),
        "rising": lambda: np.sort(rng.exponential(size=size)),
        "falling": lambda: np.sort(rng.exponential(size=size))[::-1].copy(),
    }[name]()


def rank_errors(estimates: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How far each estimate's rank is from the wanted one, as a share; 0 within a run of equal values."""
    ordered = np.sort(values)
    # a hair around each, because estimates of equal values differ from them by rounding
    slack = 1e-9 * (np.abs(estimates) + 1e-9)
    low = np.searchsorted(ordered, estimates - slack, "left") / len(values)
    high = np.searchsorted(ordered, estimates + slack, "right") / len(values)
    return np.maximum(0, np.maximum(low - FRACTIONS, FRACTIONS - high))


@pytest.mark.parametrize("count", [1, 2, 17, 500])
def test_a_small_sketch_gives_numpys_percentiles(count: int) -> None:
    values = np.random.default_rng(count).normal(size=(6, count))
    found = sketch_of(values).quantiles(FRACTIONS, values.min(axis=1), values.max(axis=1))
    np.testing.assert_allclose(found, np.quantile(values, FRACTIONS, axis=1), atol=1e-12)


def test_small_sketches_merge_to_the_exact_sketch_of_all() -> None:
    values = np.random.default_rng(1).normal(size=(4, 300))
    parts = [sketch_of(values[:, start : start + 50]) for start in range(0, 300, 50)]
    whole = sketch_of(values)
    for order in (parts, parts[::-1]):
        merged = merge_sketches(order, max_exact=500)
        np.testing.assert_array_equal(merged.means, whole.means)
        np.testing.assert_array_equal(merged.weights, whole.weights)


@pytest.mark.parametrize("name", ["normal", "heavy tails", "two modes", "steps", "far from zero", "rising", "falling"])
@pytest.mark.parametrize("grouping", ["one by one", "all at once", "tree"])
def test_large_sketches_stay_within_their_bound_however_they_are_merged(name: str, grouping: str) -> None:
    values = distribution(name, 60_000)
    parts = [sketch_of(values[None, start : start + 1000]) for start in range(0, len(values), 1000)]
    if grouping == "one by one":
        sketch = parts[0]
        for part in parts[1:]:
            sketch = merge_sketches([sketch, part], max_exact=500)
    elif grouping == "all at once":
        sketch = merge_sketches(parts, max_exact=500)
    else:
        while len(parts) > 1:
            parts = [merge_sketches(parts[i : i + 3], max_exact=500) for i in range(0, len(parts), 3)]
        sketch = parts[0]
    assert sketch.counts[0] == len(values)
    assert sketch.means.shape[1] <= DEFAULT_COMPRESSION
    found = sketch.quantiles(FRACTIONS, values.min(keepdims=True), values.max(keepdims=True))[:, 0]
    bounds = np.array([rank_error(q) for q in FRACTIONS])
    assert (rank_errors(found, values) <= bounds).all()


def test_a_thousand_merges_do_not_let_centroids_grow() -> None:
    rng = np.random.default_rng(2)
    sketch = sketch_of(rng.normal(size=(1, 600)))
    for _ in range(1000):
        sketch = merge_sketches([sketch, sketch_of(rng.normal(size=(1, 50)))], max_exact=500)
    share = sketch.weights[0] / sketch.counts[0]
    ends = np.cumsum(share)
    bins = DEFAULT_COMPRESSION // 2
    k = bins * (np.arcsin(np.clip(2 * np.stack([ends - share, ends]) - 1, -1, 1)) / np.pi + 0.5)
    # one unit of k, up to the shift of a centroid since it was formed
    assert (k[1] - k[0]).max() < 1.2
    assert sketch.means.shape[1] <= DEFAULT_COMPRESSION


def test_cells_are_independent_of_their_neighbours() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(5, 3000))
    short = rng.normal(size=(1, 40))
    padded = Sketch(
        np.concatenate([short, np.full((1, 2960), np.inf)], axis=1),
        np.concatenate([np.ones((1, 40)), np.zeros((1, 2960))], axis=1),
    )
    many = Sketch(np.concatenate([values, padded.means]), np.concatenate([np.ones_like(values), padded.weights]))
    merged = merge_sketches([many], max_exact=500)
    alone = merge_sketches([Sketch(values[2:3], np.ones((1, 3000)))], max_exact=500)
    used = merged.weights[2] > 0
    np.testing.assert_array_equal(merged.means[2][used], alone.means[0])
    # the short one is kept value by value
    np.testing.assert_array_equal(merged.means[5][:40], np.sort(short[0]))
    assert merged.counts[5] == 40


def test_cells_without_values_have_quantiles_of_zero() -> None:
    empty = Sketch(np.full((2, 3), np.inf), np.array([[0.0, 0, 0], [1, 1, 1]]))
    empty.means[1] = [1.0, 2.0, 3.0]
    merged = merge_sketches([empty, empty], max_exact=2)
    found = merged.quantiles(np.array([0.5]), np.array([0.0, 1.0]), np.array([0.0, 3.0]))
    np.testing.assert_allclose(found, [[0.0, 2.0]])
    nothing = sketch_sorted(np.empty((2, 0)))
    assert nothing.quantiles(np.array([0.5]), np.zeros(2), np.zeros(2)).tolist() == [[0.0, 0.0]]


def test_time_steps_merge_into_one_cell_per_column() -> None:
    values = np.random.default_rng(4).normal(size=(3, 2, 100))
    merged = merge_cells(sketch_of(values.reshape(6, 100)), 2)
    np.testing.assert_array_equal(merged.means, np.sort(values.swapaxes(0, 1).reshape(2, 300), axis=1))


def test_quantiles_never_leave_the_range_of_the_values() -> None:
    values = np.random.default_rng(5).normal(size=(1, 20_000)) ** 3
    sketch = sketch_of(values)
    found = sketch.quantiles(np.linspace(0, 1, 101), values.min(axis=1), values.max(axis=1))[:, 0]
    assert found[0] == values.min()
    assert found[-1] == values.max()
    assert (np.diff(found) >= 0).all()
