"""Collect field statistics from batches of windows, in bounded memory."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Num

from vla_foundry.robotics.statistics import MERGE_WIDTH, FieldStatistics, merge_field_statistics
from vla_foundry.robotics.tdigest import DEFAULT_COMPRESSION, DEFAULT_MAX_EXACT, place_cells, sketch_sorted


class StatisticsAccumulator:
    """Collects field statistics from batches of windows, in bounded memory.

    Up to `max_exact` windows of each field are kept unchanged, so percentiles are exact. Beyond that, older windows are
    summarized in a sketch.

    Args:
        anchor_index: index of the anchor step in the windows (0 for single frames).
        compression, max_exact: see tdigest.py.
    """

    def __init__(
        self, anchor_index: int, *, compression: int = DEFAULT_COMPRESSION, max_exact: int = DEFAULT_MAX_EXACT
    ) -> None:
        self._anchor_index = anchor_index
        self._shape = (compression, max_exact)
        self._buffers: dict[str, _Buffer] = {}
        self._parts: dict[str, list[FieldStatistics]] = {}

    def update(
        self, fields: Mapping[str, Num[np.ndarray, "N T *C"]], valid: Bool[np.ndarray, "N T"] | None = None
    ) -> None:
        """Add N windows.

        Args:
            fields: {field: (N, T, C) or (N, T)}, of any integer or floating type; T is 1 for single frames.
            valid: True where a step counts (past_mask | future_mask); None: everywhere.

        Raises:
            ValueError: a valid value is NaN or infinite, or a field changed its shape; the message names the field.
        """
        for name, values in fields.items():
            values = values[..., None] if values.ndim == 2 else values
            if values.ndim != 3 or values.dtype.kind not in "iuf":
                raise ValueError(
                    f"field '{name}' must be numbers of shape (windows, steps, columns), "
                    f"got {values.dtype} of shape {values.shape}."
                )
            keep = np.ones(values.shape[:2], dtype=bool) if valid is None else valid
            _check_finite(name, values, keep)
            self._add(name, values, keep)

    def _add(self, name: str, values: np.ndarray, valid: np.ndarray) -> None:
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = _Buffer(values.shape[1], values.shape[2], self._shape[1])
            self._parts[name] = []
        if values.shape[1:] != buffer.shape:
            raise ValueError(
                f"field '{name}' has changed its shape from {buffer.shape} to {values.shape[1:]} (steps, columns)."
            )
        start = 0
        while start < len(values):
            if buffer.is_full:
                # only once more windows follow: exactly max_exact windows are still kept unchanged
                self._parts[name].append(self._take(buffer, self._shape[1] // MERGE_WIDTH))
                buffer.clear()
                if len(self._parts[name]) >= MERGE_WIDTH:
                    self._parts[name] = [merge_field_statistics(self._parts[name])]
            start += buffer.append(values[start:], valid[start:])

    def _take(self, buffer: "_Buffer", keep: int) -> FieldStatistics:
        """Summarize a buffer; cells of up to `keep` values stay exact."""
        compression, max_exact = self._shape
        sketched = _summarize(
            *buffer.content(), anchor_index=self._anchor_index, compression=compression, max_exact=keep
        )
        return replace(sketched, max_exact=max_exact)

    def finish(self) -> dict[str, FieldStatistics]:
        """Return the statistics of all windows added so far, fields in alphabetical order."""
        result = {}
        for name in sorted(self._buffers):
            parts, max_exact = self._parts[name], self._shape[1]
            last = self._take(self._buffers[name], max_exact // MERGE_WIDTH if parts else max_exact)
            result[name] = merge_field_statistics([*parts, last])
        return result


class _Buffer:
    """Up to `capacity` windows of one field, columns first, so that each cell's values are contiguous."""

    def __init__(self, num_steps: int, width: int, capacity: int) -> None:
        self.shape = (num_steps, width)
        self._capacity = capacity
        self._fill = 0
        self._values = np.empty((num_steps, width, 0))
        self._valid = np.empty((num_steps, 0), dtype=bool)

    @property
    def is_full(self) -> bool:
        return self._fill == self._capacity

    def append(self, values: np.ndarray, valid: np.ndarray) -> int:
        """Append as many windows as fit; return how many."""
        taken = min(len(values), self._capacity - self._fill)
        end = self._fill + taken
        # float32 stays float32 (it sorts in half the time) until a wider type arrives
        dtype = np.result_type(values.dtype, np.float32)
        if self._fill:
            dtype = np.result_type(dtype, self._values.dtype)
        if end > self._values.shape[-1] or dtype != self._values.dtype:
            size = min(self._capacity, max(end, 2 * self._values.shape[-1], 64))
            grown = np.empty((*self.shape, size), dtype=dtype)
            grown[..., : self._fill] = self._values[..., : self._fill]
            grown_valid = np.empty((self.shape[0], size), dtype=bool)
            grown_valid[:, : self._fill] = self._valid[:, : self._fill]
            self._values, self._valid = grown, grown_valid
        self._values[..., self._fill : end] = np.moveaxis(values[:taken], 0, -1)
        self._valid[:, self._fill : end] = valid[:taken].T
        self._fill = end
        return taken

    def content(self) -> tuple[np.ndarray, np.ndarray]:
        """Values (T, C, n) and their validity (T, n)."""
        return self._values[..., : self._fill], self._valid[:, : self._fill]

    def clear(self) -> None:
        self._fill = 0


def _check_finite(name: str, values: np.ndarray, valid: np.ndarray) -> None:
    is_finite = np.isfinite(values)
    if is_finite.all():
        return
    bad = ~is_finite & valid[..., None]
    if bad.any():
        window, step, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"field '{name}' holds {values[window, step, column]} in window {window}, step {step}, column {column}. "
            "Repair or drop the episode."
        )


def _summarize(
    values: Num[np.ndarray, "T C N"],
    valid: Bool[np.ndarray, "T N"],
    *,
    anchor_index: int | None,
    compression: int,
    max_exact: int,
) -> FieldStatistics:
    num_steps, width, _ = values.shape
    count = valid.sum(axis=1).astype(np.float64)
    # values that do not count sort to the end
    ordered = np.sort(np.where(valid[:, None], values, np.inf) if not valid.all() else values, axis=-1)
    mean, m2 = np.zeros((num_steps, width)), np.zeros((num_steps, width))
    lowest, highest = np.full((num_steps, width), np.inf), np.full((num_steps, width), -np.inf)
    parts = []
    for n in np.unique(count).astype(int):
        steps = np.flatnonzero(count == n)
        # float64 before any arithmetic, so that moments of float32 data do not depend on the order either
        part = ordered[steps, :, :n].astype(np.float64)
        if n:
            lowest[steps], highest[steps] = part[..., 0], part[..., -1]
            # relative to the smallest value, so that a large offset costs no precision
            mean[steps] = part[..., 0] + (part - part[..., :1]).mean(axis=-1)
            deviation = part - mean[steps][..., None]
            m2[steps] = np.einsum("tcn,tcn->tc", deviation, deviation)
        cells = (steps[:, None] * width + np.arange(width)).reshape(-1)
        values_of_cells = part.reshape(len(cells), n)
        parts.append((cells, sketch_sorted(values_of_cells, compression=compression, max_exact=max_exact)))
    return FieldStatistics(
        anchor_index=anchor_index,
        count=count,
        mean_per_timestep=mean,
        m2_per_timestep=m2,
        lowest=lowest,
        highest=highest,
        sketch=place_cells(parts, num_steps * width),
        compression=compression,
        max_exact=max_exact,
    )
