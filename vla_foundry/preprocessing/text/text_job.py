"""`vla-foundry preprocess text | text_untokenized`: documents -> shards of packed tokens, or of raw text in pieces.

Both run the same job: list the documents, run the tasks that are not done, add up the counts, publish, report.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vla_foundry.params.commands.preprocessing import (
    PreprocessTextParams,
    PreprocessTextUntokenizedParams,
    TextJobParams,
)
from vla_foundry.preprocessing.output import OutputFolder, check_apart, record_task
from vla_foundry.preprocessing.shard_writer import write_shard
from vla_foundry.preprocessing.sources import SourceFile, describe_files, digest_of_versions, say_ignored
from vla_foundry.preprocessing.tasks import Task, run_unfinished
from vla_foundry.preprocessing.text.document_order import divide_into_tasks, shuffled_documents
from vla_foundry.preprocessing.text.documents import DocumentTally, Piece, list_sources, read_unit
from vla_foundry.preprocessing.text.packing import RecordPacker, token_type, write_records
from vla_foundry.preprocessing.text.tokenizer import read_tokenizer
from vla_foundry.progress import say
from vla_foundry.shards import ManifestEntry
from vla_foundry.storage.uri import absolute_uri
from vla_foundry.text.tokenizers import create_encoder

# raise it when the same settings give other bytes than before
SETTINGS_VERSION = 1
# params that do not shape the output
_PLAIN_FIELDS = ("source", "output", "num_workers", "ray_address", "overwrite", "max_bad_fraction")
# a longer document is encoded in pieces of this size, cut at a line or a word
_PIECE_BYTES = 256 << 10
# text that is encoded in one call
_BATCH_CHARACTERS = 1 << 20
# rough number of bytes of text per token; it only sets the size of a task
_BYTES_PER_TOKEN = 3
# rough length of a document, bytes; it only sets the size of a task
_DOCUMENT_BYTES = 2048


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """One kind of job over documents."""

    # as the user types it
    command: str
    # (shared, task) -> the result of `finish_task`
    function: Callable[[Any, Task], Any]
    # arguments of the function; `folder`, `seed` and `text_key` are added
    shared: Mapping[str, Any]
    # about how many bytes of text a task takes
    task_bytes: int
    # what else determines the output's bytes besides params and source; it replaces params of the same name
    settings: Mapping[str, Any]
    # facts for the provenance; counts are added
    dataset: Mapping[str, Any]
    # further files of the dataset, {path within the folder: content}
    files: Mapping[str, bytes]


def run_text_job(params: TextJobParams, job: TextJob) -> None:
    """Run a job over documents from start to finish, or from where a killed run left it.

    Raises:
        ValueError: the output folder holds something else, or too much of the source is bad.
        FileNotFoundError: a source does not exist.
    """
    check_apart(params.source, params.output)
    files, ignored = list_sources(params.source)
    values = {name: value for name, value in asdict(params).items() if name not in (*_PLAIN_FIELDS, *job.settings)}
    source = describe_files(files)
    settings = {"command": job.command, "version": SETTINGS_VERSION, "params": values, "source": source, **job.settings}
    output = OutputFolder(params.output, settings, inputs=digest_of_versions(files))
    with output.begin(overwrite=params.overwrite) as done:
        if done is None:
            _report(output.read_facts())
            return
        say_ignored(ignored, "hold no text")
        start = time.monotonic()
        _publish(output, params, job, files, done)
        say(f"{sum(file.weight for file in files) / 1e6:,.1f} MB in {time.monotonic() - start:.1f} s")


def _publish(
    output: OutputFolder, params: TextJobParams, job: TextJob, files: list[SourceFile], done: dict[int, Any]
) -> None:
    """Run the tasks that are not done, add up the results of all, and publish the dataset."""
    num_bytes = sum(file.weight for file in files)
    running = DocumentTally()
    for result in done.values():
        running.add_json(result["tally"])

    def check(result: dict[str, Any]) -> None:
        running.add_json(result["tally"])
        running.check_source(params.max_bad_fraction, num_bytes, is_final=False)

    results = run_unfinished(
        job.function,
        divide_into_tasks(files, seed=params.seed, task_bytes=job.task_bytes),
        done,
        shared={
            **job.shared,
            "folder": absolute_uri(params.output),
            "seed": params.seed,
            "text_key": params.text_key,
        },
        title=job.command,
        noun="tasks",
        num_workers=params.num_workers,
        ray_address=params.ray_address,
        check=check,
    )
    tally = DocumentTally()
    for result in results:  # in order of the tasks, so that examples do not depend on who was first
        tally.add_json(result["tally"])
    tally.check_source(params.max_bad_fraction, num_bytes, is_final=True)
    entries = [ManifestEntry(**entry) for result in results for entry in result["entries"]]
    if not entries:
        raise ValueError(f"--source has no documents: {'; '.join(tally.describe()) or 'no rows'}.")
    totals = {name: sum(result["totals"][name] for result in results) for name in results[0]["totals"]}
    facts = {**job.dataset, "num_documents": tally.num_good, **totals}
    facts = output.publish(entries, facts=facts, counts=tally.to_json(), files=job.files)
    for line in tally.describe():
        say(line)
    _report(facts)


def read_documents(shared: Mapping[str, Any], task: Task, tally: DocumentTally, *, max_bytes: int) -> Iterator[Piece]:
    """Read and shuffle the documents of a task, in pieces of at most `max_bytes` bytes."""
    rows = (row for unit in task.payload for row in read_unit(unit, text_key=shared["text_key"], max_bytes=max_bytes))
    return shuffled_documents(rows, tally, seed=shared["seed"], task_number=task.number)


def finish_task(
    shared: Mapping[str, Any],
    task: Task,
    *,
    entries: list[ManifestEntry],
    tally: DocumentTally,
    totals: Mapping[str, int],
) -> dict[str, Any]:
    """Record that a task is done, and return its result.

    Args:
        shared: of the job.
        task: the task.
        entries: its shards.
        tally: its rows.
        totals: numbers that are summed over tasks into the dataset's facts.
    """
    result = {"entries": [asdict(entry) for entry in entries], "tally": tally.to_json(), "totals": dict(totals)}
    record_task(shared["folder"], task.number, result)
    return result


def shard_name(task: Task, number: int) -> str:
    """Return the name of a task's shard."""
    return f"shard_{task.number:06d}_{number:03d}"


def _report(facts: Mapping[str, Any]) -> None:
    line = f"{facts['num_documents']:,} documents in {facts['num_sequences']:,} samples, {facts['num_shards']:,} shards"
    if "num_tokens" in facts:
        size = facts["num_tokens"] + facts["num_padding"]
        line += f"; {facts['num_tokens']:,} tokens, {100 * facts['num_padding'] / size:.2f}% padding"
    say(line)


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
        settings={"tokenizer": {"sha256": tokenizer.sha256, "eos_token": tokenizer.eos_token}},
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
    tally = DocumentTally()
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
        while packer.num_full_records >= 2 * most:  # the rest still fills a shard
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


def preprocess_text_untokenized(params: PreprocessTextUntokenizedParams) -> None:
    """Write the documents of `params.source` as a dataset of modality `text_untokenized`.

    A sample is `<key>.json`: {"text": ..., "document": name, "part": index within its document, "is_last": ...}. The
    texts of a document's parts, in order, are the document.

    Raises:
        ValueError: the output folder will not do, or too much of the source is bad.
        FileNotFoundError: a source does not exist.
    """
    job = TextJob(
        command="preprocess text_untokenized",
        function=write_task,
        shared={"samples_per_shard": params.samples_per_shard, "max_sample_bytes": params.max_sample_bytes},
        task_bytes=params.samples_per_shard * min(params.max_sample_bytes, _DOCUMENT_BYTES),
        settings={},
        dataset={"kind": "text_untokenized", "max_sample_bytes": params.max_sample_bytes},
        files={},
    )
    run_text_job(params, job)


def write_task(shared: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Write the documents of one task."""
    tally = DocumentTally()
    most = shared["samples_per_shard"]
    entries: list[ManifestEntry] = []
    held: list[Piece] = []

    def write(num_samples: int) -> None:
        shard = shard_name(task, len(entries))
        entries.append(write_shard(shared["folder"], shard, _samples(shard, held[:num_samples])))
        del held[:num_samples]

    for piece in read_documents(shared, task, tally, max_bytes=shared["max_sample_bytes"]):
        held.append(piece)
        if len(held) == 2 * most:  # the rest still fills a shard
            write(most)
    if len(held) > most:
        write((len(held) + 1) // 2)
    if held:
        write(len(held))
    return finish_task(shared, task, entries=entries, tally=tally, totals={})


def _samples(shard: str, pieces: list[Piece]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    for number, piece in enumerate(pieces):
        values = {"text": piece.text, "document": piece.document, "part": piece.part, "is_last": piece.is_last}
        yield f"{shard}_{number:06d}", {"json": json.dumps(values, ensure_ascii=False).encode("utf-8")}
