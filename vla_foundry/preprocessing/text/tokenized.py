"""`vla-foundry preprocess text`: documents -> tokens -> packed records -> shards, in one pass."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vla_foundry.params.commands.preprocessing import PreprocessTextParams
from vla_foundry.preprocessing.job import Task
from vla_foundry.preprocessing.text.job import TextJob, finish_task, read_documents, run_text_job, shard_name
from vla_foundry.preprocessing.text.packing import RecordPacker, token_type, write_records
from vla_foundry.preprocessing.text.sources import Piece
from vla_foundry.preprocessing.text.tally import Tally
from vla_foundry.preprocessing.text.tokenizer_files import create_encoder, read_tokenizer
from vla_foundry.shards import ManifestEntry

# a longer document is encoded in pieces of this size, cut at a line or a word
_PIECE_BYTES = 256 << 10
# text that is encoded in one call
_BATCH_CHARACTERS = 1 << 20
# about how many bytes of text make a token; only sets the size of a task
_BYTES_PER_TOKEN = 3


def preprocess_text(params: PreprocessTextParams) -> None:
    """Tokenize the documents of `params.source` into a dataset of modality `text`.

    Raises:
        ValueError: the tokenizer or the output folder will not do, or too much of the source is bad.
        FileNotFoundError: a source does not exist.
    """
    tokenizer = read_tokenizer(params.tokenizer, eos_token=params.eos_token)
    dtype = token_type(tokenizer.vocab_size)
    job = TextJob(
        command="preprocess text",
        function=tokenize_task,
        shared={
            "tokenizer": tokenizer.definition,
            "eos_token_id": tokenizer.eos_token_id,
            "record_length": params.seq_len + 1,
            "samples_per_shard": params.samples_per_shard,
            "dtype": dtype,
        },
        task_bytes=params.samples_per_shard * (params.seq_len + 1) * _BYTES_PER_TOKEN,
        plan={"tokenizer": {"sha256": tokenizer.sha256, "eos_token": tokenizer.eos_token}},
        dataset={
            "kind": "text",
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_token_id,
            "seq_len": params.seq_len,
            "dtype": dtype,
        },
        files={f"tokenizer/{name}": content for name, content in tokenizer.files.items()},
    )
    run_text_job(params, job)


def tokenize_task(shared: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Tokenize and pack the documents of one task; a shard has at most samples_per_shard records, and at least half."""
    tally = Tally()
    most = shared["samples_per_shard"]
    packer = RecordPacker(shared["record_length"], shared["dtype"])
    entries: list[ManifestEntry] = []
    num_tokens = 0

    def write(num_records: int | None) -> None:
        records = packer.take_rest() if num_records is None else packer.take(num_records)
        if len(records.tokens):
            entries.append(write_records(shared["folder"], shard_name(task, len(entries)), records))

    pieces = read_documents(shared, task, tally, max_bytes=_PIECE_BYTES)
    for tokens, document_ends in _encode(pieces, shared["tokenizer"], shared["eos_token_id"]):
        packer.add(tokens, document_ends)
        num_tokens += len(tokens)
        while packer.num_full_records >= 2 * most:  # what is left still fills a shard
            write(most)
    if packer.num_records > most:
        write(packer.num_records // 2)
    write(None)
    num_records = sum(entry.num_sequences for entry in entries)
    totals = {"num_tokens": num_tokens, "num_padding": num_records * shared["record_length"] - num_tokens}
    return finish_task(shared, task, entries=entries, tally=tally, totals=totals)


def _encode(pieces: Iterable[Piece], definition: str, eos_token_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode pieces, a batch at a time, into tokens and the ends (exclusive) of the documents that end in them."""
    encoder = create_encoder(definition)
    for batch in _batches(pieces):
        encodings = encoder.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        lengths = np.fromiter((len(encoding.ids) for encoding in encodings), np.int64, count=len(batch))
        flat = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
        tokens = np.fromiter(flat, np.uint32, count=int(lengths.sum()))
        is_last = np.fromiter((piece.is_last for piece in batch), np.bool_, count=len(batch))
        stops = np.cumsum(lengths)[is_last]
        yield np.insert(tokens, stops, eos_token_id), stops + np.arange(1, len(stops) + 1)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
