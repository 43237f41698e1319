"""Statistics of a LeRobot set, of one episode and over all, in the shapes and by the definitions of its library.

Quantiles over all episodes are the means of the episodes' quantiles, weighted by frames, as the library has it. Unlike
the library's, the std of pictures is right (it squares uint8) and every frame counts (it looks at some).
"""

from typing import Any

import numpy as np
from jaxtyping import Num, UInt8

_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

# of one column: statistic -> nested lists, and "count" -> [frames]
ColumnStatistics = dict[str, Any]


def vector_statistics(values: Num[np.ndarray, "L C"]) -> ColumnStatistics:
    """Statistics of each of C numbers over L frames; extremes keep the type of the values."""
    wide = values.astype(np.float64)
    quantiles = np.quantile(wide, list(_QUANTILES.values()), axis=0)
    return {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": wide.mean(axis=0).tolist(),
        "std": wide.std(axis=0).tolist(),
        "count": [len(values)],
        **{name: row.tolist() for name, row in zip(_QUANTILES, quantiles, strict=True)},
    }


class PictureStatistics:
    """Counts the values of each colour, so that statistics are exact in little memory."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), np.int64)
        self._num_frames = 0

    def add(self, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Count one picture."""
        for colour in range(3):
            self._counts[colour] += np.bincount(image[..., colour].reshape(-1), minlength=256)
        self._num_frames += 1

    def finish(self) -> ColumnStatistics:
        """Statistics of each colour as [3, 1, 1], 1 is the brightest."""
        levels = np.arange(256) / 255
        total = self._counts.sum(axis=1)
        mean = self._counts @ levels / total
        variance = (self._counts * (levels - mean[:, None]) ** 2).sum(axis=1) / total
        cumulative = self._counts.cumsum(axis=1)
        present = self._counts > 0
        values = {
            "min": levels[present.argmax(axis=1)],
            "max": levels[255 - present[:, ::-1].argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(variance),
        }
        for name, share in _QUANTILES.items():
            values[name] = levels[(cumulative >= share * total[:, None]).argmax(axis=1)]
        shaped: ColumnStatistics = {name: value.reshape(3, 1, 1).tolist() for name, value in values.items()}
        return shaped | {"count": [self._num_frames]}


class StatisticsMerger:
    """Statistics over episodes, from those of each."""

    def __init__(self) -> None:
        self._columns: dict[str, dict[str, np.ndarray]] = {}

    def add(self, statistics: dict[str, ColumnStatistics]) -> None:
        """Take in one episode's statistics by column."""
        for column, values in statistics.items():
            new = {name: np.array(value) for name, value in values.items()}
            old = self._columns.get(column)
            self._columns[column] = new if old is None else _merge(old, new)

    def finish(self) -> dict[str, ColumnStatistics]:
        """Statistics by column."""
        return {
            column: {name: value.tolist() for name, value in values.items()} for column, values in self._columns.items()
        }


def _merge(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    count = old["count"] + new["count"]
    share = (new["count"] / count)[0]
    step = new["mean"] - old["mean"]
    variance = old["std"] ** 2 * (1 - share) + new["std"] ** 2 * share + step**2 * share * (1 - share)
    return {
        "min": np.minimum(old["min"], new["min"]),
        "max": np.maximum(old["max"], new["max"]),
        "mean": old["mean"] + step * share,
        "std": np.sqrt(variance),
        "count": count,
        **{name: old[name] + (new[name] - old[name]) * share for name in _QUANTILES},
    }
