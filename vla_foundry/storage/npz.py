"""Read single arrays of an .npz, or a range of their rows, without reading the rest of the file; and write an .npz.

NumPy opens an .npz through `zipfile`, which takes longer than reading a window of robot data. This module reads the
directory at the end of the file once. For each requested array it reads the header and only the requested bytes: a
range of rows, if the array is stored uncompressed. It never unpickles. It writes the bytes that `zipfile` would.
"""

import ast
import io
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.lib import format as npy

from vla_foundry.registry import unknown_name_message

P = ParamSpec("P")
R = TypeVar("R")
# (offset, size) -> the bytes there
ReadRange = Callable[[int, int], bytes]

_END = struct.Struct("<4s4H2IH")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_STORED, _DEFLATED = 0, 8
# bytes to read at once: the directory of about 80 arrays; the header before an array's values
_TAIL_SIZE, _HEAD_SIZE = 8192, 320
_MAGIC = b"\x93NUMPY"
# NumPy reads no longer header either
_MAX_HEADER = 10_000
# most bytes that the compressed arrays of a file (a sample, an episode) may inflate to
MAX_INFLATED_BYTES = 1 << 30


@dataclass(frozen=True)
class _Entry:
    """A member, as the directory lists it."""

    method: int
    crc: int
    # bytes in the file
    size: int
    # offset of its local header
    offset: int


@dataclass(frozen=True)
class _Header:
    """The header of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool


def _names_file(method: "Callable[Concatenate[NpzFile, P], R]") -> "Callable[Concatenate[NpzFile, P], R]":
    """Let each error of a method begin with the file's name, once."""

    @wraps(method)
    def call(self: "NpzFile", *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except ValueError as error:
            if str(error).startswith(self._prefix):
                raise
            raise ValueError(f"{self._prefix}{error}") from None

    return call


class NpzFile:
    """An .npz, read array by array.

    Args:
        read: reads a byte range of the file.
        size: size of the file in bytes.
        is_checked: the file's own checksum was compared; False: an array is checked before its first rows are read.
        origin: the file's name, which begins each error; "": the caller names it.

    Raises:
        ValueError: the file is not a complete .npz.
    """

    def __init__(self, read: ReadRange, size: int, *, is_checked: bool = True, origin: str = "") -> None:
        self._read_range = read
        self._is_checked = is_checked
        self._prefix = origin and f"{origin}: "
        self._entries = self._read_directory(size)
        # (header, where the values begin) of stored arrays
        self._headers: dict[str, tuple[_Header, int]] = {}
        self._checked: set[str] = set()
        self._num_inflated = 0

    @classmethod
    def from_bytes(cls, content: bytes) -> "NpzFile":
        """Open an .npz in memory."""
        view = memoryview(content)
        return cls(lambda offset, size: bytes(view[offset : offset + size]), len(content))

    @property
    def names(self) -> list[str]:
        """The arrays, in the order of the file."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @_names_file
    def read(self, name: str) -> np.ndarray:
        """Return an array and check its checksum.

        Raises:
            ValueError: the array does not exist, is damaged, or holds Python objects.
        """
        entry = self._find(name)
        start = self._find_content(name, entry)
        content = self._read_exactly(name, start, entry.size)
        if entry.method == _DEFLATED:
            content = _inflate(name, content, MAX_INFLATED_BYTES - self._num_inflated)
            self._num_inflated += len(content)
        elif entry.method != _STORED:
            raise ValueError(f"array '{name}' uses compression method {entry.method}, which NumPy does not write")
        if zlib.crc32(content) != entry.crc:
            raise ValueError(f"array '{name}' is damaged: its checksum differs")
        header, skip = _parse_header(name, content)
        return _array_of(name, header, content[skip:], header.shape)

    @_names_file
    def read_rows(self, name: str, first: int, end: int) -> np.ndarray:
        """Return rows first .. end - 1 of an array; an uncompressed array is read no further.

        Raises:
            ValueError: the array does not exist, has fewer rows, is damaged, or holds Python objects.
        """
        entry = self._find(name)
        if entry.method != _STORED:
            return self._rows_of(name, self.read(name), first, end)
        if not self._is_checked and name not in self._checked:
            self.read(name)
            self._checked.add(name)
        header, start = self._read_header(name, entry)
        if header.is_fortran or not header.shape:
            return self._rows_of(name, self.read(name), first, end)
        if not 0 <= first <= end <= header.shape[0]:
            raise ValueError(f"array '{name}' has {header.shape[0]} rows, not {end}")
        row_size = header.dtype.itemsize * math.prod(header.shape[1:])
        content = self._read_exactly(name, start + first * row_size, (end - first) * row_size)
        return _array_of(name, header, content, (end - first, *header.shape[1:]))

    @_names_file
    def shape(self, name: str) -> tuple[int, ...]:
        """Return an array's shape; an uncompressed array is read no further than its header.

        Raises:
            ValueError: the array does not exist or is damaged.
        """
        entry = self._find(name)
        return self._read_header(name, entry)[0].shape if entry.method == _STORED else self.read(name).shape

    @_names_file
    def _read_directory(self, size: int) -> dict[str, _Entry]:
        return _read_directory(self._read_range, size)

    def _find(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ValueError(unknown_name_message("array", name, self.names))
        return self._entries[name]

    @staticmethod
    def _rows_of(name: str, array: np.ndarray, first: int, end: int) -> np.ndarray:
        if array.ndim == 0 or not 0 <= first <= end <= len(array):
            raise ValueError(f"array '{name}' of shape {array.shape} has no rows {first} to {end}")
        return array[first:end]

    def _read_header(self, name: str, entry: _Entry) -> tuple[_Header, int]:
        if name not in self._headers:
            head = self._read_range(entry.offset, _HEAD_SIZE + len(name))
            start = _content_start(name, head)
            if len(head) < start + 10 or len(head) < start + _header_end(name, head[start:]):
                head = head[:start] + self._read_range(entry.offset + start, entry.size)
            header, skip = _parse_header(name, head[start:])
            if skip + math.prod(header.shape) * header.dtype.itemsize > entry.size:
                raise ValueError(f"array '{name}' of {entry.size} bytes cannot have the shape {header.shape}")
            self._headers[name] = header, entry.offset + start + skip
        return self._headers[name]

    def _find_content(self, name: str, entry: _Entry) -> int:
        return entry.offset + _content_start(name, self._read_range(entry.offset, _LOCAL.size))

    def _read_exactly(self, name: str, offset: int, size: int) -> bytes:
        content = self._read_range(offset, size)
        if len(content) != size:
            raise ValueError(f"array '{name}' is truncated")
        return content


def _read_directory(read: ReadRange, size: int) -> dict[str, _Entry]:
    tail_start = max(0, size - _TAIL_SIZE)
    tail = read(tail_start, size - tail_start)
    place = tail.rfind(b"PK\5\6")
    if place < 0 or place + _END.size > len(tail):
        raise ValueError("the .npz is truncated or not an .npz")
    *_, count, directory_size, directory_start, _ = _END.unpack_from(tail, place)
    if count == 0xFFFF or directory_start == 0xFFFFFFFF:
        raise ValueError("an .npz over 4 GiB, or of more than 65,534 arrays, is not supported")
    if directory_start >= tail_start:
        directory = tail[directory_start - tail_start :]
    else:
        directory = read(directory_start, directory_size)
    entries = {}
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(directory):
            raise ValueError("the .npz has a broken directory")
        values = _ENTRY.unpack_from(directory, position)
        mark, method, crc, packed_size, offset = values[0], values[4], values[7], values[8], values[16]
        name_size, extra_size, comment_size = values[10:13]
        if mark != b"PK\1\2":
            raise ValueError("the .npz has a broken directory")
        position += _ENTRY.size
        name = directory[position : position + name_size].decode("utf-8", "replace")
        entries[name.removesuffix(".npy")] = _Entry(method, crc, packed_size, offset)
        position += name_size + extra_size + comment_size
    return entries


def _content_start(name: str, head: bytes) -> int:
    """Return where a member's content begins, counted from its local header."""
    if len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
        raise ValueError(f"array '{name}' is not where the directory of the .npz says")
    *_, name_size, extra_size = _LOCAL.unpack_from(head)
    return _LOCAL.size + name_size + extra_size


def _inflate(name: str, packed: bytes, room: int) -> bytes:
    """Inflate an array, but never beyond what its header promises nor beyond `room` bytes."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        head = unpacker.decompress(packed, _MAX_HEADER)
        header, skip = _parse_header(name, head)
        size = skip + math.prod(header.shape) * header.dtype.itemsize
        if size > room:
            raise ValueError(f"array '{name}' of shape {header.shape} inflates to {size:,} bytes; {room:,} are left")
        # one byte more, which shows a stream that goes on
        content = head + unpacker.decompress(unpacker.unconsumed_tail, max(1, size + 1 - len(head)))
    except zlib.error as error:
        raise ValueError(f"array '{name}' is damaged: {error}") from None
    if len(content) != size or not unpacker.eof:
        raise ValueError(f"array '{name}' is damaged: it does not inflate to the {size:,} bytes that its header says")
    return content


def _header_end(name: str, content: bytes) -> int:
    if content[:6] != _MAGIC or len(content) < 12:
        raise ValueError(f"array '{name}' has no header of a NumPy array")
    size = int.from_bytes(content[8 : 10 if content[6] == 1 else 12], "little")
    if size > _MAX_HEADER - 12:
        raise ValueError(f"array '{name}' has a header of {size:,} bytes; at most {_MAX_HEADER - 12:,} are read")
    return size + (10 if content[6] == 1 else 12)


def _parse_header(name: str, content: bytes) -> tuple[_Header, int]:
    end = _header_end(name, content)
    start = 10 if content[6] == 1 else 12
    header = _parse_header_text(content[start:end])
    if header is None:
        raise ValueError(f"array '{name}' has a broken header, or holds Python objects")
    return header, end


@lru_cache(maxsize=4096)
def _parse_header_text(text: bytes) -> _Header | None:
    # every sample repeats the same few headers, and parsing one takes longer than reading its values
    try:
        values = ast.literal_eval(text.decode("latin1").strip())
        dtype = np.dtype(values["descr"])
        shape = tuple(int(size) for size in values["shape"])
        is_valid = not dtype.hasobject and min(shape, default=0) >= 0
        return _Header(shape, dtype, bool(values["fortran_order"])) if is_valid else None
    except (SyntaxError, ValueError, TypeError, KeyError, RecursionError, MemoryError):
        return None


def _array_of(name: str, header: _Header, content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape)
    if len(content) < count * header.dtype.itemsize:
        raise ValueError(f"array '{name}' is truncated")
    array = np.frombuffer(content, dtype=header.dtype, count=count)
    return array.reshape(shape, order="F" if header.is_fortran else "C")


# of every member: the version of the format (2.0), Unix, 1 January 1980, a file that its owner may read and write
_VERSION, _UNIX, _DATE, _MODE = 20, 3 << 8, 33, 0o600 << 16
_UTF8 = 0x800


def format_arrays(arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> bytes:
    """Format arrays as an .npz: the same arrays in the same order give the same bytes. Any name is allowed.

    (numpy.savez takes the arrays as keyword arguments, so some names clash with its own.)

    Raises:
        ValueError: an array holds Python objects, or there are too many: 65,535, or 4 GiB.
    """
    if len(arrays) >= 0xFFFF:
        raise ValueError(f"an .npz holds at most 65,534 arrays, not {len(arrays):,}")
    parts: list[bytes] = []
    directory: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        content = _format_header(array.dtype, array.shape, _is_fortran(array)) + array.tobytes("A")
        packed = content
        if compressed:
            packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS)
            packed = packer.compress(content) + packer.flush()
        member = f"{name}.npy".encode()
        sizes = (zlib.crc32(content), len(packed), len(content), len(member), 0)
        kind = (_VERSION, 0 if member.isascii() else _UTF8, _DEFLATED if compressed else _STORED, 0, _DATE)
        if offset + len(packed) >= 0xFFFFFFFF or len(content) >= 0xFFFFFFFF:
            raise ValueError("an .npz over 4 GiB is not supported")
        directory += [_ENTRY.pack(b"PK\1\2", _VERSION | _UNIX, *kind, *sizes, 0, 0, 0, _MODE, offset), member]
        parts += [_LOCAL.pack(b"PK\3\4", *kind, *sizes), member, packed]
        offset += _LOCAL.size + len(member) + len(packed)
    entries = b"".join(directory)
    end = _END.pack(b"PK\5\6", 0, 0, len(arrays), len(arrays), len(entries), offset, 0)
    return b"".join([*parts, entries, end])


def _is_fortran(array: np.ndarray) -> bool:
    return array.flags.f_contiguous and not array.flags.c_contiguous


@lru_cache(maxsize=4096)
def _format_header(dtype: np.dtype[Any], shape: tuple[int, ...], is_fortran: bool) -> bytes:
    if dtype.hasobject:
        raise ValueError("an array holds Python objects")
    header = io.BytesIO()
    described = {"descr": npy.dtype_to_descr(dtype), "fortran_order": is_fortran, "shape": shape}
    npy.write_array_header_1_0(header, described)
    return header.getvalue()
