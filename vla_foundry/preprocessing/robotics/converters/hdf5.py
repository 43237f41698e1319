"""Convert HDF5 recordings: robomimic, LIBERO, ALOHA, and any other layout that a field map can describe.

A field map (`--field_map`) says which groups of a file are episodes, which arrays are fields and cameras, and where to
find the rate and the instruction. The package has field_maps/robomimic.yaml, libero.yaml and aloha.yaml; copy one for
another robot. Sources are folders, patterns or files, local or s3://.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.images.codec import check_size, decode_image
from vla_foundry.params.commands.preprocessing_robotics import CameraParams, FieldMapParams, HDF5Params
from vla_foundry.parsing import parse_record
from vla_foundry.preprocessing.robotics.converters import field_map
from vla_foundry.preprocessing.robotics.converters.converter import (
    BaseRoboticsConverter,
    CameraFrames,
    Episode,
    EpisodeRef,
    name_broken_file,
    register_converter,
    slug,
    unique_names,
)
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.storage.npz import MAX_INFLATED_BYTES
from vla_foundry.storage.uri import is_remote, list_visible, name_of, open_input, parent_uri

if TYPE_CHECKING:
    import h5py

# bytes of images to read at once
_BLOCK_BYTES = 64 << 20
_LARGEST_DEPTH = 65535
_ENDINGS = (".hdf5", ".h5")


@contextmanager
def open_hdf5(uri: str) -> "Iterator[h5py.File]":
    """Open a file; any error in its bytes, now or while it is read, becomes a ValueError that names it."""
    try:
        import h5py
    except ImportError:
        raise ValueError(
            "HDF5 files need h5py, which is not installed: uv pip install 'vla-foundry[preprocessing]'"
        ) from None
    with name_broken_file(uri, "HDF5 file", OSError, RuntimeError), ExitStack() as stack:
        source = stack.enter_context(open_input(uri)) if is_remote(uri) else uri
        yield stack.enter_context(h5py.File(source, "r"))


def find_groups(file: "h5py.File", pattern: str) -> list[str]:
    """Return the paths of the groups that match a pattern, level by level; demo_2 comes before demo_10."""
    found = [""]
    for part in pattern.strip("/").split("/") if pattern.strip("/") else []:
        matching = []
        for path in found:
            group: Any = file[path or "/"]
            names = [name for name in group if fnmatchcase(name, part)]
            matching += [f"{path}/{name}" for name in names if hasattr(_open(file, f"{path}/{name}"), "keys")]
        found = matching
    return sorted(found, key=_natural_order)


def _natural_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def read_attribute(file: "h5py.File", place: str) -> Any:
    """Read `group@attribute`, or a value within an attribute that holds JSON: `group@attribute:key.of.it`.

    Raises:
        ValueError: there is no such attribute or key.
    """
    path, _, rest = place.partition("@")
    name, _, keys = rest.partition(":")
    group = _open(file, path.strip("/") or "/")
    if group is None or name not in group.attrs:
        raise ValueError(f"{file_name(file)} has no attribute '{name}' in '{path}' ({place} in the field map).")
    value: Any = group.attrs[name]
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not keys:
        return value.item() if isinstance(value, np.generic) else value
    try:
        value = parse_record(value, "it")
        for key in keys.split("."):
            value = value[key]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file_name(file)}: attribute '{name}' of '{path}' holds no '{keys}' ({error!r}).") from None
    return value


def file_name(file: "h5py.File") -> str:
    """Return a file's name, for messages."""
    name = file.filename
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def find_array(file: "h5py.File", group: str, path: str) -> "h5py.Dataset | None":
    """Return the array at a path within a group; None if there is none.

    Raises:
        ValueError: its values lie in another file, or it is virtual and a part of it is missing.
    """
    found = _open(file, f"{group}/{path}")
    if not hasattr(found, "shape"):
        return None
    _check_inside(file, found, f"{group}/{path}", ())
    return found


def _check_inside(file: "h5py.File", array: "h5py.Dataset", path: str, parents: tuple[str, ...]) -> None:
    """Refuse an array that takes values from another file, directly or through virtual arrays of this one."""
    for name, *_ in array.external or ():
        raise ValueError(_outside(file, path, name))
    for source in array.virtual_sources() if array.is_virtual else ():
        if source.file_name != ".":
            raise ValueError(_outside(file, path, source.file_name))
        part = _open(file, source.dset_name)
        if not hasattr(part, "shape") or source.dset_name in parents:  # HDF5 would fill in zeros
            raise ValueError(f"{file_name(file)}: {path} is virtual, and its part {source.dset_name} is missing.")
        _check_inside(file, part, f"{path}, of {source.dset_name},", (*parents, source.dset_name))


def _open(file: "h5py.File", path: str) -> Any:
    """Return the group or array at a path; None if there is none, or an external link leads nowhere.

    Raises:
        ValueError: an external link leads to another file.
    """
    found: Any = file.get(path)
    if found is not None and found.file != file:
        raise ValueError(_outside(file, path, found.file.filename))
    return found


def _outside(file: "h5py.File", path: str, other: str) -> str:
    return f"{file_name(file)}: {path} is stored in another file ({other}). Copy it into this one."


def read_numbers(array: "h5py.Dataset", where: str) -> np.ndarray:
    """Read an array of numbers as (L, width).

    Raises:
        ValueError: it holds something else.
    """
    if array.dtype.kind not in "fiub" or not array.shape:
        raise ValueError(f"{where} holds {array.dtype} of shape {array.shape}, not one row of numbers per frame.")
    _check_room(array.shape, array.dtype, where)
    _check_chunks(array, where)
    values = array[()]
    return values.reshape(len(values), -1)


def _check_room(shape: Sequence[int], dtype: np.dtype[Any], where: str) -> None:
    """Refuse to read more bytes at once than an honest file has: HDF5 stores values that were never written nowhere."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > MAX_INFLATED_BYTES:
        raise ValueError(f"{where} holds {num_bytes:,} bytes to read at once; the limit is {MAX_INFLATED_BYTES:,}.")


def _check_chunks(array: "h5py.Dataset", where: str) -> None:
    """Refuse large chunks: HDF5 unpacks whole ones, also where the array has only a part of them."""
    if array.chunks:
        _check_room(array.chunks, array.dtype, f"{where}: a chunk")


def file_bytes(stored: Any) -> bytes:
    """Return the bytes of an image file, without the zeros that pad it."""
    data = stored if isinstance(stored, bytes) else np.asarray(stored, dtype=np.uint8).tobytes()
    return data.rstrip(b"\0")


def find_frames(uri: str, array: "h5py.Dataset", camera: CameraParams) -> CameraFrames:
    """Describe the images of an array: pixels, depth, or the bytes of image files.

    Raises:
        ValueError: the array holds something else.
    """
    path, shape, kind = str(array.name), array.shape, array.dtype
    where = f"{uri}: {path}"
    is_depth, is_encoded = camera.depth_scale is not None, False
    if is_depth:
        if kind.kind not in "fu" or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 1):
            raise ValueError(f"{where} holds {kind} of shape {shape}, not depth (L, H, W).")
        height, width = shape[1:3]
    elif kind == np.uint8 and len(shape) == 4 and 3 in (shape[1], shape[3]):
        height, width = shape[1:3] if shape[3] == 3 else shape[2:4]
    elif len(shape) in (1, 2) and (kind == np.uint8 or kind.hasobject) and shape[0]:
        is_encoded = True
        _check_room(shape[1:], kind, where)
        _check_chunks(array, where)
        try:
            height, width = decode_image(file_bytes(array[0])).shape[1:]
        except ValueError as error:
            raise ValueError(f"{where}: image 0: {error}") from None
    else:
        raise ValueError(f"{where} holds {kind} of shape {shape}, not images (L, H, W, 3) of uint8, nor JPEG bytes.")

    check_size((height, width), f"{where}: an image")
    _check_chunks(array, where)

    def read() -> Iterator[np.ndarray | bytes]:
        for number, stored in enumerate(_read_rows(uri, path)):
            try:
                yield _image_of(file_bytes(stored) if is_encoded else stored, camera)
            except ValueError as error:
                raise ValueError(f"{where}: image {number}: {error}") from None

    return CameraFrames(read=read, size=(width, height), num_frames=shape[0], is_depth=is_depth, origin=where)


def _read_rows(uri: str, path: str) -> Iterator[Any]:
    with open_hdf5(uri) as file:
        array: Any = file[path]
        rows = array.chunks[0] if array.chunks else 16
        row_bytes = max(1, array.dtype.itemsize * math.prod(array.shape[1:]))
        rows = max(1, min(rows, _BLOCK_BYTES // row_bytes))
        for start in range(0, array.shape[0], rows):
            yield from array[start : start + rows]


def _image_of(stored: np.ndarray | bytes, camera: CameraParams) -> np.ndarray | bytes:
    """Return an image upright and in RGB; a file's bytes stay as they are where nothing has to change."""
    if isinstance(stored, bytes):
        if not camera.is_bgr and not camera.is_bottom_up:
            return stored
        image = decode_image(stored).permute(1, 2, 0).numpy()
    elif camera.depth_scale is not None:
        depth = stored.reshape(stored.shape[:2]).astype(np.float64) * camera.depth_scale
        image = np.nan_to_num(depth, posinf=0, neginf=0).round().clip(0, _LARGEST_DEPTH).astype(np.uint16)
    else:
        image = stored if stored.shape[-1] == 3 else stored.transpose(1, 2, 0)
    image = image[::-1] if camera.is_bottom_up else image
    return np.ascontiguousarray(image[..., ::-1] if camera.is_bgr and camera.depth_scale is None else image)


@dataclass(frozen=True)
class _Place:
    """Where an episode is."""

    uri: str
    # path of its group; "": the file itself
    group: str


@register_converter("hdf5")
class HDF5Converter(BaseRoboticsConverter):
    """Reads HDF5 files; see the module."""

    params: HDF5Params

    @cached_property
    def _map(self) -> FieldMapParams:
        return field_map.load_field_map(self.params.field_map)

    def discover_episodes(self) -> list[EpisodeRef]:
        """Find the groups that are episodes, sorted by file and number."""
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
                groups = self._groups(file)
            for group in groups:
                episode_id = slug(f"{name}_{name_of(group)}")
                refs.append(EpisodeRef(episode_id, f"{uri} {group}", task=task, payload=_Place(uri, group)))
        return refs

    def _groups(self, file: "h5py.File") -> list[str]:
        groups = find_groups(file, self._map.episodes)
        if not groups:
            raise ValueError(
                f"{file_name(file)} has no group {self._map.episodes} (episodes in {self.params.field_map})."
            )
        return groups

    def _files(self) -> list[str]:
        uris = []
        for source in self.params.source_episodes:
            found = [uri for uri in list_visible(source) if uri.lower().endswith(_ENDINGS)]
            if not found:
                raise ValueError(f"{source} holds no HDF5 file ({' or '.join(_ENDINGS)}).")
            uris += found
        return uris

    def discover_cameras(self) -> list[str]:
        """Return the cameras of the field map; for `*`, those of the first episode."""
        return list(self._first_episode[1])

    def describe_fields(self) -> dict[str, FieldDescription]:
        """Return the fields of the field map, with the widths and types of the first episode."""
        return self._first_episode[0]

    def pose_groups(self) -> tuple[PoseGroup, ...]:
        """Return the pose groups of the field map."""
        return field_map.pose_groups(self._map, self.describe_fields(), origin=self.params.field_map)

    @cached_property
    def _first_episode(self) -> tuple[dict[str, FieldDescription], dict[str, CameraParams]]:
        """The fields and the cameras of the first episode."""
        uri = self._files()[0]
        with open_hdf5(uri) as file:
            group, sources = self._groups(file)[0], {}
            for name, field in self._map.fields.items():
                path = field_map.source_of(name, field)
                array = find_array(file, group, path)
                if array is not None:
                    width = math.prod(array.shape[1:])
                    dtype = field_map.stored_dtype(array.dtype)
                    sources[path] = field_map.Source(width, dtype, is_discrete=array.dtype.kind != "f")
            described = field_map.describe_fields(self._map.fields, sources, origin=f"{uri}{group}")
            return described, self._cameras_of(file, group)

    def _cameras_of(self, file: "h5py.File", group: str) -> dict[str, CameraParams]:
        cameras = dict(self._map.cameras)
        any_camera = cameras.pop("*", None)
        if any_camera is None:
            return cameras
        folder = str(any_camera.source).removesuffix("/*")
        arrays = _open(file, f"{group}/{folder}")
        values = {name: getattr(any_camera, name) for name in ("is_bgr", "is_bottom_up", "depth_scale")}
        found = {name: CameraParams(source=f"{folder}/{name}", **values) for name in sorted(arrays or ())}
        return found | cameras

    def read_episode(self, ref: EpisodeRef) -> Episode:
        """Read an episode's numbers; its images are read later."""
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
            raise ValueError("the field map does not say how many frames per second there are. Give --fps.")
        if not isinstance(place, str):
            return float(place)
        value = read_attribute(file, place)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{file.filename}: {place} is {value!r}, not frames per second. Give --fps.")
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
    """Compare with the number of frames in robomimic's attribute num_samples."""
    said = file[place.group or "/"].attrs.get("num_samples")
    if said is not None and int(said) != num_frames:
        raise ValueError(
            f"{place.uri}: {place.group} has {num_frames} frames, but its attribute num_samples says {said}."
        )
