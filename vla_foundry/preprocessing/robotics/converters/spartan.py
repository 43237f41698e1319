"""Convert raw LBM recordings (TRI's simulation and stations), without pickle.

    <any folders>/tasks/<Task>/<station>/.../<datetime>/diffusion_spartan/episode_<n>/processed/
        metadata.yaml       camera_id_to_semantic_name: {camera id: camera}
        observations.npz    per camera id (L, H, W, 3) uint8; every signal (L, D); language_instruction (L,) text
        actions.npz         actions (L, >= 20); --action_fields_config_path cuts them into fields
        intrinsics.npz      per camera id (3, 3) or (L, 3, 3); may be missing
        extrinsics.npz      per camera id (4, 4) or (L, 4, 4); may be missing

A source is any folder above the episodes. The path part after `tasks` is the task.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vla_foundry.config.yaml_source import find_config
from vla_foundry.params.commands.preprocessing_robotics import ActionFieldsParams
from vla_foundry.params.experiment import load_params_from_yaml
from vla_foundry.preprocessing.robotics.converters.converter import (
    BaseRoboticsConverter,
    CameraFrames,
    Episode,
    EpisodeRef,
    register_converter,
    slug,
)
from vla_foundry.preprocessing.robotics.converters.field_map import default_role, stored_dtype
from vla_foundry.preprocessing.robotics.converters.spartan_files import (
    Npz,
    find_frames,
    open_npz,
    read_episode_lists,
    read_mapping,
)
from vla_foundry.progress import say
from vla_foundry.robotics.episode_blocks import InstructionSpan
from vla_foundry.robotics.fields import PoseGroup, parse_field_name, parse_pose_groups
from vla_foundry.robotics.spec import PUBLISHED_LANGUAGE_TYPES, FieldDescription
from vla_foundry.storage.uri import join_uri, list_visible, name_of, parent_uri

_EPISODE_FILE = re.compile(r"(?P<folder>.*/episode_(?P<number>\d+))/processed/(?P<name>[^/]+)")
_REQUIRED = ("metadata.yaml", "observations.npz", "actions.npz")
_CALIBRATION = ("intrinsics.npz", "extrinsics.npz")
_CAMERA_KEY = "camera_id_to_semantic_name"
_INSTRUCTION_KEY = "language_instruction"
_UNITS = {"xyz": "m", "joint_position": "rad", "joint_velocity": "rad/s", "joint_torque": "Nm"}


@dataclass(frozen=True)
class _Place:
    """Where an episode is."""

    # .../episode_<n>/processed
    folder: str
    number: int
    # None: not in the path
    task: str | None
    # existing files
    files: frozenset[str]

    def uri(self, name: str) -> str:
        """Return the URI of one of its files."""
        return join_uri(self.folder, name)


@register_converter("spartan")
class SpartanConverter(BaseRoboticsConverter):
    """Reads LBM recordings; see the module."""

    @cached_property
    def _action_fields(self) -> ActionFieldsParams:
        return load_params_from_yaml(ActionFieldsParams, find_config(self.params.action_fields_config_path))

    @cached_property
    def _language(self) -> dict[str, dict[str, list[str]]]:
        """{task: {kind: texts}}."""
        path = self.params.language_annotations_path
        if path is None:
            return {}
        tasks = read_mapping(find_config(path)).get("language_dict")
        if not isinstance(tasks, dict) or not all(isinstance(kinds, dict) for kinds in tasks.values()):
            raise ValueError(f"{path} must hold language_dict: {{task: {{kind: [text, ...]}}}}.")
        return {
            str(task): {
                kind: [str(text) for text in kinds[kind]] for kind in PUBLISHED_LANGUAGE_TYPES if kinds.get(kind)
            }
            for task, kinds in tasks.items()
        }

    @cached_property
    def _places(self) -> list[tuple[str, _Place]]:
        """(id, place) of all episodes, sorted by folder and number."""
        found = [place for source in self.params.source_episodes for place in _find_places(source)]
        excluded: dict[str, list[int]] = {}
        if self.params.validation_episodes_path is not None:
            excluded = read_episode_lists(self.params.validation_episodes_path)
        places = [place for place in found if place.number not in excluded.get(place.task or "", ())]
        if not places:
            sources = ", ".join(self.params.source_episodes)
            raise ValueError(
                f"source_episodes: no episode_<n>/processed folder at any depth below {sources}"
                + (f", except the {len(found)} of validation_episodes_path." if found else ".")
            )
        return [(_episode_id(place), place) for place in places]

    def discover_episodes(self) -> list[EpisodeRef]:
        """Find all episodes at any depth; report missing calibration and tasks without instructions."""
        places = [place for _, place in self._places]
        for name in _CALIBRATION:
            lacking = sum(name not in place.files for place in places)
            if lacking:
                say(f"{lacking} of {len(places)} episodes have no {name}, and are converted without.")
        if self._language:
            unknown = sorted({place.task or "(no task)" for place in places} - self._language.keys())
            if unknown:
                say(f"{self.params.language_annotations_path} has no instructions for {', '.join(unknown)}.")
        return [
            EpisodeRef(episode_id=name, source=parent_uri(place.folder), task=place.task, payload=place)
            for name, place in self._places
        ]

    @cached_property
    def _examples(self) -> list[_Place]:
        """The first complete episode of every recording session: cameras may differ between stations."""
        firsts: dict[str, _Place] = {}
        for _, place in self._places:
            if place.files.issuperset(_REQUIRED):
                firsts.setdefault(parent_uri(parent_uri(place.folder)), place)
        if not firsts:
            raise ValueError(f"source_episodes: no episode has all of {', '.join(_REQUIRED)}.")
        return list(firsts.values())

    def discover_cameras(self) -> list[str]:
        """Return the cameras of all stations."""
        return list(dict.fromkeys(name for place in self._examples for name in _read_cameras(place).values()))

    @cached_property
    def _fields(self) -> dict[str, FieldDescription]:
        place = self._examples[0]
        cameras = _read_cameras(place)
        rotations = {
            group.rotation_key: group.rotation_format for group in parse_pose_groups(self._action_fields.pose_groups)
        }
        with open_npz(place.uri("observations.npz")) as npz:
            headers = {name: npz.header(name) for name in self._signals(npz, cameras)}
        widths = {name: int(np.prod(header.shape[1:])) for name, header in headers.items()}
        dtypes = {name: header.dtype for name, header in headers.items()}
        with open_npz(place.uri("actions.npz")) as npz:
            dtype = npz.header("actions").dtype
        for name, columns in self._action_columns():
            widths[name], dtypes[name] = columns.stop - columns.start, dtype
        return {
            name: _describe(name, width, dtypes[name], rotations.get(name))
            for name, width in widths.items()
            if name not in self.params.data_discard_keys
        }

    def describe_fields(self) -> dict[str, FieldDescription]:
        """Return the signals of the first episode and the action fields."""
        return dict(self._fields)

    def pose_groups(self) -> tuple[PoseGroup, ...]:
        """Return the pose groups of the action config, except those whose fields are all missing."""
        path = self.params.action_fields_config_path
        groups = []
        for group in parse_pose_groups(self._action_fields.pose_groups, f"{path}: pose_groups"):
            keys = (group.position_key, group.rotation_key)
            missing = [key for key in (*keys, *group.reference_keys) if key not in self._fields]
            if not any(key in self._fields for key in keys):
                continue
            if missing:
                raise ValueError(f"{path}: pose group {group.name} needs the field '{missing[0]}', which is missing.")
            groups.append(group)
        return tuple(groups)

    def _signals(self, npz: Npz, cameras: dict[str, str]) -> list[str]:
        """Return the arrays of observations.npz that have one row of numbers per frame."""
        others = {*cameras, *self.params.data_discard_keys}
        headers = {name: npz.header(name) for name in npz.names if name not in others}
        return [name for name, header in headers.items() if header.dtype.kind in "fiub" and len(header.shape) in (1, 2)]

    def _action_columns(self) -> Iterator[tuple[str, slice]]:
        ends = self._action_fields.action_index_fields
        for name, start, end in zip(self._action_fields.action_key_fields, [0, *ends], ends, strict=False):
            yield name, slice(start, end)

    def read_episode(self, ref: EpisodeRef) -> Episode:
        """Read an episode's numbers; its images are read later."""
        place: _Place = ref.payload
        names = _read_cameras(place)
        fields: dict[str, np.ndarray] = {}
        cameras: dict[str, CameraFrames] = {}
        with open_npz(place.uri("observations.npz")) as npz:
            for name in self._signals(npz, names):
                values = npz.read(name)
                fields[name] = values.reshape(len(values), -1).astype(stored_dtype(values.dtype))
            for camera_id, name in names.items():
                is_chosen = self.params.camera_names is None or name in self.params.camera_names
                if is_chosen and camera_id in npz.names:
                    cameras[name] = find_frames(npz, camera_id)
            texts = npz.read(_INSTRUCTION_KEY) if _INSTRUCTION_KEY in npz.names else None
        if not fields:
            raise ValueError(f"{place.uri('observations.npz')} holds no signals.")
        num_frames = len(next(iter(fields.values())))
        fields |= self._read_actions(place, num_frames)
        intrinsics, extrinsics = (_read_calibration(place, name, names, set(cameras)) for name in _CALIBRATION)
        return Episode(
            ref=ref,
            fps=self.params.fps,
            timestamps=np.arange(num_frames) / self.params.fps,
            fields={name: values for name, values in fields.items() if name not in self.params.data_discard_keys},
            cameras=cameras,
            instructions=self._instructions(place, texts, num_frames),
            intrinsics=intrinsics,
            extrinsics=extrinsics,
            metadata={"recording": name_of(parent_uri(parent_uri(parent_uri(place.folder)))), "episode": place.number},
        )

    def _read_actions(self, place: _Place, num_frames: int) -> dict[str, np.ndarray]:
        with open_npz(place.uri("actions.npz")) as npz:
            actions = npz.read("actions")
        width = self._action_fields.action_index_fields[-1]
        if actions.ndim != 2 or actions.dtype.kind != "f" or actions.shape[1] < width or len(actions) != num_frames:
            raise ValueError(
                f"{place.uri('actions.npz')}: actions are {actions.dtype} {actions.shape}, expected floats "
                f"({num_frames}, {width}) as the observations and {self.params.action_fields_config_path} say."
            )
        dtype = stored_dtype(actions.dtype)
        return {name: actions[:, columns].astype(dtype) for name, columns in self._action_columns()}

    def _instructions(self, place: _Place, texts: np.ndarray | None, num_frames: int) -> list[InstructionSpan]:
        annotated = self._language.get(place.task or "")
        if annotated:
            return [InstructionSpan(start=0, end=num_frames, texts=annotated)]
        if texts is None or texts.dtype.kind != "U":
            return []
        if texts.shape != (num_frames,):
            raise ValueError(
                f"{place.uri('observations.npz')}: {_INSTRUCTION_KEY} has the shape {texts.shape}, "
                f"expected ({num_frames},)."
            )
        return Episode.instructions_of_frames(texts.tolist())


def _find_places(source: str) -> list[_Place]:
    found: dict[tuple[str, int], set[str]] = {}
    for uri in list_visible(source):
        match = _EPISODE_FILE.fullmatch(uri)
        if match is not None:
            found.setdefault((match["folder"], int(match["number"])), set()).add(match["name"])
    ordered = sorted(found.items(), key=lambda item: (parent_uri(item[0][0]), item[0][1]))
    return [
        _Place(join_uri(folder, "processed"), number, _task_of(folder), frozenset(names))
        for (folder, number), names in ordered
    ]


def _task_of(folder: str) -> str | None:
    parts = folder.split("/")[:-1]
    after = [part for previous, part in itertools.pairwise(parts) if previous == "tasks"]
    return after[-1] if after else None


def _episode_id(place: _Place) -> str:
    """Return task, time, a digest of the path below `tasks` (stations may record in the same second) and number."""
    parts = parent_uri(parent_uri(place.folder)).split("/")
    below = parts if place.task is None else parts[len(parts) - parts[::-1].index("tasks") :]
    digest = hashlib.sha256("/".join(below).encode()).hexdigest()[:8]
    recording = next((part for part in reversed(parts) if part not in ("", "diffusion_spartan")), "recording")
    return slug(f"{slug(place.task or '')[:30]}_{recording[-30:]}_{digest}_episode_{place.number}")


def _read_cameras(place: _Place) -> dict[str, str]:
    """Return {camera id: camera} of an episode."""
    uri = place.uri("metadata.yaml")
    names = read_mapping(uri).get(_CAMERA_KEY)
    if not isinstance(names, dict):
        raise ValueError(f"{uri} has no {_CAMERA_KEY}: {{camera id: camera}}.")
    cameras = {str(camera_id): str(name) for camera_id, name in names.items()}
    if len(set(cameras.values())) < len(cameras):
        raise ValueError(f"{uri}: {_CAMERA_KEY} gives one camera two ids: {', '.join(cameras.values())}.")
    return cameras


def _read_calibration(place: _Place, name: str, names: dict[str, str], cameras: set[str]) -> dict[str, np.ndarray]:
    if name not in place.files:
        return {}
    with open_npz(place.uri(name)) as npz:
        wanted = {camera_id: camera for camera_id, camera in names.items() if camera in cameras}
        return {camera: npz.read(camera_id) for camera_id, camera in wanted.items() if camera_id in npz.names}


def _describe(name: str, width: int, dtype: Any, rotation: str | None) -> FieldDescription:
    parts = parse_field_name(name)
    quantity = "" if parts is None else parts.component or parts.quantity.removesuffix("_external")
    return FieldDescription(
        shape=(width,),
        dtype=stored_dtype(np.dtype(dtype)),
        unit=_UNITS.get(quantity),
        rotation=rotation,
        role=default_role(name),
        is_discrete=np.dtype(dtype).kind != "f",
    )
