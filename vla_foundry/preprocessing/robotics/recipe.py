"""What to make of recordings: cameras and fields, which episodes, held out or not, their order and shards; all pure."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.preprocessing.robotics.converters.converter import BaseRoboticsConverter, EpisodeRef
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.episode_blocks import is_episode_id
from vla_foundry.robotics.fields import PoseGroup, is_relative_field
from vla_foundry.robotics.spec import FieldDescription

# taken for the length of an episode where none is known before it is read
_USUAL_FRAMES = 256
# few frames are divided into this many shards, so that the workers have something to do each
_LEAST_SHARDS = 16

# units of thresholds, in the unit that fields are stored in (metres, radians, seconds, newtons, newton-metres)
_UNITS = {
    "m": 1.0, "cm": 1e-2, "mm": 1e-3, "m/s": 1.0, "rad": 1.0, "deg": np.pi / 180, "rad/s": 1.0, "deg/s": np.pi / 180,
    "N": 1.0, "Nm": 1.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is made of every episode; sent to the workers."""

    params: RoboticsPreprocessParams
    converter_class: type[BaseRoboticsConverter]
    # in the order of the dataset
    cameras: tuple[str, ...]
    # what every episode has
    fields: dict[str, FieldDescription]
    pose_groups: tuple[PoseGroup, ...]


def create_recipe(params: RoboticsPreprocessParams, converter: BaseRoboticsConverter) -> Recipe:
    """Ask a converter for its cameras and fields.

    Raises:
        ValueError: a camera is unknown, or fields or pose groups contradict themselves.
    """
    fields = converter.describe_fields()
    relative = [name for name in fields if is_relative_field(name)]
    if relative:
        raise ValueError(f"field '{relative[0]}' is named as a relative one, which are made here. Rename it.")
    groups = tuple(converter.pose_groups())
    for group in groups:
        for key in (group.position_key, group.rotation_key, *group.reference_keys):
            if key not in fields:
                raise ValueError(unknown_name_message(f"pose group '{group.name}': field", key, sorted(fields)))
    _check_against_fields(params, fields)
    known = converter.discover_cameras()
    for name in params.camera_rotations or ():
        if name not in known:
            raise ValueError(unknown_name_message("camera_rotations: camera", name, list(known)))
    return Recipe(
        params=params,
        converter_class=type(converter),
        cameras=_choose_cameras(params.camera_names, known),
        fields=fields,
        pose_groups=groups,
    )


def parse_threshold(value: float | str, *, where: str = "still_threshold") -> float:
    """Read a threshold: a number in the field's own unit, or a number and a unit ("5 mm", "1 deg").

    Raises:
        ValueError: it is neither, or negative.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*", value)
        if match is None or (match[2] and match[2] not in _UNITS):
            raise ValueError(f"{where} '{value}' is not a number with a unit. Units: {', '.join(_UNITS)}.")
        return float(match[1]) * _UNITS.get(match[2], 1.0)
    if not value >= 0:
        raise ValueError(f"{where} ({value}) must be at least 0.")
    return float(value)


def _check_against_fields(params: RoboticsPreprocessParams, fields: Mapping[str, FieldDescription]) -> None:
    for pattern, threshold in params.still_thresholds.items():
        if not any(name == pattern or fnmatchcase(name, pattern) for name in fields):
            raise ValueError(unknown_name_message("still_thresholds: field", pattern, sorted(fields)))
        parse_threshold(threshold, where=f"still_thresholds: '{pattern}'")
    changes = [name for name, field in fields.items() if field.representation != "absolute"]
    if params.target_fps is not None and changes:
        kind = fields[changes[0]].representation
        raise ValueError(
            f"target_fps ({params.target_fps:g}): field '{changes[0]}' holds {kind} values, which another rate would "
            "make wrong. Convert without target_fps, or leave the field out."
        )


def _choose_cameras(wanted: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    names = list(known if wanted is None else wanted)
    for name in names:
        if name not in known:
            raise ValueError(unknown_name_message("camera_names: camera", name, list(known)))
    for name, count in Counter(name.lower() for name in names).items():
        if count > 1:
            raise ValueError(
                f"two cameras are named '{name}' but for upper and lower case, which shards do not tell apart. "
                "Choose one by --camera_names."
            )
    return tuple(names)


def check_refs(refs: Iterable[EpisodeRef], max_episodes: int) -> list[EpisodeRef]:
    """Sort episodes by id and cut them to as many as are wanted; -1: all.

    Raises:
        ValueError: there is none, or an id is not unique or not made of letters, digits, "_" and "-".
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

    Which are held out depends on their ids (or tasks) and the seed alone, so that a set that grows moves few.

    Raises:
        ValueError: a pattern of validation_episodes names none, or nothing is left to train on or to validate with.
    """
    for pattern in params.validation_episodes:
        if not any(fnmatchcase(ref.episode_id, pattern) for ref in refs):
            raise ValueError(f"validation_episodes: '{pattern}' names none of the {len(refs)} episodes.")
    held_out = {
        ref.episode_id
        for ref in refs
        if any(fnmatchcase(ref.episode_id, pattern) for pattern in params.validation_episodes)
    }
    held_out |= _draw_episodes(refs, params)
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
        return {episode for task in _draw(list(by_task), fraction, seed) for episode in by_task[task]}
    # a task's episodes are spread over 0 .. 1: what lies lowest over all is within one of its share of every task, and
    # of all in the right number, however few episodes a task has
    places = {
        episode: (rank + 0.5) / len(episodes)
        for episodes in by_task.values()
        for rank, episode in enumerate(_shuffle(episodes, seed))
    }
    ordered = sorted(_shuffle(list(places), seed), key=lambda episode: places[episode])
    return set(ordered[: max(1, round(fraction * len(refs)))])


def _draw(names: Sequence[str], fraction: float, seed: int) -> list[str]:
    return _shuffle(names, seed)[: round(fraction * len(names))]


def _shuffle(names: Sequence[str], seed: int) -> list[str]:
    """Order names by their hashes, so that one that is added moves no other past another."""
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
    """How much work episodes are, for the progress line."""
    return sum(ref.num_frames or _USUAL_FRAMES for ref in refs)
