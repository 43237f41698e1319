"""Tensors in .safetensors files: write them in one pass, and read them whole or by rows, also where files hold parts.

A file may hold some rows of a tensor. It then says which in the way of torch.distributed.checkpoint's safetensors
storage, which reads and writes the same files. Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla_foundry.parsing import parse_object

# where a file's metadata says at which row of the whole tensor its part begins
_PARTS_KEY = "DCP_SHARDING_INFO"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Part(NamedTuple):
    """What one file holds of a tensor: all of it, or some rows."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    # the row of the whole tensor that it begins with
    first_row: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize


class Entry(NamedTuple):
    """A stored tensor: its whole shape, and how to read it, and its rows in a slice."""

    shape: torch.Size
    read: Callable[[], Tensor]
    # reads no more than the rows; None: they are taken from the whole tensor
    find_rows: Callable[[slice], Tensor] | None = None

    def read_rows(self, rows: slice) -> Tensor:
        """Read some rows; slice(None) is all of them, and all that a scalar has."""
        if rows == slice(None):
            return self.read()
        return self.read()[rows] if self.find_rows is None else self.find_rows(rows)


def as_parts(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """Return whole tensors as what a file holds of them."""
    return {name: Part(tensor.shape, tensor.dtype, tensor.detach) for name, tensor in tensors.items()}


def write_tensors(
    path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str] | None = None, *, marks_parts: bool = False
) -> tuple[int, str]:
    """Write a file tensor by tensor, and flush it to disk.

    Args:
        metadata: goes into the header.
        marks_parts: record each part's first row: other files hold the other rows.

    Returns:
        Size in bytes and SHA-256 of the file.
    """
    metadata = {"format": "pt", **(metadata or {})}
    if marks_parts:
        offsets = {name: [part.first_row, *([0] * (len(part.shape) - 1))] for name, part in parts.items()}
        metadata[_PARTS_KEY] = json.dumps(
            {name: {"saved_offsets": offsets[name] if part.shape else []} for name, part in parts.items()}
        )
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for content in _format(parts, metadata):
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _format(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    # https://huggingface.co/docs/safetensors: length of the header (8 bytes), JSON, then the tensors end to end
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, part in parts.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [offset, offset + part.num_bytes],
        }
        offset += part.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for part in parts.values():
        yield part.read().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def open_tensors(paths: Iterable[Path]) -> Iterator[tuple[dict[str, Entry], list[dict[str, str]]]]:
    """Open files that together hold tensors.

    Yields:
        name -> entry, and the metadata of each file.

    Raises:
        ValueError: a file is not readable, or rows of a tensor are missing.
    """
    parts: dict[str, list[tuple[int, Any, Path]]] = {}
    metadata = []
    with ExitStack() as stack:
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except FileNotFoundError:
                raise
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a readable .safetensors file: {error}.") from None
            metadata.append(dict(file.metadata() or {}))
            marks = parse_object(metadata[-1].get(_PARTS_KEY, "{}"), f"{_PARTS_KEY} of {path}")
            for name in file.keys():  # noqa: SIM118 - it is no dict
                parts.setdefault(name, []).append((_find_first_row(marks.get(name), path), file, path))
        yield {name: _join(name, found) for name, found in parts.items()}, metadata


def _find_first_row(mark: Any, path: Path) -> int:
    offsets = mark.get("saved_offsets") if isinstance(mark, dict) else []
    if not isinstance(offsets, list) or any(type(number) is not int for number in offsets) or any(offsets[1:]):
        raise ValueError(f"{path} does not say which rows of its tensors it holds, but '{str(mark)[:80]}'.")
    return offsets[0] if offsets else 0


def _join(name: str, found: list[tuple[int, Any, Path]]) -> Entry:
    """Put the parts of a tensor together.

    Raises:
        ValueError: rows are missing, or the parts are not of one tensor.
    """
    pieces: list[tuple[int, int, Any]] = []
    shape: list[int] = []
    kind = ""
    for first, file, path in sorted(found, key=lambda item: item[0]):
        before = pieces[-1][1] if pieces else 0
        if first != before:
            raise ValueError(f"{path}: '{name}' begins at row {first}, but other files hold {before} rows before it.")
        part = file.get_slice(name)
        shape, kind_before = part.get_shape(), kind
        kind = f"{part.get_dtype()} of shape {['rows', *shape[1:]] if shape else shape}"
        if pieces and (kind != kind_before or not shape):
            raise ValueError(
                f"{path}: '{name}' is {kind}, but {kind_before} in another file, which it cannot continue."
            )
        pieces.append((first, first + (shape[0] if shape else 0), part))
    if len(found) == 1:
        return Entry(torch.Size(shape), partial(found[0][1].get_tensor, name), partial(_read_rows, pieces))
    whole = torch.Size((pieces[-1][1], *shape[1:]))
    return Entry(whole, partial(_read_rows, pieces, slice(None)), partial(_read_rows, pieces))


def _read_rows(pieces: list[tuple[int, int, Any]], rows: slice) -> Tensor:
    start, stop, _ = rows.indices(pieces[-1][1])
    spans = [(max(start, first) - first, min(stop, last) - first, part) for first, last, part in pieces]
    found = [part[begin:end] for begin, end, part in spans if begin < end]
    return found[0] if len(found) == 1 else torch.cat(found or [pieces[0][2][0:0]])


def join_files(paths: Iterable[Path], target: Path) -> None:
    """Write the tensors of files, which may hold parts, as one file, one tensor in memory at a time."""
    with open_tensors(paths) as (entries, metadata):
        parts = {
            name: Part(entry.shape, entry.read_rows(slice(0, 0) if entry.shape else slice(None)).dtype, entry.read)
            for name, entry in entries.items()
        }
        kept = {key: value for each in metadata for key, value in each.items() if key != _PARTS_KEY}
        write_tensors(target, parts, kept)
