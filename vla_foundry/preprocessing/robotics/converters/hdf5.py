"""HDF5 recordings: robomimic, LIBERO, ALOHA, and any other layout that a field map can say.

A field map (`--field_map`) says which groups of a file are an episode, which arrays are fields and cameras, and where
rate and instruction stand. Three come with the package: field_maps/robomimic.yaml, libero.yaml and aloha.yaml; copy one
for another robot. Sources are folders, patterns or files, local or s3://.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.params.commands.preprocessing_robotics import CameraParams, FieldMapParams, HDF5Params
from vla_foundry.preprocessing.robotics.converters import field_map
from vla_foundry.preprocessing.robotics.converters.base import (
    BaseRoboticsConverter,
    CameraFrames,
    Episode,
    EpisodeRef,
    register_converter,
)
from vla_foundry.preprocessing.robotics.converters.episode_names import slug, unique_names
from vla_foundry.preprocessing.robotics.converters.hdf5_files import (
    find_array,
    find_frames,
    find_groups,
    open_hdf5,
    read_attribute,
    read_numbers,
)
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.storage.uri import list_files, name_of, parent_uri

if TYPE_CHECKING:
    import h5py

_ENDINGS = (".hdf5", ".h5")


@dataclass(frozen=True)
class _Place:
    """Where an episode is."""

    uri: str
    # path of its group; "": the whole file
    group: str


@register_converter("hdf5")
class HDF5Converter(BaseRoboticsConverter):
    """Reads HDF5 files; see the module."""

    params_class = HDF5Params

    def __init__(self, params: HDF5Params) -> None:
        super().__init__(params)
        self._loaded_map: FieldMapParams | None = None
        self._described: tuple[dict[str, FieldDescription], dict[str, CameraParams]] | None = None

    @property
    def _map(self) -> FieldMapParams:
        if self._loaded_map is None:
            self._loaded_map = field_map.load_field_map(self.params.field_map)
        return self._loaded_map

    def discover_episodes(self) -> list[EpisodeRef]:
        """Find the groups that are episodes, by file and number."""
        uris = self._files()
        names = unique_names([uri.rpartition(".")[0] for uri in uris], num_parts=2)
        refs = []
        for uri, name in zip(uris, names, strict=True):
            if not self._map.episodes.strip("/"):
                task = self.params.instruction or name_of(parent_uri(uri))
                refs.append(EpisodeRef(episode_id=name, source=uri, task=task, payload=_Place(uri, "")))
                continue
            with open_hdf5(uri) as file:
                task = self._instruction(file) or name
                groups = find_groups(file, self._map.episodes)
            if not groups:
                raise ValueError(f"{uri} has no group {self._map.episodes} (episodes in {self.params.field_map}).")
            for group in groups:
                episode_id = slug(f"{name}_{name_of(group)}")
                refs.append(EpisodeRef(episode_id, f"{uri} {group}", task=task, payload=_Place(uri, group)))
        return refs

    def _files(self) -> list[str]:
        uris = []
        for source in self.params.source_episodes:
            found = [uri for uri in list_files(source) if uri.lower().endswith(_ENDINGS)]
            if not found:
                raise ValueError(f"{source} holds no HDF5 file ({' or '.join(_ENDINGS)}).")
            uris += found
        return uris

    def discover_cameras(self) -> list[str]:
        """Return the cameras of the field map; where it says `*`, those of the first episode."""
        return list(self._first_episode()[1])

    def describe_fields(self) -> dict[str, FieldDescription]:
        """Return the fields of the field map, with the widths and types of the first episode."""
        return self._first_episode()[0]

    def pose_groups(self) -> tuple[PoseGroup, ...]:
        """Return the pose groups of the field map."""
        return field_map.pose_groups(self._map, self.describe_fields(), origin=self.params.field_map)

    def _first_episode(self) -> tuple[dict[str, FieldDescription], dict[str, CameraParams]]:
        """Look at the first episode: what its fields are, and how its cameras are stored."""
        if self._described is None:
            uri = self._files()[0]
            with open_hdf5(uri) as file:
                groups = find_groups(file, self._map.episodes)
                if not groups:
                    raise ValueError(f"{uri} has no group {self._map.episodes} (episodes in {self.params.field_map}).")
                sources = {}
                for name, field in self._map.fields.items():
                    path = field_map.source_of(name, field)
                    array = find_array(file, groups[0], path)
                    if array is not None:
                        width = int(np.prod(array.shape[1:]))
                        dtype = field_map.stored_dtype(array.dtype)
                        sources[path] = field_map.Source(width, dtype, is_discrete=array.dtype.kind != "f")
                described = field_map.describe_fields(self._map.fields, sources, origin=f"{uri}{groups[0]}")
                self._described = described, self._cameras_of(file, groups[0])
        return self._described

    def _cameras_of(self, file: "h5py.File", group: str) -> dict[str, CameraParams]:
        cameras = dict(self._map.cameras)
        any_camera = cameras.pop("*", None)
        if any_camera is None:
            return cameras
        folder = str(any_camera.source).removesuffix("/*")
        arrays: Any = file.get(f"{group}/{folder}")
        values = {name: getattr(any_camera, name) for name in ("is_bgr", "is_bottom_up", "depth_scale")}
        found = {name: CameraParams(source=f"{folder}/{name}", **values) for name in sorted(arrays or ())}
        return found | cameras

    def read_episode(self, ref: EpisodeRef) -> Episode:
        """Read an episode's numbers, and find its images."""
        place: _Place = ref.payload
        with open_hdf5(place.uri) as file:
            arrays = self._read_fields(file, place)
            num_frames = len(next(iter(arrays.values())))
            _check_length(file, place, num_frames)
            cameras: dict[str, CameraFrames] = {}
            for name, camera in self._cameras_of(file, place.group).items():
                array = find_array(file, place.group, camera.source or name)
                if array is not None and (self.params.camera_names is None or name in self.params.camera_names):
                    cameras[name] = find_frames(place.uri, array, camera)
            fps = self._fps(file)
            instruction = self._instruction(file)
        return Episode(
            ref=ref,
            fps=fps,
            timestamps=np.arange(num_frames) / fps,
            fields=field_map.split_fields(self._map.fields, arrays),
            cameras=cameras,
            instructions=Episode.one_instruction(instruction, num_frames),
            metadata={"file": name_of(place.uri), "group": place.group or "/"},
        )

    def _read_fields(self, file: "h5py.File", place: _Place) -> dict[str, np.ndarray]:
        arrays = {}
        for name, field in self._map.fields.items():
            path = field_map.source_of(name, field)
            where = f"{place.uri}: {place.group}/{path}"
            array = find_array(file, place.group, path)
            if array is None:
                raise ValueError(f"{where} is missing (field {name}).")
            arrays[path] = read_numbers(array, where)
            if field.columns is not None and field.columns[1] > arrays[path].shape[1]:
                raise ValueError(
                    f"{where} has {arrays[path].shape[1]} columns, but field {name} takes {list(field.columns)}."
                )
            first = next(iter(arrays))
            if len(arrays[path]) != len(arrays[first]):
                raise ValueError(f"{where} has {len(arrays[path])} rows, but {first} has {len(arrays[first])}.")
        return arrays

    def _fps(self, file: "h5py.File") -> float:
        place = self.params.fps or self._map.fps
        if place is None:
            raise ValueError("the field map does not say how many frames a second there are. Give --fps.")
        if not isinstance(place, str):
            return float(place)
        value = read_attribute(file, place)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{file.filename}: {place} is {value!r}, not frames a second. Give --fps.")
        return float(value)

    def _instruction(self, file: "h5py.File") -> str | None:
        if self.params.instruction is not None or self._map.instruction is None:
            return self.params.instruction
        value = read_attribute(file, self._map.instruction)
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{file.filename}: {self._map.instruction} is {value!r}, not a text.")
        return " ".join(words).strip() or None


def _check_length(file: "h5py.File", place: _Place, num_frames: int) -> None:
    """Compare with the number of frames that robomimic's files say an episode has."""
    said = file[place.group or "/"].attrs.get("num_samples")
    if said is not None and int(said) != num_frames:
        raise ValueError(
            f"{place.uri}: {place.group} has {num_frames} frames, but its attribute num_samples says {said}."
        )
