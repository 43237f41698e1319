"""`vla-foundry preprocess text_untokenized`: documents -> samples of bounded raw text -> shards."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vla_foundry.params.commands.preprocessing import PreprocessTextUntokenizedParams
from vla_foundry.preprocessing.job import Task
from vla_foundry.preprocessing.text.job import TextJob, finish_task, read_documents, run_text_job, shard_name
from vla_foundry.preprocessing.text.sources import Piece
from vla_foundry.preprocessing.text.tally import Tally
from vla_foundry.preprocessing.writer import write_shard
from vla_foundry.shards import ManifestEntry

# about how long a document is, bytes; only sets the size of a task
_DOCUMENT_BYTES = 2048


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
        plan={},
        dataset={"kind": "text_untokenized", "max_sample_bytes": params.max_sample_bytes},
        files={},
    )
    run_text_job(params, job)


def write_task(shared: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Write the documents of one task."""
    tally = Tally()
    most = shared["samples_per_shard"]
    entries: list[ManifestEntry] = []
    held: list[Piece] = []

    def write(num_samples: int) -> None:
        shard = shard_name(task, len(entries))
        entries.append(write_shard(shared["folder"], shard, _samples(shard, held[:num_samples])))
        del held[:num_samples]

    for piece in read_documents(shared, task, tally, max_bytes=shared["max_sample_bytes"]):
        held.append(piece)
        if len(held) == 2 * most:  # what is left still fills a shard
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
