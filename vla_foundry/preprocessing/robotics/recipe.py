"""Decide what to make of recordings: cameras, fields, validation split, order of episodes, samples; all pure."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Bool, Int64, Num

from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.preprocessing.robotics.converters.converter import BaseRoboticsConverter, EpisodeRef
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.episode_blocks import is_episode_id
from vla_foundry.robotics.fields import PoseGroup, Window, is_relative_field
from vla_foundry.robotics.fit import match_camera
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.robotics.windows import Windows, iterate_windows

# assumed length of an episode whose length is unknown before it is read
_USUAL_FRAMES = 256
# a small dataset is divided into this many shards, so that every worker has something to do
_LEAST_SHARDS = 16
# names of the fields that still_threshold applies to, in lower case
_MOVING = ("*action*", "*joint*", "*poses*", "*xyz*", "*actual*")
# units of thresholds, in the units that fields are stored in (metres, radians, seconds, newtons, newton-metres)
_UNITS = {
    "m": 1.0, "cm": 1e-2, "mm": 1e-3, "m/s": 1.0, "rad": 1.0, "deg": np.pi / 180, "rad/s": 1.0, "deg/s": np.pi / 180,
    "N": 1.0, "Nm": 1.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to make of every episode; sent to the workers."""

    # with the whole names of cameras
    params: RoboticsPreprocessParams
    converter_class: type[BaseRoboticsConverter]
    # in the order of the dataset
    cameras: tuple[str, ...]
    # fields of every episode
    fields: dict[str, FieldDescription]
    pose_groups: tuple[PoseGroup, ...]
    # {field: threshold in its unit} of the still filter; empty: keep still windows
    still_thresholds: dict[str, float]

    @property
    def window(self) -> Window:
        """The window that statistics describe and that layout samples stores."""
        return Window(self.params.past_lowdim_steps, self.params.future_lowdim_steps)

    def iterate_windows(
        self,
        fields: Mapping[str, np.ndarray],
        anchors: Int64[np.ndarray, " N"],
        num_frames: int,
        pose_groups: Sequence[PoseGroup] | None = None,
    ) -> Iterator[tuple[Windows, dict[str, np.ndarray]]]:
        """Yield the windows around anchors, and the (n, T, C) values of the recipe's fields in them.

        Args:
            pose_groups: those whose relative fields are wanted; None: all.
        """
        return iterate_windows(
            {name: fields[name] for name in self.fields},
            anchors,
            num_frames,
            self.window,
            padding=self.params.padding_strategy,
            pose_groups=self.pose_groups if pose_groups is None else pose_groups,
        )


def create_recipe(params: RoboticsPreprocessParams, converter: BaseRoboticsConverter) -> Recipe:
    """Ask a converter for its cameras and fields.

    Raises:
        ValueError: a camera is unknown, or fields or pose groups contradict each other.
    """
    fields = converter.describe_fields()
    relative = next((name for name in fields if is_relative_field(name)), None)
    if relative is not None:
        raise ValueError(f"field '{relative}' has a name kept for the relative fields that are made here. Rename it.")
    groups = tuple(converter.pose_groups())
    for group in groups:
        for key in (group.position_key, group.rotation_key, *group.reference_keys):
            if key not in fields:
                raise ValueError(unknown_name_message(f"pose group '{group.name}': field", key, sorted(fields)))
    change = next((name for name, field in fields.items() if field.representation != "absolute"), None)
    if params.target_fps is not None and change is not None:
        raise ValueError(
            f"target_fps ({params.target_fps:g}): field '{change}' holds {fields[change].representation} values, which "
            "another rate would make wrong. Convert without target_fps, or leave the field out."
        )
    known = converter.discover_cameras()
    cameras = known if params.camera_names is None else _find_cameras("camera_names", params.camera_names, known)
    _check_distinct(cameras)
    if params.camera_names is not None:
        params = replace(params, camera_names=cameras)
    if params.camera_rotations:
        names = _find_cameras("camera_rotations", list(params.camera_rotations), known)
        params = replace(params, camera_rotations=dict(zip(names, params.camera_rotations.values(), strict=True)))
    return Recipe(
        params=params,
        converter_class=type(converter),
        cameras=tuple(cameras),
        fields=fields,
        pose_groups=groups,
        still_thresholds=_still_thresholds(params, fields),
    )


def _still_thresholds(params: RoboticsPreprocessParams, fields: Mapping[str, FieldDescription]) -> dict[str, float]:
    """Return the still filter's threshold of each field: the smallest that matches its name."""
    thresholds: dict[str, float] = {}
    for pattern, text in params.still_thresholds.items():
        matching = [name for name in fields if name == pattern or fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(unknown_name_message("still_thresholds: field", pattern, sorted(fields)))
        threshold = parse_threshold(text, where=f"still_thresholds: '{pattern}'")
        thresholds |= {name: min(threshold, thresholds.get(name, threshold)) for name in matching}
    if not params.filter_still_samples:
        return {}
    if params.still_thresholds:
        return thresholds
    moving = [name for name in fields if any(fnmatchcase(name.lower(), pattern) for pattern in _MOVING)]
    return dict.fromkeys(moving, params.still_threshold)


def parse_threshold(text: str, *, where: str) -> float:
    """Read a threshold: a number in the field's own unit, or a number and a unit ("5 mm", "1 deg").

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?)\s*(\S*)\s*", text)
    if match is None or (match[2] and match[2] not in _UNITS):
        raise ValueError(f"{where} '{text}' is not a number with a unit. Units: {', '.join(_UNITS)}.")
    return float(match[1]) * _UNITS.get(match[2], 1.0)


def _find_cameras(path: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the whole names of cameras, which may be given by their last part, as in training."""
    cameras = []
    for name in names:
        found = match_camera(name, known)
        if not found:
            raise ValueError(unknown_name_message(f"{path}: camera", name, list(known)))
        if len(found) > 1:
            raise ValueError(f"{path}: '{name}' can be {' or '.join(found)}. Give the whole name of one.")
        cameras += found
    if len(set(cameras)) < len(cameras):
        raise ValueError(f"{path} names a camera twice: {', '.join(cameras)}. Remove one.")
    return cameras


def _check_distinct(cameras: Sequence[str]) -> None:
    for name, count in Counter(name.lower() for name in cameras).items():
        if count > 1:
            raise ValueError(
                f"two cameras named '{name}' differ only in upper and lower case, which shards do not distinguish. "
                "Choose one with --camera_names."
            )


def check_refs(refs: Iterable[EpisodeRef], max_episodes: int) -> list[EpisodeRef]:
    """Sort episodes by id and keep the first `max_episodes`; -1: all.

    Raises:
        ValueError: there are none, or an id is not unique or not made of letters, digits, "_" and "-".
    """
    ordered = sorted(refs, key=lambda ref: ref.episode_id)
    if not ordered:
        raise ValueError("source_episodes has no episodes. Check the path and --type.")
    for first, second in itertools.pairwise(ordered):
        if first.episode_id == second.episode_id:
            raise ValueError(f"{first.source} and {second.source} have one episode id, '{first.episode_id}'.")
    for ref in ordered:
        if not is_episode_id(ref.episode_id):
            raise ValueError(f"{ref.source}: episode id '{ref.episode_id}' must be letters, digits, '_' and '-'.")
    return ordered if max_episodes < 0 else ordered[:max_episodes]


def split_refs(refs: Sequence[EpisodeRef], params: RoboticsPreprocessParams) -> dict[str, list[EpisodeRef]]:
    """Divide episodes into {"train": ..., "validation": ...}, or {"": all} if none are held out.

    The choice depends on ids (or tasks) and the seed alone, so adding episodes moves few others.

    Raises:
        ValueError: a pattern of validation_episodes matches nothing, or one part is empty.
    """
    held_out = _draw_episodes(refs, params)
    for pattern in params.validation_episodes:
        named = {ref.episode_id for ref in refs if fnmatchcase(ref.episode_id, pattern)}
        if not named:
            raise ValueError(f"validation_episodes: '{pattern}' names none of the {len(refs)} episodes.")
        held_out |= named
    if params.validation_fraction == 0 and not params.validation_episodes:
        return {"": list(refs)}
    split = {
        "train": [ref for ref in refs if ref.episode_id not in held_out],
        "validation": [ref for ref in refs if ref.episode_id in held_out],
    }
    empty = next((name for name, part in split.items() if not part), None)
    if empty is not None:
        raise ValueError(
            f"validation_fraction ({params.validation_fraction:g}) by {params.validation_by} leaves no episode of "
            f"{len(refs)} to {'train on' if empty == 'train' else 'validate with'}. Choose another."
        )
    return split


def _draw_episodes(refs: Sequence[EpisodeRef], params: RoboticsPreprocessParams) -> set[str]:
    fraction, seed = params.validation_fraction, params.seed
    if fraction == 0:
        return set()
    by_task: dict[str, list[str]] = {}
    for ref in refs:
        by_task.setdefault(ref.task or "", []).append(ref.episode_id)
    if params.validation_by == "task":
        tasks = _shuffle(list(by_task), seed)[: round(fraction * len(by_task))]
        return {episode for task in tasks for episode in by_task[task]}
    # spread each task's episodes evenly over 0 .. 1: the lowest of all then hold every task's share to within one
    # episode, and the right number in total, however few episodes a task has
    places = {
        episode: (rank + 0.5) / len(episodes)
        for episodes in by_task.values()
        for rank, episode in enumerate(_shuffle(episodes, seed))
    }
    ordered = sorted(_shuffle(list(places), seed), key=lambda episode: places[episode])
    return set(ordered[: max(1, round(fraction * len(refs)))])


def _shuffle(names: Sequence[str], seed: int) -> list[str]:
    """Order names by their hashes, so that an added name does not reorder the others."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def group_episodes(refs: Sequence[EpisodeRef], params: RoboticsPreprocessParams) -> list[list[EpisodeRef]]:
    """Permute episodes by the seed and divide them into shards of about frames_per_shard frames."""
    known = [ref.num_frames for ref in refs if ref.num_frames is not None]
    usual = round(sum(known) / len(known)) if known else _USUAL_FRAMES
    sizes = [usual if ref.num_frames is None else ref.num_frames for ref in refs]
    limit = min(params.frames_per_shard, -(-sum(sizes) // _LEAST_SHARDS))
    shards: list[list[EpisodeRef]] = []
    room = 0
    for number in np.random.default_rng([params.seed, len(refs)]).permutation(len(refs)).tolist():
        if room <= 0:
            shards.append([])
            room = limit
        shards[-1].append(refs[number])
        room -= sizes[number]
    return shards


def count_frames(refs: Iterable[EpisodeRef]) -> int:
    """Return the frames of episodes, known or assumed: their weight on the progress line."""
    return sum(ref.num_frames or _USUAL_FRAMES for ref in refs)


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
