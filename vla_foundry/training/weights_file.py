"""Whole weights as one .safetensors file, written and read tensor by tensor so that no rank ever holds all of them."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from vla_foundry.training.distributed import gather, local_shard

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(path: Path, tensors: Mapping[str, Tensor], *, is_main: bool) -> tuple[int, str]:
    """Collective: call on every rank. Write tensors, sharded or not, as one file, and flush it to the disk.

    Args:
        is_main: this rank writes; the others only send it their shards.

    Returns:
        Size in bytes and SHA-256 of the file, on the writing rank (0 and "" elsewhere).
    """
    if not is_main:
        for tensor in tensors.values():
            if isinstance(tensor, DTensor):
                gather(tensor)
        return 0, ""
    with path.open("wb") as file:
        digest = hashlib.sha256()
        _write(file, digest, _format_header(tensors))
        for tensor in tensors.values():
            whole = gather(tensor).cpu().contiguous()
            _write(file, digest, whole.reshape(-1).view(torch.uint8).numpy().data)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _write(file: BinaryIO, digest, content: bytes | memoryview) -> None:
    file.write(content)
    digest.update(content)


def _format_header(tensors: Mapping[str, Tensor]) -> bytes:
    # https://huggingface.co/docs/safetensors: length of the header (8 bytes), JSON, then the tensors end to end
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a file into tensors, sharded or not, in place; each rank keeps its part.

    Raises:
        ValueError: the file's names or shapes are not those of the tensors.
    """
    with safe_open(path, framework="pt") as file:
        missing, unknown = sorted(tensors.keys() - set(file.keys())), sorted(set(file.keys()) - tensors.keys())
        if missing or unknown:
            raise ValueError(
                f"{path} is of another model: {len(missing)} weights are missing (such as {missing[:1]}), "
                f"{len(unknown)} are unknown (such as {unknown[:1]}). Use the config that it was saved with."
            )
        for name, tensor in tensors.items():
            whole = file.get_tensor(name)
            if whole.shape != tensor.shape:
                raise ValueError(
                    f"{path}: '{name}' has shape {tuple(whole.shape)}, the model's is {tuple(tensor.shape)}. "
                    "Use the config that it was saved with."
                )
            if isinstance(tensor, DTensor):
                whole = distribute_tensor(
                    whole.to(tensor.device_mesh.device_type),
                    tensor.device_mesh,
                    tensor.placements,
                    src_data_rank=None,
                )
            local_shard(tensor).copy_(local_shard(whole))
