"""Choose the frames of an episode that are samples: by stride, by the padding they need, and by movement."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Bool, Num

from vla_foundry.preprocessing.robotics.recipe import Recipe, parse_threshold
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.windows import iterate_windows

# names of the fields that still_threshold holds for, in lower case
_MOVING = ("*action*", "*joint*", "*poses*", "*xyz*", "*actual*")


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """The frames of an episode that are samples, and how many candidates are none."""

    # (N,) int64, ascending
    frames: np.ndarray
    # {reason: candidates left out}: padding, still
    dropped: dict[str, int]


def choose_anchors(fields: Mapping[str, np.ndarray], num_frames: int, recipe: Recipe) -> Anchors:
    """Choose the frames that are samples: by stride, padding and, if asked for, movement.

    Raises:
        ValueError: a pattern of still_thresholds names no field.
    """
    params = recipe.params
    selected = select_anchors(
        num_frames,
        create_window(recipe),
        stride=params.stride,
        max_padding_left=params.max_padding_left,
        max_padding_right=params.max_padding_right,
    )
    frames = selected.anchors
    dropped = {"padding": selected.num_dropped, "still": 0}
    thresholds = _thresholds(recipe)
    if thresholds and len(frames):
        named = {name: fields[name] for name in recipe.fields}
        still = [
            find_still_windows(values, windows.is_padding, thresholds)
            for windows, values in iterate_windows(
                named, frames, num_frames, create_window(recipe), padding=params.padding_strategy
            )
        ]
        is_still = np.concatenate(still)
        dropped["still"] = int(is_still.sum())
        frames = frames[~is_still]
    return Anchors(frames=frames, dropped=dropped)


def create_window(recipe: Recipe) -> Window:
    """The window that statistics are of, and that layout samples stores."""
    return Window(recipe.params.past_lowdim_steps, recipe.params.future_lowdim_steps)


def _thresholds(recipe: Recipe) -> dict[str, float | str]:
    params = recipe.params
    if not params.filter_still_samples:
        return {}
    if params.still_thresholds:
        return dict(params.still_thresholds)
    names = [name for name in recipe.fields if any(fnmatchcase(name.lower(), pattern) for pattern in _MOVING)]
    return dict.fromkeys(names, params.still_threshold)


@dataclass(frozen=True, eq=False)
class SelectedAnchors:
    """Anchors that may be samples, and how many were left out."""

    # (N,) int64, increasing
    anchors: np.ndarray
    # anchors left out because their window reaches too far beyond the episode
    num_dropped: int


def select_anchors(
    num_frames: int,
    window: Window,
    *,
    stride: int = 1,
    max_padding_left: int | None = None,
    max_padding_right: int | None = None,
) -> SelectedAnchors:
    """Choose every `stride`-th frame whose window needs no more padding than allowed.

    Args:
        num_frames: frames of the episode.
        max_padding_left: most padded steps before the first frame; None: any number.
        max_padding_right: most padded steps after the last frame; None: any number.

    Raises:
        ValueError: stride < 1 or a negative limit.
    """
    if stride < 1:
        raise ValueError(f"stride ({stride}) must be at least 1.")
    for name, limit in (("max_padding_left", max_padding_left), ("max_padding_right", max_padding_right)):
        if limit is not None and limit < 0:
            raise ValueError(f"{name} ({limit}) must be at least 0.")
    candidates = np.arange(0, num_frames, stride, dtype=np.int64)
    keep = np.ones(len(candidates), dtype=bool)
    if max_padding_left is not None:
        keep &= window.past - candidates <= max_padding_left
    if max_padding_right is not None:
        keep &= candidates + window.future - (num_frames - 1) <= max_padding_right
    return SelectedAnchors(anchors=candidates[keep], num_dropped=int(np.sum(~keep)))


def find_still_windows(
    fields: Mapping[str, Num[np.ndarray, "N T C"]],
    is_padding: Bool[np.ndarray, "N T"],
    thresholds: Mapping[str, float | str],
) -> Bool[np.ndarray, " N"]:
    """Find the windows in which nothing moves.

    A field moves in a window if, over the steps that are no padding, the standard deviation of one of its columns is
    above the field's threshold. (A column of a 6D rotation changes by no more than the angle, so radians serve.)

    Args:
        thresholds: field name or glob pattern -> threshold (see `parse_threshold`). Fields that no pattern names do not
            count; a field named by several must stay below the smallest.

    Returns:
        True where no named field moves.

    Raises:
        ValueError: a pattern names no field.
    """
    still = np.ones(len(is_padding), dtype=bool)
    weights = (~is_padding)[..., None].astype(np.float64)
    count = np.maximum(weights.sum(axis=1), 1)  # (N, 1)
    for pattern, threshold in thresholds.items():
        matching = [name for name in fields if name == pattern or fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(unknown_name_message("still_threshold: field", pattern, sorted(fields)))
        limit = parse_threshold(threshold, where=f"still_threshold of '{pattern}'")
        for name in matching:
            values = fields[name].astype(np.float64)
            # from the anchor-independent first step, so that large offsets cost no precision
            values = values - values[:, :1]
            mean = (values * weights).sum(axis=1) / count
            variance = (np.square(values - mean[:, None]) * weights).sum(axis=1) / count  # (N, C)
            still &= np.sqrt(variance.max(axis=-1)) <= limit
    return still
