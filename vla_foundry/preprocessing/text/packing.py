"""Pack token streams into records of one length with array operations, and write them as a shard."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vla_foundry.preprocessing.shard_writer import write_shard
from vla_foundry.shards import (
    DOCUMENT_ENDS_SUFFIX,
    DOCUMENT_OFFSETS_SUFFIX,
    RECORDS_INFO_SUFFIX,
    TOKENS_SUFFIX,
    ManifestEntry,
    format_records_info,
)

TokenType = Literal["uint16", "uint32"]


def token_type(vocab_size: int) -> TokenType:
    """Return the narrowest type that holds every token of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True, eq=False)
class Records:
    """N records; see vla_foundry.shards.TokenRecords."""

    # (N, record_length)
    tokens: np.ndarray
    # (number of document ends,) uint32
    document_ends: np.ndarray
    # (N + 1,) uint64
    document_offsets: np.ndarray


class RecordPacker:
    """Cuts a stream of documents into records; nothing is lost, and only the last record may be padded.

    Args:
        record_length: tokens in a record.
        dtype: of the tokens.
    """

    def __init__(self, record_length: int, dtype: TokenType) -> None:
        self._record_length = record_length
        self._dtype = np.dtype(dtype)
        self._tokens: list[np.ndarray] = []
        # ends of documents, exclusive, counted from the first token that is held
        self._ends: list[np.ndarray] = []
        self._num_tokens = 0

    @property
    def num_full_records(self) -> int:
        """Records that could be taken without padding."""
        return self._num_tokens // self._record_length

    @property
    def num_records(self) -> int:
        """Records that the stream would fill, the last one padded."""
        return -(-self._num_tokens // self._record_length)

    def add(self, tokens: np.ndarray, document_ends: np.ndarray) -> None:
        """Append tokens to the stream, and the ends (exclusive) of the documents that end in them."""
        self._ends.append(document_ends.astype(np.int64) + self._num_tokens)
        self._tokens.append(tokens.astype(self._dtype))
        self._num_tokens += len(tokens)

    def take(self, num_records: int) -> Records:
        """Remove the first `num_records` full records from the stream and return them."""
        assert num_records <= self.num_full_records, "there are not that many full records"
        tokens, ends = self._joined()
        size = num_records * self._record_length
        within = int(np.searchsorted(ends, size, side="right"))
        self._tokens, self._ends = [tokens[size:].copy()], [ends[within:] - size]
        self._num_tokens -= size
        return self._records(tokens[:size], ends[:within], size)

    def take_rest(self) -> Records:
        """Empty the stream; the last record is filled up with zeros."""
        tokens, ends = self._joined()
        self._tokens, self._ends, self._num_tokens = [], [], 0
        padding = -len(tokens) % self._record_length
        return self._records(np.pad(tokens, (0, padding)), ends, len(tokens))

    def _joined(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._tokens:
            return np.zeros(0, self._dtype), np.zeros(0, np.int64)
        return np.concatenate(self._tokens), np.concatenate(self._ends)

    def _records(self, tokens: np.ndarray, ends: np.ndarray, num_valid: int) -> Records:
        length = self._record_length
        num_records = len(tokens) // length
        # the end of a record is a boundary too, where a document continues in the next record
        stops = np.minimum(np.arange(1, num_records + 1) * length, num_valid)
        ends = np.union1d(ends, stops)
        record = (ends - 1) // length
        offsets = np.zeros(num_records + 1, np.uint64)
        np.cumsum(np.bincount(record, minlength=num_records), out=offsets[1:])
        return Records(
            tokens=tokens.reshape(num_records, length),
            document_ends=(ends - record * length).astype(np.uint32),
            document_offsets=offsets,
        )


def write_records(folder: str, shard: str, records: Records) -> ManifestEntry:
    """Write one shard of records."""
    dtype = str(records.tokens.dtype)
    assert dtype in TOKENS_SUFFIX, f"tokens of type {dtype} have no member name"
    num_records, length = records.tokens.shape
    info = format_records_info(dtype=dtype, record_length=length, num_sequences=num_records)
    members = {
        RECORDS_INFO_SUFFIX: info.encode(),
        TOKENS_SUFFIX[dtype]: records.tokens.astype(records.tokens.dtype.newbyteorder("<")).tobytes(),
        DOCUMENT_ENDS_SUFFIX: records.document_ends.astype("<u4").tobytes(),
        DOCUMENT_OFFSETS_SUFFIX: records.document_offsets.astype("<u8").tobytes(),
    }
    return write_shard(folder, shard, [(shard, members)])
