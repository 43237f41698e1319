"""Choose the frames of an episode that become samples: by stride, by the padding they need, and by movement."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Num

from vla_foundry.preprocessing.robotics.recipe import Recipe
from vla_foundry.robotics.fields import Window


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """The frames of an episode that become samples."""

    # (N,) int64, ascending
    frames: np.ndarray
    # {reason: candidates left out}: padding, still
    dropped: dict[str, int]


def choose_anchors(fields: Mapping[str, np.ndarray], num_frames: int, recipe: Recipe) -> Anchors:
    """Choose the frames that become samples."""
    params = recipe.params
    candidates = np.arange(0, num_frames, params.stride, dtype=np.int64)
    within = find_little_padding(
        candidates, num_frames, recipe.window, left=params.max_padding_left, right=params.max_padding_right
    )
    frames = candidates[within]
    still = np.zeros(len(frames), dtype=bool)
    if recipe.still_thresholds and len(frames):
        windows = recipe.iterate_windows(fields, frames, num_frames, pose_groups=())
        found = [find_still_windows(values, each.is_padding, recipe.still_thresholds) for each, values in windows]
        still = np.concatenate(found)
    return Anchors(frames=frames[~still], dropped={"padding": int((~within).sum()), "still": int(still.sum())})


def find_little_padding(
    anchors: Int64[np.ndarray, " N"], num_frames: int, window: Window, *, left: int, right: int
) -> Bool[np.ndarray, " N"]:
    """Find the anchors whose window starts at most `left` steps before the episode and ends at most `right` after."""
    return (window.past - anchors <= left) & (anchors + window.future - (num_frames - 1) <= right)


def find_still_windows(
    fields: Mapping[str, Num[np.ndarray, "N T C"]],
    is_padding: Bool[np.ndarray, "N T"],
    thresholds: Mapping[str, float],
) -> Bool[np.ndarray, " N"]:
    """Find the windows in which nothing moves.

    A field moves in a window if, over the steps that are not padding, the standard deviation of one of its columns
    exceeds the field's threshold. (A column of a 6D rotation changes by at most the angle, so radians work for it.)

    Args:
        thresholds: {field: threshold in the field's unit}; other fields do not count.

    Returns:
        True where none of these fields moves.
    """
    still = np.ones(len(is_padding), dtype=bool)
    weights = (~is_padding)[..., None].astype(np.float64)
    count = np.maximum(weights.sum(axis=1), 1)  # (N, 1)
    for name, threshold in thresholds.items():
        values = fields[name].astype(np.float64)
        # relative to the first step, so that large offsets cost no precision
        values = values - values[:, :1]
        mean = (values * weights).sum(axis=1) / count
        variance = (np.square(values - mean[:, None]) * weights).sum(axis=1) / count  # (N, C)
        still &= np.sqrt(variance.max(axis=-1)) <= threshold
    return still
