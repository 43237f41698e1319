"""Read the files of an LBM recording: single arrays and images of .npz archives, YAML and JSON.

Nothing is unpickled: an array of Python objects is an error.
"""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vla_foundry.images.codec import check_size
from vla_foundry.preprocessing.robotics.converters.converter import CameraFrames, name_broken_file
from vla_foundry.storage.npz import MAX_INFLATED_BYTES
from vla_foundry.storage.uri import open_input, read_json, read_yaml


@dataclass(frozen=True)
class ArrayHeader:
    """Shape and type of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool = False


class Npz:
    """An open .npz; see `open_npz`."""

    def __init__(self, uri: str, archive: zipfile.ZipFile) -> None:
        self.uri = uri
        self._archive = archive

    @property
    def names(self) -> list[str]:
        """Names of the arrays, in the order of the file."""
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def header(self, name: str) -> ArrayHeader:
        """Read an array's header."""
        with self._open(name) as file:
            return self._read_header(name, file)

    def read(self, name: str) -> np.ndarray:
        """Read a whole array."""
        header = self.header(name)
        with self._open(name) as file:
            self._read_header(name, file)
            count = math.prod(header.shape)
            if count * header.dtype.itemsize > MAX_INFLATED_BYTES:
                raise ValueError(f"{self.uri}: array '{name}' of shape {header.shape} is too large to read.")
            data = file.read(count * header.dtype.itemsize + 1)
        if len(data) != count * header.dtype.itemsize:
            raise ValueError(f"{self.uri}: array '{name}' is cut off, or larger than its header says.")
        array = np.frombuffer(data, dtype=header.dtype, count=count)
        return array.reshape(header.shape, order="F" if header.is_fortran else "C")

    def iterate(self, name: str) -> Iterator[np.ndarray]:
        """Yield the rows of an array, with one in memory at a time."""
        with self._open(name) as file:
            header = self._read_header(name, file)
            if header.is_fortran:
                raise ValueError(f"{self.uri}: array '{name}' is in Fortran order. Save it with np.ascontiguousarray.")
            size = math.prod(header.shape[1:]) * header.dtype.itemsize
            for row in range(header.shape[0]):
                data = file.read(size)
                if len(data) < size:
                    raise ValueError(f"{self.uri}: array '{name}' is cut off at row {row}.")
                yield np.frombuffer(data, dtype=header.dtype).reshape(header.shape[1:])
            file.read(1)  # reach the end, where zipfile compares the checksum

    def _open(self, name: str) -> Any:
        if f"{name}.npy" not in self._archive.NameToInfo:
            raise ValueError(f"{self.uri} has no array '{name}', only {', '.join(self.names)[:300]}.")
        return self._archive.open(f"{name}.npy")

    def _read_header(self, name: str, file: Any) -> ArrayHeader:
        formats = np.lib.format
        try:
            version = formats.read_magic(file)
            read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
        except ValueError as error:
            raise ValueError(f"{self.uri}: array '{name}' has a broken header ({error}).") from None
        if dtype.hasobject:
            raise ValueError(f"{self.uri}: array '{name}' holds pickled Python objects, which are not loaded.")
        return ArrayHeader(shape, dtype, is_fortran)


@contextmanager
def open_npz(uri: str) -> Iterator[Npz]:
    """Open a file; any error in its bytes, now or while it is read, becomes a ValueError that names it."""
    errors = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
    with name_broken_file(uri, ".npz", *errors), open_input(uri) as file, zipfile.ZipFile(file) as archive:
        yield Npz(uri, archive)


def read_images(uri: str, name: str) -> Iterator[np.ndarray]:
    """Yield the images of an array: uint8 (H, W, 3), or uint16 (H, W) for depth.

    Raises:
        ValueError: the file is broken.
    """
    with open_npz(uri) as npz:
        yield from npz.iterate(name)


def find_frames(npz: Npz, name: str) -> CameraFrames:
    """Describe the images of an array (L, H, W, 3) uint8, or (L, H, W) uint16 for depth.

    Raises:
        ValueError: the array holds something else.
    """
    header = npz.header(name)
    is_depth = header.dtype == np.uint16 and len(header.shape) == 3
    if not is_depth and not (header.dtype == np.uint8 and len(header.shape) == 4 and header.shape[3] == 3):
        raise ValueError(
            f"{npz.uri}: camera '{name}' holds {header.dtype} {header.shape}, expected uint8 (L, H, W, 3), or "
            "uint16 (L, H, W) for depth."
        )
    num_frames, height, width = header.shape[:3]
    check_size((height, width), f"{npz.uri}: camera '{name}'")
    return CameraFrames(
        read=partial(read_images, npz.uri, name),
        size=(width, height),
        num_frames=num_frames,
        is_depth=is_depth,
        origin=f"{npz.uri}: camera '{name}'",
    )


def read_mapping(uri: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: the file is missing or broken.
    """
    try:
        values = read_yaml(uri)
    except FileNotFoundError:
        raise ValueError(f"{uri} is missing.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{uri} must hold a mapping, got {type(values).__name__}.")
    return values


def read_episode_lists(uri: str) -> dict[str, list[int]]:
    """Read {task: [episode, ...]} from JSON.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        values = read_json(uri)
    except FileNotFoundError:
        raise ValueError(f"{uri} is missing.") from None
    is_valid = isinstance(values, dict) and all(
        isinstance(numbers, list) and all(isinstance(number, int) for number in numbers) for numbers in values.values()
    )
    if not is_valid:
        raise ValueError(f"{uri} must be {{task: [episode number, ...]}}.")
    return values
