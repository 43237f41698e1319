"""Modality `text`: rows of seq_len + 1 tokens, from tokenized records or gzipped JSON lists of tokens."""

import gzip
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vla_foundry.batch import Batch, Documents
from vla_foundry.data.pipelines.stages import Dropped, Pipeline, Rows, Sample, Stage, register_pipeline
from vla_foundry.data.reader import SampleShard, ShardReader, TokenShard, read_remote_record_length
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.text import TextDataParams

JSON_SUFFIX = "json.gz"
_MAX_TOKEN = np.iinfo(np.int32).max


def decode_json_tokens(sample: Sample) -> Sample:
    """Decode the gzipped JSON list of tokens, if the sample has one, to `input_ids`.

    Raises:
        ValueError: the member is not such a list.
    """
    if JSON_SUFFIX not in sample:
        return sample
    tokens = np.asarray(json.loads(gzip.decompress(sample[JSON_SUFFIX])))
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
        self.stages = tuple(stages)

    def check(self, reader: ShardReader) -> None:
        """See Pipeline."""
        for number, dataset in enumerate(reader.datasets):
            if dataset.is_remote:
                length = read_remote_record_length(dataset)
            else:
                length = self._first_length(reader, number)
            if length is not None:
                self._check_length(length, dataset.manifest)

    def _first_length(self, reader: ShardReader, dataset: int) -> int | None:
        try:
            shard = reader.open(dataset, 0)
        except Dropped:
            return None  # a damaged shard is handled when it is read
        if isinstance(shard, TokenShard):
            return shard.record_length
        if not isinstance(shard, SampleShard) or len(shard) == 0 or self.stages != DEFAULT_STAGES:
            return None
        try:
            return len(require_tokens(decode_json_tokens(dict(shard.read(0))))["input_ids"])
        except (ValueError, OSError, EOFError):
            return None  # a broken sample likewise

    def _check_length(self, length: int, where: str) -> None:
        if length != self.row_length:
            raise ValueError(
                f"data.seq_len ({self.row_length - 1}) must equal that of {where} ({length - 1}). "
                f"Set data.seq_len to {length - 1}, or make the dataset again with `vla-foundry preprocess text`."
            )

    def create_batch(self, rows: Rows) -> Batch:
        """See Pipeline."""
        input_ids = np.zeros((len(rows), self.row_length), dtype=np.int32)
        ends: list[np.ndarray | None] = [None] * len(rows)
        others = []
        for number, row in enumerate(rows.location.row.tolist()):
            try:
                shard = rows.open(number)
            except Dropped:
                others.append(number)
                continue
            if not isinstance(shard, TokenShard) or self.stages != DEFAULT_STAGES:
                others.append(number)
                continue
            if shard.record_length != self.row_length:
                self._check_length(shard.record_length, shard.uri)
            try:
                input_ids[number], ends[number] = shard.read(row)
            except OSError:
                others.append(number)  # tried once more below, and named
        others = sorted({*others, *np.flatnonzero((input_ids.view(np.uint32) >= self.vocab_size).any(axis=1)).tolist()})
        if others:
            samples = rows.read_samples((*self.stages, self._check_tokens), others)
            for number, sample in zip(others, samples, strict=True):
                input_ids[number] = sample["input_ids"]
                ends[number] = sample.get("document_ends")
        return create_text_batch(input_ids, ends, mask_documents=self.mask_documents)

    def _check_tokens(self, sample: Sample) -> Sample:
        ids = sample["input_ids"]
        if len(ids) != self.row_length:
            raise ValueError(f"{len(ids)} tokens, not data.seq_len + 1 = {self.row_length}")
        highest = int(ids.view(np.uint32).max())
        if highest >= self.vocab_size:
            raise Dropped("unknown token", f"token {highest} is not one of the model's {self.vocab_size}")
        return sample

    def create_empty_batch(self) -> Batch:
        """See Pipeline."""
        return create_padding_batch(self.row_length, mask_documents=self.mask_documents)


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
        ends: for each row, the exclusive ends of its documents, in order; tokens after the last are padding. None:
            unknown, so the row is one document.
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
    known = [whole_row if row_ends is None else row_ends for row_ends in ends]
    counts = np.fromiter((len(row_ends) for row_ends in known), dtype=np.int64, count=num_rows)
    flat = np.concatenate(known).astype(np.int64)
    last = np.cumsum(counts) - 1
    num_valid = flat[last]
    for row in np.flatnonzero(num_valid < length).tolist():
        target_mask[row, num_valid[row] :] = False
    if not mask_documents:
        return batch
    is_padding = np.zeros(len(flat), dtype=bool)
    short = np.flatnonzero(num_valid < length)
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
