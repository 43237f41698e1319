"""Modality `text`: rows of seq_len + 1 tokens, from tokenized records or gzipped JSON lists of tokens.

Longer records are cut into pieces. Each piece begins with the last token of the one before, so that every token but a
record's first is a target once; the last piece may end with padding. The sample order counts pieces.
"""

import contextlib
import gzip
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vla_foundry.batch import Batch, Documents
from vla_foundry.data.indexing import read_remote_index
from vla_foundry.data.pipelines.stages import Dropped, Pipeline, Rows, Sample, Stage, read_content, register_pipeline
from vla_foundry.data.reader import SampleShard, Shard, ShardReader, TokenShard
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.parsing import MAX_RECORD_BYTES, parse_record

JSON_SUFFIX = "json.gz"
_MAX_TOKEN = np.iinfo(np.int32).max
# samples of a shard to try for the length of its records
_NUM_TRIED = 16


def decode_json_tokens(sample: Sample) -> Sample:
    """Decode the gzipped JSON list of tokens, if the sample has one, to `input_ids`.

    Raises:
        ValueError: the member is not such a list.
    """
    if JSON_SUFFIX not in sample:
        return sample
    # one byte more than is parsed: no small member fills the memory
    text = gzip.GzipFile(fileobj=io.BytesIO(sample[JSON_SUFFIX])).read(MAX_RECORD_BYTES + 1)
    tokens = np.asarray(parse_record(text, f"its {JSON_SUFFIX}"))
    if tokens.ndim != 1 or tokens.dtype.kind != "i" or tokens.min() < 0 or tokens.max() > _MAX_TOKEN:
        raise ValueError(f"{JSON_SUFFIX} must hold a flat list of token ids")
    return {**sample, "input_ids": tokens.astype(np.int32)}


def require_tokens(sample: Sample) -> Sample:
    """Check that the sample has tokens.

    Raises:
        ValueError: the sample has no tokens.
    """
    if "input_ids" not in sample:
        members = ", ".join(sorted(name for name in sample if not name.startswith("__")))
        raise ValueError(f"it has no member {JSON_SUFFIX} with tokens, only {members or 'none'}")
    return sample


DEFAULT_STAGES: tuple[Stage, ...] = (decode_json_tokens, require_tokens)


class TextPipeline(Pipeline):
    """Makes rows of seq_len + 1 tokens.

    Args:
        params: the data params.
        stages: stages applied to each sample. With the default ones, records are copied in bulk, without Python calls
            per stage; with custom stages every record also becomes a sample `{"input_ids", "document_ends"}`.
    """

    rows_per_message = 64

    def __init__(self, params: TextDataParams, stages: Sequence[Stage] = DEFAULT_STAGES) -> None:
        self.row_length = params.seq_len + 1
        self.mask_documents = params.mask_documents
        self.vocab_size = min(params.vocab_size or _MAX_TOKEN + 1, _MAX_TOKEN + 1)
        self.stages = stages
        self._params = params
        # dataset -> tokens in each of its records
        self._record_lengths: dict[int, int] = {}

    def pieces_per_row(self, reader: ShardReader) -> list[int]:
        """See Pipeline."""
        for number, dataset in enumerate(reader.datasets):
            length = find_record_length(reader, number, self.stages)
            if length is not None:
                self._check_length(length, dataset.manifest)
                self._record_lengths[number] = length
        return [self._params.count_pieces(self._record_length(number) - 1) for number in range(len(reader.datasets))]

    def _record_length(self, dataset: int) -> int:
        return self._record_lengths.get(dataset, self.row_length)

    def _check_length(self, length: int, where: str) -> None:
        if length < self.row_length:
            raise ValueError(
                f"data.seq_len ({self.row_length - 1}) must be at most that of {where} ({length - 1}). "
                f"Set data.seq_len to {length - 1}, or make the dataset again with `vla-foundry preprocess text`."
            )

    def create_batch(self, rows: Rows) -> Batch:
        """See Pipeline."""
        input_ids = np.zeros((len(rows), self.row_length), dtype=np.int32)
        ends: list[np.ndarray | None] = [None] * len(rows)
        others = []
        has_own_stages = tuple(self.stages) == DEFAULT_STAGES
        dataset, _, row, _, piece = (array.tolist() for array in rows.location)
        for number in range(len(rows)):
            try:
                shard = rows.open(number)
            except Dropped:
                others.append(number)
                continue
            if not isinstance(shard, TokenShard) or not has_own_stages:
                others.append(number)
                continue
            length = self._record_length(dataset[number])
            if shard.record_length != length:
                raise ValueError(f"{shard.uri} has records of {shard.record_length} tokens, others of {length}.")
            first = piece[number] * (self.row_length - 1)
            count = min(self.row_length, length - first)
            try:
                input_ids[number, :count], ends[number] = shard.read(row[number], first, count)
            except OSError:
                others.append(number)  # tried once more below, and named
                continue
            if length != self.row_length:
                ends[number] = _cut_ends(ends[number], first, count, self.row_length)
        others = sorted({*others, *np.flatnonzero((input_ids.view(np.uint32) >= self.vocab_size).any(axis=1)).tolist()})
        if others:
            samples = rows.read_samples((*self.stages, self._cut), others, read=self._read)
            for number, sample in zip(others, samples, strict=True):
                input_ids[number] = 0
                input_ids[number, : len(sample["input_ids"])] = sample["input_ids"]
                ends[number] = sample.get("document_ends")
        return create_text_batch(input_ids, ends, mask_documents=self.mask_documents)

    def _read(self, dataset: int, shard: Shard, row: int) -> Sample:
        return {"__length__": self._record_length(dataset), **read_content(dataset, shard, row)}

    def _cut(self, sample: Sample) -> Sample:
        """Cut the sample's piece out of its record, and check its tokens."""
        ids = sample["input_ids"]
        length, piece = sample.get("__length__", self.row_length), sample.get("__piece__", 0)
        # a user's stage may make rows of its own
        if len(ids) not in (length, self.row_length):
            raise ValueError(f"{len(ids)} tokens, not {length}; data.seq_len is {self.row_length - 1}")
        first = piece * (self.row_length - 1) if len(ids) == length else 0
        ids = ids[first : first + self.row_length]
        highest = int(ids.view(np.uint32).max())
        if highest >= self.vocab_size:
            raise Dropped("unknown token", f"token {highest} is not one of the model's {self.vocab_size}")
        ends = _cut_ends(sample.get("document_ends"), first, len(ids), self.row_length)
        return {**sample, "input_ids": ids, "document_ends": ends}

    def create_empty_batch(self) -> Batch:
        """See Pipeline."""
        return create_padding_batch(self.row_length, mask_documents=self.mask_documents)


def find_record_length(reader: ShardReader, dataset: int, stages: Sequence[Stage] = DEFAULT_STAGES) -> int | None:
    """Return a dataset's tokens per record, from the first record that can be read; None: unknown."""
    if reader.datasets[dataset].is_remote:
        index = read_remote_index(reader.datasets[dataset].shard_uri(0))
        return None if index is None or index.records is None else index.records.record_length
    for number in range(len(reader.datasets[dataset].entries)):
        try:
            shard = reader.open(dataset, number)
        except Dropped:
            continue  # a damaged shard is handled when it is read
        if isinstance(shard, TokenShard):
            return shard.record_length
        if not isinstance(shard, SampleShard) or tuple(stages) != DEFAULT_STAGES:
            return None
        for row in range(min(len(shard), _NUM_TRIED)):
            with contextlib.suppress(ValueError, OSError, EOFError):  # a broken sample likewise
                return len(require_tokens(decode_json_tokens(dict(shard.read(row))))["input_ids"])
    return None


def _cut_ends(ends: np.ndarray | None, first: int, count: int, row_length: int) -> np.ndarray | None:
    """Return the ends of documents in `count` tokens of a record from `first` on; see create_text_batch."""
    if ends is None:
        return None if count == row_length else np.asarray([count])
    inside = ends[(ends > first) & (ends < first + count)].astype(np.int64) - first
    num_valid = min(int(ends[-1]) - first, count)
    return np.append(inside, num_valid) if num_valid > max(inside, default=0) else inside


@register_pipeline("text")
def create_text_pipeline(params: DataParams) -> TextPipeline:
    """Create the pipeline for tokenized text."""
    assert isinstance(params, TextDataParams), "modality text needs data.type text"
    return TextPipeline(params)


def create_text_batch(
    input_ids: Int[np.ndarray, "B T"], ends: Sequence[np.ndarray | None], *, mask_documents: bool
) -> Batch:
    """Create a batch from rows of tokens and the documents in them.

    Args:
        input_ids: the rows.
        ends: for each row, the exclusive ends of its documents, in order; tokens after the last are padding. Empty: all
            is padding. None: unknown, so the row is one document.
        mask_documents: return `documents`, and do not supervise the first token of a document.

    Returns:
        input_ids and target_mask; documents too, if `mask_documents` is set and they are known for any row.
    """
    num_rows, length = input_ids.shape
    target_mask = np.ones((num_rows, length), dtype=bool)
    target_mask[:, 0] = False
    batch: Batch = {"input_ids": input_ids, "target_mask": target_mask}
    if all(row_ends is None for row_ends in ends):
        return batch
    whole_row = np.asarray([length], dtype=np.uint32)
    is_empty = np.asarray([row_ends is not None and len(row_ends) == 0 for row_ends in ends])
    known = [whole_row if row_ends is None or len(row_ends) == 0 else row_ends for row_ends in ends]
    counts = np.fromiter((len(row_ends) for row_ends in known), dtype=np.int64, count=num_rows)
    flat = np.concatenate(known).astype(np.int64)
    last = np.cumsum(counts) - 1
    num_valid = np.where(is_empty, 0, flat[last])
    for row in np.flatnonzero(num_valid < length).tolist():
        target_mask[row, num_valid[row] :] = False
    if not mask_documents:
        return batch
    is_padding = np.zeros(len(flat), dtype=bool)
    is_padding[last[is_empty]] = True
    short = np.flatnonzero((num_valid < length) & ~is_empty)
    if len(short):  # padding forms its own segment
        flat = np.insert(flat, last[short] + 1, length)
        is_padding = np.insert(is_padding, last[short] + 1, True)
        counts[short] += 1
        last = np.cumsum(counts) - 1
    starts = np.empty_like(flat)
    starts[1:] = flat[:-1]
    starts[0] = 0
    starts[last[:-1] + 1] = 0
    row_of_segment = np.repeat(np.arange(num_rows), counts)
    target_mask[row_of_segment, starts] = False
    batch["documents"] = Documents(
        lengths=(flat - starts).astype(np.int32), num_per_row=counts.astype(np.int32), is_padding=is_padding
    )
    return batch


def create_padding_batch(length: int, *, mask_documents: bool) -> Batch:
    """Return one row of padding, without any target."""
    batch: Batch = {
        "input_ids": np.zeros((1, length), dtype=np.int32),
        "target_mask": np.zeros((1, length), dtype=bool),
    }
    if mask_documents:
        one = np.ones(1, dtype=np.int32)
        batch["documents"] = Documents(lengths=one * length, num_per_row=one, is_padding=np.ones(1, dtype=bool))
    return batch
