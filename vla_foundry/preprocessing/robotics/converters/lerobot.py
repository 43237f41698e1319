"""Convert LeRobot datasets, versions 2.0, 2.1 and 3.0 (https://github.com/huggingface/lerobot).

A source is the folder that holds meta/info.json: local, s3://, or hf://datasets/OWNER/NAME. Several sources must have
the same features and rate. Cameras and fields keep the names of their features (`observation.images.top`), unless a
field map splits fields:

    # my_arm.yaml, for --field_map my_arm.yaml
    fields:
      robot__actual__poses__right::arm__xyz: {source: observation.state, columns: [0, 3], unit: m, frame: base}
      robot__actual__poses__right::arm__quat: {source: observation.state, columns: [3, 7], rotation: quaternion_xyzw}
      robot__actual__grippers__right::arm: {source: observation.state, columns: [7, 8], gripper: {open: 1, closed: 0}}
      robot__action__poses__right::arm__xyz: {source: action, columns: [0, 3], unit: m, frame: base}
      robot__action__poses__right::arm__quat: {source: action, columns: [3, 7], rotation: quaternion_xyzw}
      robot__action__grippers__right::arm: {source: action, columns: [7, 8], gripper: {open: 1, closed: 0}}
    pose_groups:
      - name: action
        position_key: robot__action__poses__right::arm__xyz
        rotation_key: robot__action__poses__right::arm__quat

Without a map, all numbers but bookkeeping (`index`, `next.reward`, ...) become fields. No poses are known then, so
relative actions are not available.
"""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from vla_foundry.images.codec import decode_depth, decode_image
from vla_foundry.params.commands.preprocessing_robotics import FieldMapParams, FieldParams, LeRobotParams
from vla_foundry.preprocessing.robotics.converters import field_map
from vla_foundry.preprocessing.robotics.converters.converter import (
    BaseRoboticsConverter,
    CameraFrames,
    Episode,
    EpisodeRef,
    register_converter,
    unique_names,
)
from vla_foundry.preprocessing.robotics.converters.lerobot_files import (
    VideoFrames,
    numbers_of,
    read_episode_rows,
)
from vla_foundry.preprocessing.robotics.converters.lerobot_metadata import (
    DatasetInfo,
    EpisodeEntry,
    Feature,
    list_episodes,
    read_info,
)
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import FieldDescription, Role
from vla_foundry.storage.uri import exists, join_uri, name_of, read_bytes

_ROWS_AT_ONCE = 4096
# features read besides the times, if info.json lists them
_COUNTERS = ("frame_index", "index", "task_index")
# images to read at once: 3 MB at 100 kB each
_BATCH_ROWS = 32
_PNG = b"\x89PNG\r\n\x1a\n"


def read_rows(info: DatasetInfo, entry: EpisodeEntry, signals: Sequence[str]) -> dict[str, np.ndarray]:
    """Read signals, `timestamp` and counters of an episode: {feature: (L, width)}, with the types of info.json.

    Raises:
        ValueError: the file is missing or broken, or contradicts info.json or the tables; one line that names it.
    """
    import pyarrow as pa

    where = f"{entry.data_uri}: episode {entry.index}"
    names = ["timestamp", *(name for name in _COUNTERS if name in info.features), *signals]
    batches = list(read_episode_rows(entry.data_uri, entry.index, names, rows_at_once=_ROWS_AT_ONCE))
    num_rows = sum(batch.num_rows for batch in batches)
    if num_rows != entry.length or not num_rows:
        raise ValueError(f"{where} has {num_rows} rows, but length {entry.length} in meta/episodes.")
    table = pa.Table.from_batches(batches)
    arrays = {}
    for name in dict.fromkeys(names):
        try:
            arrays[name] = _read_feature(info, name, table.column(name).combine_chunks())
        except ValueError as error:
            raise ValueError(f"{where}: column '{name}' {error}.") from None
    _check_counters(arrays, entry, where)
    return arrays


def _read_feature(info: DatasetInfo, name: str, column: object) -> np.ndarray:
    feature = info.features.get(name)
    if feature is None:
        raise ValueError("is not among the features of meta/info.json")
    values = numbers_of(column, feature.width)
    declared = np.dtype(feature.dtype)
    with np.errstate(invalid="ignore"):  # from NaN
        converted = values.astype(declared)
    # whole numbers may be stored as any type: pandas writes floats where a column once held null
    is_right = values.dtype.kind == "f" if declared.kind == "f" else np.array_equal(converted, values)
    if not is_right:
        raise ValueError(f"holds {values.dtype}, but meta/info.json says {feature.dtype}")
    return converted


def _check_counters(arrays: Mapping[str, np.ndarray], entry: EpisodeEntry, where: str) -> None:
    firsts = {"frame_index": 0, "index": entry.first_row}
    for name, first in firsts.items():
        if name not in arrays or first is None:
            continue
        values, expected = arrays[name][:, 0], first + np.arange(entry.length)
        if not np.array_equal(values, expected):
            row = int(np.argmax(values != expected))
            raise ValueError(f"{where}: row {row} has {name} {values[row]}, expected {expected[row]}.")


def _differ(one: FieldDescription | None, other: FieldDescription | None) -> bool:
    """True unless two descriptions agree; columns may be spelled differently, but not be in another order."""
    if one is None or other is None or one != replace(other, names=one.names):
        return True
    return one.names != other.names and sorted(one.names) == sorted(other.names)


def _texts(info: DatasetInfo, entry: EpisodeEntry, task_indices: np.ndarray | None) -> list[str]:
    """Return the instruction of every frame: that of its task_index, or the episode's first task without one."""
    if task_indices is None:
        return [entry.tasks[0] if entry.tasks else ""] * entry.length
    for frame, index in enumerate(task_indices[:, 0].tolist()):
        if index not in info.tasks:
            raise ValueError(
                f"{entry.data_uri}: episode {entry.index} has task_index {index} at frame {frame}, which is not "
                f"among the {len(info.tasks)} of meta/tasks."
            )
    return [info.tasks[index] for index in task_indices[:, 0].tolist()]


def find_row_images(entry: EpisodeEntry, camera: str, feature: Feature) -> CameraFrames:
    """Describe the images in, or named by, a column of an episode's rows.

    Raises:
        ValueError: there is no such column, or its first image is missing, broken, or of another size than info.json
            says.
    """
    origin = f"{entry.data_uri}: '{camera}' in episode {entry.index}"
    first = next(read_row_images(entry, camera, rows_at_once=1), b"")
    is_depth = first.startswith(_PNG) and first[24:26] == b"\x10\x00"  # 16 bits of grey
    try:
        height, width = (decode_depth(first) if is_depth else decode_image(first)).shape[-2:]
    except ValueError as error:
        raise ValueError(f"{origin}: image 0: {error}") from None
    _check_size((width, height), feature, f"{origin}: image 0")
    return CameraFrames(
        read=partial(read_row_images, entry, camera),
        size=(width, height),
        num_frames=entry.length,
        is_depth=is_depth,
        origin=origin,
    )


def _check_size(size: tuple[int, int], feature: Feature, where: str) -> None:
    if size not in feature.image_sizes:
        said = " or ".join(f"{width} x {height}" for width, height in feature.image_sizes)
        is_turned = size[::-1] in feature.image_sizes
        hint = " If EXIF or its display rotation turns it, correct the shape there." if is_turned else ""
        raise ValueError(f"{where} is {size[0]} x {size[1]} pixels, but meta/info.json says {said}.{hint}")


def read_row_images(entry: EpisodeEntry, camera: str, rows_at_once: int = _BATCH_ROWS) -> Iterator[bytes]:
    """Yield the encoded bytes of every image of an episode.

    Raises:
        ValueError: an image is missing.
    """
    number = 0
    for rows in read_episode_rows(entry.data_uri, entry.index, [camera], rows_at_once=rows_at_once):
        for value in rows.column(camera).to_pylist():
            yield _bytes_of(entry, camera, number, value)
            number += 1


def _bytes_of(entry: EpisodeEntry, camera: str, number: int, value: Any) -> bytes:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, str):
        data, path = None, data
    if isinstance(data, bytes):
        return data
    where = f"{entry.data_uri}: '{camera}' in episode {entry.index}: image {number}"
    if not isinstance(path, str) or not path:
        raise ValueError(f"{where} is null, or holds neither bytes nor a path.")
    places = _image_places(entry, camera, number, path)
    place = next((place for place in places if exists(place)), None)
    if place is None:
        raise ValueError(f"{where} is the file {path}, which is missing: there is no {places[0]}.")
    return read_bytes(place)


def _image_places(entry: EpisodeEntry, camera: str, number: int, path: str) -> list[str]:
    """Return where an image's file may be: where the row says, within the dataset; and where LeRobot writes images."""
    inside = posixpath.normpath(path)
    places = [] if inside.startswith(("..", "/")) else [join_uri(entry.root, inside)]
    folder = join_uri(entry.root, "images", camera)
    return [
        *places,
        join_uri(folder, f"episode_{entry.index:06d}", f"frame_{number:06d}.png"),
        join_uri(folder, f"episode-{entry.index:06d}", f"frame-{number:06d}.png"),
    ]


@register_converter("lerobot")
class LeRobotConverter(BaseRoboticsConverter):
    """Reads LeRobot datasets; see the module."""

    params: LeRobotParams

    def __init__(self, params: LeRobotParams) -> None:
        super().__init__(params)
        self._roots = [source.rstrip("/") for source in params.source_episodes]
        self._infos: dict[str, DatasetInfo] = {}

    @cached_property
    def _map(self) -> FieldMapParams | None:
        return None if self.params.field_map is None else field_map.load_field_map(self.params.field_map)

    def _info(self, root: str) -> DatasetInfo:
        if root not in self._infos:
            self._infos[root] = read_info(root)
        return self._infos[root]

    def discover_episodes(self) -> list[EpisodeRef]:
        """Find the episodes of all sources, sorted by source and index."""
        self.describe_fields()
        refs = []
        for root, name in zip(self._roots, unique_names(self._roots), strict=True):
            for entry in list_episodes(self._info(root)):
                refs.append(
                    EpisodeRef(
                        episode_id=f"{name}_episode_{entry.index:06d}",
                        source=f"{root} episode {entry.index}",
                        task=entry.tasks[0] if entry.tasks else None,
                        num_frames=entry.length,
                        payload=entry,
                    )
                )
        return refs

    def discover_cameras(self) -> list[str]:
        """Return the image and video features of all sources."""
        return list(dict.fromkeys(name for root in self._roots for name in self._info(root).cameras))

    def describe_fields(self) -> dict[str, FieldDescription]:
        """Return the fields that every source has.

        Raises:
            ValueError: a field is missing, or differs between two sources.
        """
        first_root = self._roots[0]
        first = self._described(first_root)
        for root in self._roots[1:]:
            described = self._described(root)
            names = {**first, **described}
            different = next((name for name in names if _differ(first.get(name), described.get(name))), None)
            if different is not None:
                raise ValueError(
                    f"field '{different}' differs between {first_root} ({first.get(different)}) and {root} "
                    f"({described.get(different)}). Convert them one by one, or choose fields that both have."
                )
        return first

    def pose_groups(self) -> tuple[PoseGroup, ...]:
        """Return the pose groups of the field map; without a map, none."""
        if self._map is None:
            return ()
        return field_map.pose_groups(self._map, self.describe_fields(), origin=str(self.params.field_map))

    def read_episode(self, ref: EpisodeRef) -> Episode:
        """Read an episode's rows; its images are read later."""
        entry: EpisodeEntry = ref.payload
        info = self._info(entry.root)
        fields = self._fields(info)
        sources = dict.fromkeys(field_map.source_of(name, field) for name, field in fields.items())
        arrays = read_rows(info, entry, list(sources))
        timestamps = arrays["timestamp"][:, 0].astype(np.float64)
        chosen = info.cameras if self.params.camera_names is None else self.params.camera_names
        cameras = {name: self._camera(info, entry, name, timestamps) for name in chosen if name in info.cameras}
        return Episode(
            ref=ref,
            fps=info.fps,
            timestamps=timestamps,
            fields=field_map.split_fields(fields, arrays),
            cameras={name: camera for name, camera in cameras.items() if camera is not None},
            instructions=Episode.instructions_of_frames(_texts(info, entry, arrays.get("task_index"))),
            metadata={"dataset": name_of(entry.root), "episode_index": entry.index},
        )

    def _camera(self, info: DatasetInfo, entry: EpisodeEntry, name: str, timestamps: np.ndarray) -> CameraFrames | None:
        """Describe the images of a camera; None: its video is missing, and such episodes shall be left out."""
        feature = info.features[name]
        if feature.dtype == "image":
            return find_row_images(entry, name, feature)
        video = entry.videos[name]
        if feature.is_depth_video:
            raise ValueError(
                f"{video.uri} is a depth video, which cannot be read. Leave '{name}' out of --camera_names."
            )
        tolerance = self.params.timestamp_tolerance
        frames = VideoFrames(video.uri, times=video.start + timestamps, fps=info.fps, tolerance=tolerance)
        try:
            size = frames.first_size()
        except FileNotFoundError:
            if self.params.skip_episodes_missing_cameras:
                return None
            raise ValueError(f"{video.uri} is missing: the video of camera '{name}'.") from None
        _check_size(size, feature, video.uri)
        return CameraFrames(read=frames.read, size=size, num_frames=len(timestamps), origin=video.uri)

    def _fields(self, info: DatasetInfo) -> Mapping[str, FieldParams]:
        """Return the fields to read from a dataset, in the form of a field map."""
        fields: dict[str, FieldParams] = {}
        observations, actions = self.params.observation_keys, self.params.action_keys
        if self._map is not None:
            fields |= self._map.fields
            observations, actions = observations or [], actions or []
        roles = {name: field_map.default_role(name) for name in info.signals}
        if observations is None:
            observations = [name for name in roles if roles[name] == "observation" and name not in (actions or ())]
        if actions is None:
            actions = [name for name in roles if roles[name] == "action" and name not in observations]
        fields |= self._whole_features(info, observations, "observation", fields)
        return fields | self._whole_features(info, actions, "action", fields)

    @staticmethod
    def _whole_features(
        info: DatasetInfo, names: list[str], role: Role, others: Mapping[str, FieldParams]
    ) -> dict[str, FieldParams]:
        known = [name for name, feature in info.features.items() if feature.is_number]
        for name in names:
            if name not in known:
                raise ValueError(f"{info.root}: " + unknown_name_message(f"{role}_keys", name, known))
            if name in others:
                raise ValueError(f"{role}_keys: '{name}' is a field already. Name it once.")
        return {name: FieldParams(role=role) for name in names}

    def _described(self, root: str) -> dict[str, FieldDescription]:
        info = self._info(root)
        sources = {
            name: field_map.Source(
                width=feature.width,
                dtype=field_map.stored_dtype(np.dtype(feature.dtype)),
                is_discrete=not feature.dtype.startswith("float"),
                names=feature.names,
            )
            for name, feature in info.features.items()
            if feature.is_number
        }
        return field_map.describe_fields(self._fields(info), sources, origin=root)
