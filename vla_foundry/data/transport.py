"""How a microbatch travels from a loader process: small arrays in the message itself, large ones in shared memory.

A tensor in shared memory costs about half a millisecond, whatever its size; bytes in a message cost a copy through a
pipe. Tokens that fit travel as uint16, and masks as bits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vla_foundry.batch import Batch

# arrays of more bytes than this go through shared memory
_MAX_INLINE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class _Bits:
    """A bool array as bits."""

    bits: np.ndarray
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Narrow:
    """An int32 array of values below 2**16."""

    values: np.ndarray


class Message:
    """A packed microbatch. See `pack`."""

    def __init__(self, values: Batch, report: Any) -> None:
        self.values = values
        # goes along unchanged
        self.report = report

    def unpack(self) -> Batch:
        """Return the batch, with a tensor for each array at its top level."""
        return {key: _unpack_value(value) for key, value in self.values.items()}

    def pin_memory(self) -> "Message":
        """Unpack into page-locked memory; called by PyTorch's pinning thread."""
        batch = self.unpack()
        pinned = {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}
        return Message(pinned, self.report)


def pack(batch: Batch, report: Any, *, for_transport: bool) -> Message:
    """Pack a batch of NumPy arrays.

    Args:
        batch: the batch.
        report: anything picklable.
        for_transport: False if the message stays in this process.
    """
    return Message({key: _pack_value(value) for key, value in batch.items()} if for_transport else batch, report)


def _pack_value(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == np.bool_:
        value = _Bits(np.packbits(value), value.shape)
        return value if value.bits.nbytes <= _MAX_INLINE_BYTES else torch.from_numpy(_unpack_bits(value))
    if value.dtype == np.int32 and value.nbytes // 2 <= _MAX_INLINE_BYTES and _fits_uint16(value):
        return _Narrow(value.astype(np.uint16))
    return value if value.nbytes <= _MAX_INLINE_BYTES else torch.from_numpy(value)


def _fits_uint16(value: np.ndarray) -> bool:
    return value.size > 0 and int(value.min()) >= 0 and int(value.max()) < 1 << 16


def _unpack_value(value: Any) -> Any:
    if isinstance(value, _Bits):
        value = _unpack_bits(value)
    elif isinstance(value, _Narrow):
        value = value.values.astype(np.int32)
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _unpack_bits(value: _Bits) -> np.ndarray:
    count = int(np.prod(value.shape))
    return np.unpackbits(value.bits, count=count).view(np.bool_).reshape(value.shape)
