"""Compute field statistics (count, mean, std, min, max, percentiles), per step and over the whole window.

Workers accumulate statistics (accumulator.py), which can be merged in any order and grouping (`merge_statistics`).
Moments are float64. Percentiles come from a sketch (tdigest.py) that is exact while small. Padded steps do not count.
The same parts in the same order give a bit-identical result.

The conventions are those of the published stats.json: std_per_timestep divides by n - 1 (0 where n <= 1); the global
mean is the mean over all valid steps; the global std is sqrt(E_t[std_t^2] + Var_t[mean_t]), weighted by the counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float64

from vla_foundry.robotics.tdigest import (
    DEFAULT_COMPRESSION,
    DEFAULT_MAX_EXACT,
    Sketch,
    merge_cells,
    merge_sketches,
    place_cells,
)

PERCENTILES = (1, 2, 5, 95, 98, 99)

# parts to merge at once: more cost memory, fewer cost time
MERGE_WIDTH = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class FieldStatistics:
    """Statistics of one field of C columns over windows of T steps."""

    # index of the anchor step; None if a foreign file does not state it
    anchor_index: int | None
    # (T,) number of values at each step; fractional if datasets were weighted
    count: np.ndarray
    # (T, C); 0 where the count is 0
    mean_per_timestep: np.ndarray
    # (T, C) sum of squared deviations from the mean
    m2_per_timestep: np.ndarray
    # (T, C) extremes; +inf and -inf where the count is 0
    lowest: np.ndarray
    highest: np.ndarray
    # distributions of T * C cells, step by step; None if a foreign file holds none
    sketch: Sketch | None
    # {percentile: (C,)} and {percentile: (T, C)} read from a file; None: computed from the sketch
    known_percentiles: dict[int, np.ndarray] | None = None
    known_percentiles_per_timestep: dict[int, np.ndarray] | None = None
    # shape of the sketch
    compression: int = DEFAULT_COMPRESSION
    max_exact: int = DEFAULT_MAX_EXACT

    @property
    def num_steps(self) -> int:
        """Steps of the window (T)."""
        return self.mean_per_timestep.shape[0]

    @property
    def width(self) -> int:
        """Columns (C)."""
        return self.mean_per_timestep.shape[1]

    @property
    def std_per_timestep(self) -> Float64[np.ndarray, "T C"]:
        """Standard deviation at each step, with n - 1; 0 where n <= 1."""
        return np.sqrt(self._variance_per_timestep)

    @property
    def min_per_timestep(self) -> Float64[np.ndarray, "T C"]:
        """Smallest value at each step; 0 where the count is 0."""
        return np.where(self.count[:, None] > 0, self.lowest, 0.0)

    @property
    def max_per_timestep(self) -> Float64[np.ndarray, "T C"]:
        """Largest value at each step; 0 where the count is 0."""
        return np.where(self.count[:, None] > 0, self.highest, 0.0)

    @cached_property
    def mean(self) -> Float64[np.ndarray, " C"]:
        """Mean over all valid steps."""
        return self._over_steps(self.mean_per_timestep)

    @cached_property
    def std(self) -> Float64[np.ndarray, " C"]:
        """Standard deviation over all valid steps, by the law of total variance."""
        between = np.square(self.mean_per_timestep - self.mean)
        return np.sqrt(self._over_steps(self._variance_per_timestep + between))

    @property
    def min(self) -> Float64[np.ndarray, " C"]:
        """Smallest value over all valid steps; 0 if no step is valid."""
        return self.lowest.min(axis=0) if self.count.any() else np.zeros(self.width)

    @property
    def max(self) -> Float64[np.ndarray, " C"]:
        """Largest value over all valid steps; 0 if no step is valid."""
        return self.highest.max(axis=0) if self.count.any() else np.zeros(self.width)

    @cached_property
    def percentiles(self) -> dict[int, np.ndarray]:
        """{percentile: (C,)} over all valid steps.

        Raises:
            ValueError: neither percentiles nor a sketch is available.
        """
        if self.known_percentiles is not None:
            return self.known_percentiles
        values = self.global_sketch.quantiles(_FRACTIONS, self.min, self.max)
        return dict(zip(PERCENTILES, values, strict=True))

    @cached_property
    def percentiles_per_timestep(self) -> dict[int, np.ndarray]:
        """{percentile: (T, C)}.

        Raises:
            ValueError: neither percentiles nor a sketch is available.
        """
        if self.known_percentiles_per_timestep is not None:
            return self.known_percentiles_per_timestep
        sketch = self._require_sketch()
        values = sketch.quantiles(_FRACTIONS, self.min_per_timestep.reshape(-1), self.max_per_timestep.reshape(-1))
        return dict(zip(PERCENTILES, values.reshape(len(PERCENTILES), self.num_steps, self.width), strict=True))

    @cached_property
    def global_sketch(self) -> Sketch:
        """The distribution over all valid steps, C cells."""
        sketch = self._require_sketch()
        return merge_cells(sketch, self.width, compression=self.compression, max_exact=self.max_exact)

    def _require_sketch(self) -> Sketch:
        if self.sketch is None:
            raise ValueError(
                "these statistics hold no percentiles and no digest to take them from. "
                "Recompute them with `vla-foundry stats`."
            )
        return self.sketch

    @property
    def _variance_per_timestep(self) -> Float64[np.ndarray, "T C"]:
        count = self.count[:, None]
        return np.where(count > 1, self.m2_per_timestep / np.maximum(count - 1, 1e-300), 0.0)

    def _over_steps(self, values: Float64[np.ndarray, "T C"]) -> Float64[np.ndarray, " C"]:
        return self.count @ values / max(self.count.sum(), 1e-300)


_FRACTIONS = np.array(PERCENTILES) / 100


def merge_statistics(
    datasets: Sequence[Mapping[str, FieldStatistics]], *, shares: Sequence[float] | None = None
) -> dict[str, FieldStatistics]:
    """Merge the statistics of several datasets, field by field; a field may be missing from some of them.

    Steps are aligned by their anchors, so windows may differ; steps that only some datasets have are kept.

    Args:
        shares: None: every window has the same weight. Otherwise each dataset's windows are weighted to give it this
            share, as in a training mixture; the counts of the result are then fractional.

    Raises:
        ValueError: a field's widths or anchors contradict each other (the message names the field), or a share is not
            positive.
    """
    if shares is not None and (len(shares) != len(datasets) or not all(share > 0 for share in shares)):
        raise ValueError(f"shares {list(shares)} must be {len(datasets)} positive numbers, one per dataset.")
    result = {}
    for name in sorted({name for dataset in datasets for name in dataset}):
        chosen = [(number, dataset[name]) for number, dataset in enumerate(datasets) if name in dataset]
        parts = [part for _, part in chosen]
        if shares is not None:
            parts = _weight_parts(parts, [shares[number] for number, _ in chosen])
        try:
            result[name] = merge_field_statistics(parts)
        except ValueError as error:
            raise ValueError(f"field '{name}': {error}") from None
    return result


def _weight_parts(parts: Sequence[FieldStatistics], shares: Sequence[float]) -> list[FieldStatistics]:
    # the largest count of any step: the number of the dataset's windows with this field
    windows = [float(part.count.max(initial=0)) for part in parts]
    total_share = sum(share for share, count in zip(shares, windows, strict=True) if count)
    weighted = []
    for part, share, count in zip(parts, shares, windows, strict=True):
        factor = share / total_share * sum(windows) / count if count else 1.0
        weighted.append(
            replace(
                part,
                count=part.count * factor,
                m2_per_timestep=part.m2_per_timestep * factor,
                sketch=None if part.sketch is None else part.sketch.scaled(factor),
            )
        )
    return weighted


def merge_field_statistics(parts: Sequence[FieldStatistics]) -> FieldStatistics:
    """Merge one or more statistics of a field: moments exactly (Chan et al. 1983), percentiles by sketch.

    Raises:
        ValueError: widths differ, or window lengths differ and an anchor is unknown.
    """
    merged = list(parts)
    # merge a few at a time: merging all at once would hold all their sketches in memory
    while len(merged) > 1:
        merged = [_merge_few(merged[i : i + MERGE_WIDTH]) for i in range(0, len(merged), MERGE_WIDTH)]
    return merged[0]


def _merge_few(parts: Sequence[FieldStatistics]) -> FieldStatistics:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    aligned = _align(parts)
    counts = np.stack([part.count for part in aligned])[..., None]  # (k, T, 1)
    means = np.stack([part.mean_per_timestep for part in aligned])  # (k, T, C)
    total = counts.sum(axis=0)
    safe = np.maximum(total, 1e-300)
    # relative to one part's mean, so that a large offset costs no precision
    origin = np.take_along_axis(means, np.argmax(counts, axis=0)[None], axis=0)[0]
    mean = np.where(total > 0, origin + (counts * (means - origin)).sum(axis=0) / safe, 0.0)
    m2 = np.stack([part.m2_per_timestep for part in aligned]) + counts * np.square(means - mean)
    sketches = [part.sketch for part in aligned if part.sketch is not None]
    compression, max_exact = first.compression, first.max_exact
    return FieldStatistics(
        anchor_index=aligned[0].anchor_index,
        count=total[:, 0],
        mean_per_timestep=mean,
        m2_per_timestep=m2.sum(axis=0),
        lowest=np.minimum.reduce([part.lowest for part in aligned]),
        highest=np.maximum.reduce([part.highest for part in aligned]),
        # percentiles of only some of the parts would be silently wrong
        sketch=merge_sketches(sketches, compression=compression, max_exact=max_exact)
        if len(sketches) == len(parts)
        else None,
        compression=compression,
        max_exact=max_exact,
    )


def _align(parts: Sequence[FieldStatistics]) -> list[FieldStatistics]:
    """Extend all parts to a common window that covers all their steps, with anchors aligned."""
    widths = sorted({part.width for part in parts})
    if len(widths) > 1:
        raise ValueError(f"it has {' and '.join(map(str, widths))} columns in different datasets.")
    anchors = [part.anchor_index for part in parts if part.anchor_index is not None]
    if len(anchors) < len(parts):
        if all(part.num_steps == 1 for part in parts):
            return list(parts)
        raise ValueError(
            "statistics of windows can only be merged where the index of their anchor is known. "
            "Give the past_lowdim_steps of each dataset's preprocessing_config.yaml."
        )
    if len({(part.anchor_index, part.num_steps) for part in parts}) == 1:
        return list(parts)
    past = max(anchors)
    num_steps = past + max(part.num_steps - anchor for part, anchor in zip(parts, anchors, strict=True))
    return [_place(part, past - anchor, num_steps, past) for part, anchor in zip(parts, anchors, strict=True)]


def _place(part: FieldStatistics, start: int, num_steps: int, anchor_index: int) -> FieldStatistics:
    steps = np.arange(start, start + part.num_steps)
    cells = np.arange(start * part.width, (start + part.num_steps) * part.width)

    def placed(values: Float[np.ndarray, "T C"], empty: float) -> Float[np.ndarray, "S C"]:
        result = np.full((num_steps, part.width), empty)
        result[steps] = values
        return result

    count = np.zeros(num_steps)
    count[steps] = part.count
    return replace(
        part,
        anchor_index=anchor_index,
        count=count,
        mean_per_timestep=placed(part.mean_per_timestep, 0.0),
        m2_per_timestep=placed(part.m2_per_timestep, 0.0),
        lowest=placed(part.lowest, np.inf),
        highest=placed(part.highest, -np.inf),
        sketch=None if part.sketch is None else place_cells([(cells, part.sketch)], num_steps * part.width),
    )
