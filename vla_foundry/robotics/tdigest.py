"""Sketch quantiles of many signals at once, mergeably: a t-digest per cell, all cells in one pair of arrays.

A t-digest (Dunning and Ertl 2019, arXiv:1902.04023) keeps a sorted list of centroids (mean, weight), small near the
ends of the distribution and larger in the middle. Here a cell with at most `max_exact` values keeps them all as
centroids of weight 1, so its quantiles are exact (equal to numpy.percentile). Above that, values share a centroid only
if they all lie within one unit of k(q) = B (asin(2q - 1) / pi + 1/2), B = compression / 2. So however often sketches
are merged, a centroid never covers more of the distribution than `rank_error`, and a cell never has more than
`compression` centroids. No loop runs over values or centroids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# centroids of a cell: 0.16% of the distribution in each at the 1st and 99th percentile, 0.8% at the median
DEFAULT_COMPRESSION = 400
# a cell keeps up to this many values exactly
DEFAULT_MAX_EXACT = 4096


@dataclass(frozen=True, eq=False)
class Sketch:
    """Centroids of K cells, sorted by mean within a cell; unused slots have mean inf and weight 0."""

    # (K, M) float64
    means: np.ndarray
    # (K, M) float64; integers unless datasets were weighted
    weights: np.ndarray

    @property
    def counts(self) -> Float[np.ndarray, " K"]:
        """Values (or their weight) in each cell."""
        return self.weights.sum(axis=1)

    def quantiles(
        self,
        q: Float[np.ndarray, " Q"],
        minimum: Float[np.ndarray, " K"],
        maximum: Float[np.ndarray, " K"],
    ) -> Float[np.ndarray, "Q K"]:
        """Return quantiles, linear between centroids and up to the known extremes; 0 for cells without values.

        For cells that hold all their values this is numpy.percentile.

        Args:
            q: within [0, 1].
        """
        counts = self.counts
        if self.means.shape[1] == 0:
            return np.zeros((len(q), len(counts)))
        # rank of each centroid's middle, 0 for the smallest value and count - 1 for the largest
        last_rank = np.maximum(counts - 1, 0)
        ranks = np.clip(np.cumsum(self.weights, axis=1) - (self.weights + 1) / 2, 0, last_rank[:, None])
        ranks[self.weights == 0] = np.inf
        num_used = (self.weights > 0).sum(axis=1)
        cells = np.arange(len(counts))
        result = np.zeros((len(q), len(counts)))
        for row, fraction in enumerate(q):
            target = fraction * last_rank
            below = (ranks <= target[:, None]).sum(axis=1) - 1
            inner = np.clip(below, 0, None)
            above = np.clip(below + 1, None, np.maximum(num_used - 1, 0))
            left_rank = np.where(below < 0, 0.0, ranks[cells, inner])
            left = np.where(below < 0, minimum, self.means[cells, inner])
            is_last = below + 1 >= num_used
            right_rank = np.where(is_last, last_rank, ranks[cells, above])
            right = np.where(is_last, maximum, self.means[cells, above])
            span = right_rank - left_rank
            share = np.divide(target - left_rank, span, out=np.zeros_like(span), where=span > 0)
            values = np.where(share > 0, left + share * (np.where(share > 0, right, left) - left), left)
            result[row] = np.where(counts > 0, values, 0.0)
        return result

    def scaled(self, factor: float) -> "Sketch":
        """Return the same distributions with weights multiplied by `factor`."""
        return Sketch(self.means, self.weights * factor)


def rank_error(q: float, compression: int = DEFAULT_COMPRESSION) -> float:
    """Return the share of the distribution that one centroid may cover around quantile `q`."""
    bins = compression // 2
    k = bins * (np.arcsin(2 * q - 1) / np.pi + 0.5)
    edges = np.clip(np.array([k - 1, k + 1]), 0, bins)
    low, high = (np.sin((edges / bins - 0.5) * np.pi) + 1) / 2
    return float(max(high - q, q - low))


def sketch_sorted(
    values: Float[np.ndarray, "K N"], *, compression: int = DEFAULT_COMPRESSION, max_exact: int = DEFAULT_MAX_EXACT
) -> Sketch:
    """Sketch cells of N values each, sorted along the last axis."""
    num_cells, count = values.shape
    if count <= max_exact:
        return Sketch(values.astype(np.float64), np.ones((num_cells, count)))
    # all cells have the same ranks, so they share one grouping
    groups = _group_numbers(np.arange(1.0, count + 1)[None], np.array([float(count)]), compression)[0]
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    sizes = np.diff(starts, append=count).astype(np.float64)
    means = np.add.reduceat(values, starts, axis=1, dtype=np.float64) / sizes
    return Sketch(means, np.broadcast_to(sizes, means.shape).copy())


def merge_sketches(
    sketches: Sequence[Sketch], *, compression: int = DEFAULT_COMPRESSION, max_exact: int = DEFAULT_MAX_EXACT
) -> Sketch:
    """Merge sketches of the same cells; cells with at most `max_exact` values stay exact."""
    means = np.concatenate([sketch.means for sketch in sketches], axis=1)
    weights = np.concatenate([sketch.weights for sketch in sketches], axis=1)
    return compress_sketch(Sketch(means, weights), compression=compression, max_exact=max_exact)


def merge_cells(
    sketch: Sketch, num_groups: int, *, compression: int = DEFAULT_COMPRESSION, max_exact: int = DEFAULT_MAX_EXACT
) -> Sketch:
    """Merge cells g, g + num_groups, g + 2 num_groups, ... into cell g: (T * C) cells to C."""
    num_cells, width = sketch.means.shape
    shape = (num_cells // num_groups, num_groups, width)
    means = sketch.means.reshape(shape).swapaxes(0, 1).reshape(num_groups, -1)
    weights = sketch.weights.reshape(shape).swapaxes(0, 1).reshape(num_groups, -1)
    return compress_sketch(Sketch(means, weights), compression=compression, max_exact=max_exact)


def compress_sketch(
    sketch: Sketch, *, compression: int = DEFAULT_COMPRESSION, max_exact: int = DEFAULT_MAX_EXACT
) -> Sketch:
    """Sort the centroids of each cell and combine them, in cells of more than `max_exact` values.

    Values are combined only with neighbours within the same unit of k; a centroid that crosses the border between two
    units stays separate. So no centroid grows beyond one unit, and there are at most two per unit.
    """
    if sketch.means.shape[1] == 0:
        return sketch
    if (sketch.weights <= 1).all() and (sketch.weights == np.isfinite(sketch.means)).all():
        return _sketch_values(sketch, compression, max_exact)
    # the parts are sorted runs, which a stable sort merges in one pass
    order = np.argsort(sketch.means, axis=1, kind="stable")
    means = np.take_along_axis(sketch.means, order, axis=1)
    weights = np.take_along_axis(sketch.weights, order, axis=1)
    used = weights > 0
    width = int(used.sum(axis=1).max(initial=0))
    # unused slots have mean inf, so they sort last
    means, weights, used = means[:, :width], weights[:, :width], used[:, :width]
    counts = weights.sum(axis=1)
    is_exact = (counts <= max_exact) & (weights <= 1).all(axis=1)
    if is_exact.all() or width == 0:
        return Sketch(means, weights)
    groups = _group_numbers(np.cumsum(weights, axis=1), counts, compression)
    groups[is_exact] = np.arange(width)
    is_first = np.diff(groups, axis=1, prepend=-1) > 0
    # an unused slot joins the group before it, with weight 0
    ranks = np.maximum(np.cumsum(is_first & used, axis=1) - 1, 0)
    return _combine(means, weights, ranks)


def _sketch_values(sketch: Sketch, compression: int, max_exact: int) -> Sketch:
    """Compress cells whose weights are all 1, in a third of the time of `compress_sketch`."""
    values, counts = np.sort(sketch.means, axis=1), sketch.counts.astype(np.int64)
    parts = []
    # few: the columns of a time step have the same count
    for count in np.unique(counts):
        cells = np.flatnonzero(counts == count)
        parts.append((cells, sketch_sorted(values[cells, :count], compression=compression, max_exact=max_exact)))
    return place_cells(parts, len(counts))


def place_cells(parts: Sequence[tuple[Int[np.ndarray, " _"], Sketch]], num_cells: int) -> Sketch:
    """Combine sketches of some cells each, [(cells, sketch)], into one with `num_cells`; other cells stay empty."""
    size = max((sketch.means.shape[1] for _, sketch in parts), default=0)
    means, weights = np.full((num_cells, size), np.inf), np.zeros((num_cells, size))
    for cells, sketch in parts:
        used = sketch.means.shape[1]
        means[cells, :used], weights[cells, :used] = sketch.means, sketch.weights
    return Sketch(means, weights)


def _combine(
    means: Float[np.ndarray, "K M"], weights: Float[np.ndarray, "K M"], ranks: Int[np.ndarray, "K M"]
) -> Sketch:
    num_cells, width = len(means), int(ranks.max()) + 1
    flat = (ranks + np.arange(num_cells)[:, None] * width).reshape(-1)
    size = num_cells * width
    total = np.bincount(flat, weights=weights.reshape(-1), minlength=size)
    products = np.where(weights > 0, means, 0.0) * weights
    sums = np.bincount(flat, weights=products.reshape(-1), minlength=size)
    combined = np.full(size, np.inf)
    np.divide(sums, total, out=combined, where=total > 0)
    return Sketch(combined.reshape(num_cells, width), total.reshape(num_cells, width))


def _group_numbers(
    ends: Float[np.ndarray, "K M"], counts: Float[np.ndarray, " K"], compression: int
) -> Int[np.ndarray, "K M"]:
    """Number each centroid by the unit of k that contains it (even) or the border that it crosses (odd).

    Args:
        ends: cumulative number of values at the end of each centroid; each starts where the previous one ends.
    """
    bins = compression // 2
    q = np.minimum(ends / np.maximum(counts, 1e-300)[:, None], 1.0)
    k = bins * (np.arcsin(2 * q - 1) / np.pi + 0.5)
    first = np.zeros(k.shape, dtype=np.int64)
    first[:, 1:] = k[:, :-1]
    last = np.ceil(k).astype(np.int64) - 1
    return 2 * first + (last > first)
