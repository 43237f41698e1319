"""HDF5 files: opened with errors that name them, episodes in them, attributes, arrays of numbers and of images."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.images.codec import decode_image
from vla_foundry.params.commands.preprocessing_robotics import CameraParams
from vla_foundry.storage.uri import is_remote, open_input

if TYPE_CHECKING:
    import h5py

# bytes of images that are read at once
_BLOCK_BYTES = 64 << 20
_JPEG = b"\xff\xd8\xff"
_LARGEST_DEPTH = 65535


@contextmanager
def open_hdf5(uri: str) -> "Iterator[h5py.File]":
    """Open a file; what is wrong with it, now or while it is read, becomes a ValueError that names it."""
    try:
        import h5py
    except ImportError:
        raise ValueError(
            "HDF5 files need h5py, which is not installed: uv pip install 'vla-foundry[preprocessing]'"
        ) from None
    try:
        if is_remote(uri):
            with open_input(uri) as remote, h5py.File(remote, "r") as file:
                yield file
        else:
            with h5py.File(uri, "r") as file:
                yield file
    except FileNotFoundError:
        raise ValueError(f"{uri} is missing.") from None
    except (OSError, RuntimeError) as error:  # what h5py raises for broken bytes
        if getattr(error, "errno", None) is not None:  # trouble of the machine or the network
            raise
        raise ValueError(f"{uri} is no whole HDF5 file ({' '.join(str(error).split())[:200]}).") from None


def find_groups(file: "h5py.File", pattern: str) -> list[str]:
    """Paths of the groups that match a pattern, one part a level; demo_2 stands before demo_10."""
    found = [""]
    for part in pattern.strip("/").split("/") if pattern.strip("/") else []:
        matching = []
        for path in found:
            group: Any = file[path or "/"]
            names = [name for name in group if fnmatchcase(name, part)]
            matching += [f"{path}/{name}" for name in names if hasattr(file.get(f"{path}/{name}"), "keys")]
        found = matching
    return sorted(found, key=_natural_order)


def _natural_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def read_attribute(file: "h5py.File", place: str) -> Any:
    """Read `group@attribute`, or a value within an attribute that holds JSON: `group@attribute:key.of.it`.

    Raises:
        ValueError: there is no such thing.
    """
    path, _, rest = place.partition("@")
    name, _, keys = rest.partition(":")
    group: Any = file.get(path.strip("/") or "/")
    if group is None or name not in group.attrs:
        raise ValueError(f"{file_name(file)} has no attribute '{name}' in '{path}' ({place} in the field map).")
    value: Any = group.attrs[name]
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not keys:
        return value.item() if isinstance(value, np.generic) else value
    try:
        value = json.loads(value)
        for key in keys.split("."):
            value = value[key]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{file_name(file)}: attribute '{name}' of '{path}' holds no '{keys}' ({error!r}).") from None
    return value


def file_name(file: "h5py.File") -> str:
    """What a file is called in messages."""
    name = file.filename
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def find_array(file: "h5py.File", group: str, path: str) -> "h5py.Dataset | None":
    """The array at a path within a group; None if there is none."""
    found = file.get(f"{group}/{path}")
    return found if found is not None and hasattr(found, "shape") else None  # pyright: ignore[reportReturnType]


def read_numbers(array: "h5py.Dataset", where: str) -> np.ndarray:
    """Read an array of numbers as (L, width).

    Raises:
        ValueError: it holds something else.
    """
    if array.dtype.kind not in "fiub" or not array.shape:
        raise ValueError(f"{where} holds {array.dtype} of shape {array.shape}, not one row of numbers a frame.")
    values = array[()]
    return values.reshape(len(values), -1)


@dataclass(frozen=True)
class HDF5Frames:
    """The images of a camera in an HDF5 file; see `CameraFrames`."""

    uri: str
    # path in the file
    path: str
    # how they are stored
    camera: CameraParams
    # (W, H)
    size: tuple[int, int]
    num_frames: int
    # bytes of image files rather than pixels
    is_encoded: bool = False
    # of the first image, and so of all
    is_jpeg: bool = False

    @property
    def is_depth(self) -> bool:
        """True for depth."""
        return self.camera.depth_scale is not None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the images: uint8 (H, W, 3), or uint16 (H, W) millimetres of depth.

        Raises:
            ValueError: the file is broken, or an image can not be decoded or has another size.
        """
        for number, stored in enumerate(self._read()):
            yield self._image_of(number, stored)

    def encoded(self) -> Iterator[bytes] | None:
        """Yield the JPEGs, each of which is tried to decode; None where pixels are stored, or have to be changed."""
        is_kept = self.is_jpeg and not self.camera.is_bgr and not self.camera.is_bottom_up
        return self._checked_jpegs() if is_kept else None

    def _checked_jpegs(self) -> Iterator[bytes]:
        for number, stored in enumerate(self._read()):
            data = file_bytes(stored)
            if not data.startswith(_JPEG):
                raise ValueError(f"{self._where(number)} is no JPEG, though the first image is one.")
            self._image_of(number, stored)
            yield data

    def _read(self) -> Iterator[Any]:
        with open_hdf5(self.uri) as file:
            array: Any = file[self.path]
            rows = array.chunks[0] if array.chunks else 16
            row_bytes = max(1, array.dtype.itemsize * int(np.prod(array.shape[1:])))
            rows = max(1, min(rows, _BLOCK_BYTES // row_bytes))
            for start in range(0, self.num_frames, rows):
                yield from array[start : start + rows]

    def _image_of(self, number: int, stored: Any) -> np.ndarray:
        if self.is_encoded:
            try:
                image = decode_image(file_bytes(stored)).permute(1, 2, 0).numpy()
            except ValueError as error:
                raise ValueError(f"{self._where(number)}: {error}") from None
        elif self.camera.depth_scale is not None:
            depth = stored.reshape(stored.shape[:2]).astype(np.float64) * self.camera.depth_scale
            image = np.nan_to_num(depth, posinf=0, neginf=0).round().clip(0, _LARGEST_DEPTH).astype(np.uint16)
        else:
            image = stored if stored.shape[-1] == 3 else stored.transpose(1, 2, 0)
        height, width = image.shape[:2]
        if (width, height) != self.size:
            raise ValueError(
                f"{self._where(number)} is {width} x {height} pixels, the first one {self.size[0]} x {self.size[1]}."
            )
        image = image[::-1] if self.camera.is_bottom_up else image
        return np.ascontiguousarray(image[..., ::-1] if self.camera.is_bgr and not self.is_depth else image)

    def _where(self, number: int) -> str:
        return f"{self.uri}: image {number} of {self.path}"


def file_bytes(stored: Any) -> bytes:
    """The bytes of an image file, without the zeros that it is padded with."""
    data = stored if isinstance(stored, bytes) else np.asarray(stored, dtype=np.uint8).tobytes()
    return data.rstrip(b"\0")


def find_frames(uri: str, array: "h5py.Dataset", camera: CameraParams) -> HDF5Frames:
    """Find out what the images of an array are.

    Raises:
        ValueError: they are no images.
    """
    path, shape, kind = str(array.name), array.shape, array.dtype
    where = f"{uri}: {path}"
    if camera.depth_scale is not None:
        if kind.kind not in "fu" or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 1):
            raise ValueError(f"{where} holds {kind} of shape {shape}, not depth (L, H, W).")
        return HDF5Frames(uri, path, camera, (shape[2], shape[1]), shape[0])
    if kind == np.uint8 and len(shape) == 4 and 3 in (shape[1], shape[3]):
        height, width = shape[1:3] if shape[3] == 3 else shape[2:4]
        return HDF5Frames(uri, path, camera, (width, height), shape[0])
    if len(shape) not in (1, 2) or not (kind == np.uint8 or kind.hasobject) or not shape[0]:
        raise ValueError(f"{where} holds {kind} of shape {shape}, not images (L, H, W, 3) of uint8, nor JPEG bytes.")
    data = file_bytes(array[0])
    try:
        image = decode_image(data)
    except ValueError as error:
        raise ValueError(f"{where}: image 0: {error}") from None
    size = (image.shape[2], image.shape[1])
    return HDF5Frames(uri, path, camera, size, shape[0], is_encoded=True, is_jpeg=data.startswith(_JPEG))
