"""LeRobot datasets of version 2.0, 2.1 and 3.0 (https://github.com/huggingface/lerobot): rows in parquet, and videos.

A source is the folder that holds meta/info.json: local, s3://, or hf://datasets/OWNER/NAME. Several sources must have
the same features and rate. Cameras keep the names of their features (`observation.images.top`), and so do fields,
unless a field map splits them:

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

Without a map all numbers are taken but bookkeeping (`index`, `next.reward`, ...); no poses are known then, so that
relative actions can not be made.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_foundry.params.commands.preprocessing_robotics import FieldMapParams, FieldParams, LeRobotParams
from vla_foundry.preprocessing.robotics.converters import field_map
from vla_foundry.preprocessing.robotics.converters.base import (
    BaseRoboticsConverter,
    CameraFrames,
    Episode,
    EpisodeRef,
    register_converter,
)
from vla_foundry.preprocessing.robotics.converters.episode_names import unique_names
from vla_foundry.preprocessing.robotics.converters.lerobot_images import find_row_images
from vla_foundry.preprocessing.robotics.converters.lerobot_meta import (
    DatasetInfo,
    EpisodeEntry,
    list_episodes,
    read_info,
    read_tasks,
)
from vla_foundry.preprocessing.robotics.converters.lerobot_rows import instructions_of, read_rows
from vla_foundry.preprocessing.robotics.converters.video import VideoFrames, read_video_size
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import FieldDescription, Role
from vla_foundry.storage.uri import name_of


@dataclass(frozen=True)
class _Dataset:
    """What every episode of a dataset needs."""

    info: DatasetInfo
    # task_index -> text
    tasks: dict[int, str]


@register_converter("lerobot")
class LeRobotConverter(BaseRoboticsConverter):
    """Reads LeRobot datasets; see the module."""

    params_class = LeRobotParams

    def __init__(self, params: LeRobotParams) -> None:
        super().__init__(params)
        self._roots = [source.rstrip("/") for source in params.source_episodes]
        self._datasets: dict[str, _Dataset] = {}
        self._map: FieldMapParams | None = None

    def discover_episodes(self) -> list[EpisodeRef]:
        """Find the episodes of all sources, by source and index."""
        self.describe_fields()
        refs = []
        for root, name in zip(self._roots, unique_names(self._roots), strict=True):
            for entry in list_episodes(self._dataset(root).info):
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
        return list(dict.fromkeys(name for root in self._roots for name in self._dataset(root).info.cameras))

    def describe_fields(self) -> dict[str, FieldDescription]:
        """Return the fields that every source has.

        Raises:
            ValueError: a field is not there, or two sources differ in it.
        """
        first_root = self._roots[0]
        first = self._described(first_root)
        for root in self._roots[1:]:
            described = self._described(root)
            different = next((name for name in {**first, **described} if first.get(name) != described.get(name)), None)
            if different is not None:
                raise ValueError(
                    f"field '{different}' differs between {first_root} ({first.get(different)}) and {root} "
                    f"({described.get(different)}). Convert them one by one, or choose fields that they share."
                )
        return first

    def pose_groups(self) -> tuple[PoseGroup, ...]:
        """Return the pose groups of the field map; none without one."""
        if self.params.field_map is None:
            return ()
        return field_map.pose_groups(self._field_map(), self.describe_fields(), origin=self.params.field_map)

    def read_episode(self, ref: EpisodeRef) -> Episode:
        """Read an episode's rows, and find its images."""
        entry: EpisodeEntry = ref.payload
        dataset = self._dataset(entry.root)
        info, fields = dataset.info, self._fields(dataset.info)
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
            instructions=instructions_of(arrays.get("task_index"), dataset.tasks, entry),
            metadata={"dataset": name_of(entry.root), "episode_index": entry.index},
        )

    def _camera(self, info: DatasetInfo, entry: EpisodeEntry, name: str, timestamps: np.ndarray) -> CameraFrames | None:
        """Find the images of a camera; None: its video is not there, and such episodes are to be left out."""
        feature = info.features[name]
        if feature.dtype == "image":
            return find_row_images(entry, name, feature.image_size)
        video = entry.videos[name]
        if feature.is_depth_video:
            raise ValueError(
                f"{video.uri} is a video of depth, which is not read. Leave '{name}' out of --camera_names."
            )
        try:
            size = read_video_size(video.uri)
        except FileNotFoundError:
            if self.params.skip_episodes_missing_cameras:
                return None
            raise ValueError(f"{video.uri} is missing: the video of camera '{name}'.") from None
        if size != feature.image_size:
            raise ValueError(
                f"{video.uri} is {size[0]} x {size[1]} pixels, but meta/info.json says {feature.image_size[0]} x "
                f"{feature.image_size[1]}."
            )
        tolerance = self.params.timestamp_tolerance
        return VideoFrames(video.uri, size, times=video.start + timestamps, fps=info.fps, tolerance=tolerance)

    def _dataset(self, root: str) -> _Dataset:
        if root not in self._datasets:
            info = read_info(root)
            self._datasets[root] = _Dataset(info, read_tasks(info))
        return self._datasets[root]

    def _field_map(self) -> FieldMapParams:
        if self._map is None:
            self._map = field_map.load_field_map(self.params.field_map)
        return self._map

    def _fields(self, info: DatasetInfo) -> Mapping[str, FieldParams]:
        """The fields that are taken of a dataset, as a field map has them."""
        fields: dict[str, FieldParams] = {}
        observations, actions = self.params.observation_keys, self.params.action_keys
        if self.params.field_map is not None:
            fields |= self._field_map().fields
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
        info = self._dataset(root).info
        sources = {
            name: field_map.Source(
                width=feature.width,
                dtype=field_map.stored_dtype(np.dtype(feature.dtype)),
                is_discrete=not feature.dtype.startswith("float"),
            )
            for name, feature in info.features.items()
            if feature.is_number
        }
        return field_map.describe_fields(self._fields(info), sources, origin=root)
