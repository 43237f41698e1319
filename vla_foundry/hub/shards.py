"""Divide a large .safetensors file into several with an index, as Hugging Face's libraries do, byte for byte."""

import json
from pathlib import Path
from typing import Any, BinaryIO

from vla_foundry.parsing import parse_object
from vla_foundry.run_folder import index_name

_CHUNK = 1 << 24
_MAX_HEADER = 64 << 20


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a .safetensors file, and where its tensors begin.

    Raises:
        ValueError: the file is no .safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MAX_HEADER:
            raise ValueError(f"{path} is not a readable .safetensors file.")
        header = parse_object(file.read(length), f"The header of {path}")
    size = path.stat().st_size - 8 - length
    for name, tensor in header.items():
        if name != "__metadata__" and not _is_tensor(tensor, size):
            raise ValueError(f"{path} is not a readable .safetensors file: its header is wrong about '{name[:80]}'.")
    return header, 8 + length


def _is_tensor(entry: Any, size: int) -> bool:
    if not isinstance(entry, dict):
        return False
    places, shape = entry.get("data_offsets"), entry.get("shape")
    if not isinstance(places, list) or not isinstance(shape, list) or len(places) != 2:
        return False
    return all(type(number) is int for number in (*places, *shape)) and 0 <= places[0] <= places[1] <= size


def split_weights(path: Path, folder: Path, max_bytes: float) -> list[Path]:
    """Write the tensors of a file to several of at most `max_bytes` (a larger tensor has its own), and an index.

    Returns:
        The files, the index last; [path] itself if it is small enough.
    """
    if path.stat().st_size <= max_bytes:
        return [path]
    header, start = read_header(path)
    metadata = header.pop("__metadata__", {})
    groups: list[dict[str, Any]] = [{}]
    filled = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
        if groups[-1] and filled + size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += size
    names = [f"{path.stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as source:
        for name, tensors in zip(names, groups, strict=True):
            _write(folder / name, source, start, tensors, metadata)
    weight_map = {tensor: name for name, tensors in zip(names, groups, strict=True) for tensor in tensors}
    total = sum(end - begin for begin, end in (tensor["data_offsets"] for tensor in header.values()))
    index = folder / index_name(path.name)
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")
    return [*(folder / name for name in names), index]


def _write(path: Path, source: BinaryIO, start: int, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    first = min(tensor["data_offsets"][0] for tensor in tensors.values())
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, tensor in tensors.items():
        begin, end = tensor["data_offsets"]
        header[name] = {**tensor, "data_offsets": [begin - first, end - first]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            begin, end = tensor["data_offsets"]
            source.seek(start + begin)
            left = end - begin
            while left:
                chunk = source.read(min(left, _CHUNK))
                if not chunk:
                    raise ValueError(f"{path} cannot be made: the file of weights is truncated.")
                file.write(chunk)
                left -= len(chunk)
