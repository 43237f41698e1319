"""The windows of an episode as preprocessing needs them: which anchors are samples, and what their fields hold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Int64

from vla_foundry.preprocessing.robotics.recipe import Recipe
from vla_foundry.robotics.fields import PoseGroup, Window
from vla_foundry.robotics.windows import (
    Windows,
    compute_relative_fields,
    create_windows,
    find_still_windows,
    select_anchors,
)

# windows that are made at a time: bounds the memory that a long episode takes
_CHUNK = 256
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
        still = [
            find_still_windows(values, windows.is_padding, thresholds)
            for windows, values in iterate_windows(fields, frames, num_frames, recipe, with_relative=False)
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


def iterate_windows(
    fields: Mapping[str, np.ndarray],
    anchors: Int64[np.ndarray, " N"],
    num_frames: int,
    recipe: Recipe,
    *,
    with_relative: bool = True,
) -> Iterator[tuple[Windows, dict[str, np.ndarray]]]:
    """Yield the windows around anchors, some at a time, with the values of every field (n, T, C).

    Args:
        fields: of the whole episode, (L, C).
        with_relative: add the `_relative` fields of the pose groups, in the type of the poses.
    """
    for start in range(0, len(anchors), _CHUNK):
        windows = create_windows(
            anchors[start : start + _CHUNK], num_frames, create_window(recipe), padding=recipe.params.padding_strategy
        )
        values = {name: windows.gather(fields[name]) for name in recipe.fields}
        if with_relative:
            values |= relative_values(values, windows, recipe.pose_groups)
        yield windows, values


def relative_values(
    values: Mapping[str, np.ndarray], windows: Windows, pose_groups: Sequence[PoseGroup]
) -> dict[str, np.ndarray]:
    """Return the `_relative` fields of windows, in the type of the poses that they are made of."""
    relative = compute_relative_fields(
        values,
        pose_groups,
        anchor=windows.window.anchor,
        is_padding=windows.is_padding,
        padding=windows.padding,
    )
    types = {
        name: values[key].dtype
        for group in pose_groups
        for name, key in zip(group.relative_keys, (group.position_key, group.rotation_key), strict=True)
    }
    return {name: array.astype(types[name]) for name, array in relative.items()}
