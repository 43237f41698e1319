"""Measure the text loader: tokens/s of one process on tokenized shards, next to a bare memory-map copy.

    python benchmarks/loader_text.py [--seq_len 2048] [--batch_size 32] [--repeats 5]

Writes its own data (about 270 MB of tokenized shards and a little gzipped JSON) to a temporary folder, reads it once to
fill the page cache, then alternates the readers and prints one JSON object: the median of each in million tokens/s, and
its ratio to the bare copy, which only gathers the same rows in the same order into int32.
"""

import argparse
import gzip
import io
import itertools
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vla_foundry.data import create_dataloader
from vla_foundry.data.plan import SamplePlan
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.shards import ManifestEntry, format_manifest
from vla_foundry.world import World

VOCAB_SIZE = 49_280
NUM_SHARDS, RECORDS_PER_SHARD = 16, 4096
NUM_JSON_SAMPLES = 512
MEAN_DOCUMENT_LENGTH = 600
SEED = 0


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_batches", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "tokens", arguments.seq_len)
        write_json(folder / "json", arguments.seq_len)
        readers = create_readers(folder, arguments.seq_len, arguments.batch_size)
        times: dict[str, list[float]] = {reader: [] for reader in readers}
        for _, (reader, (create, scale)) in itertools.product(range(arguments.repeats), readers.items()):
            num_batches = max(8, int(arguments.num_batches * scale))
            batches = create()
            for _ in range(8):
                next(batches)
            start = time.perf_counter()
            for _ in range(num_batches):
                next(batches)
            seconds = time.perf_counter() - start
            times[reader].append(num_batches * arguments.batch_size * arguments.seq_len / seconds / 1e6)
    medians = {reader: statistics.median(values) for reader, values in times.items()}
    result = {
        "seq_len": arguments.seq_len,
        "batch_size": arguments.batch_size,
        "million_tokens_per_second": {reader: round(value, 2) for reader, value in medians.items()},
        "ratio_to_bare_copy": {reader: round(value / medians["bare copy"], 3) for reader, value in medians.items()},
        "all_runs": {reader: [round(value, 1) for value in values] for reader, values in times.items()},
    }
    json.dump(result, sys.stdout, indent=2)
    print()


Reader = tuple[Callable[[], Iterator], float]


def create_readers(folder: Path, seq_len: int, batch_size: int) -> dict[str, Reader]:
    """Return the readers to measure: name -> (start reading from the beginning, share of the batches to read)."""

    def start(manifests: list[Path], num_workers: int) -> Callable[[], Iterator]:
        params = TextDataParams(
            dataset_manifest=[str(manifest) for manifest in manifests],
            dataset_weighting=[1.0] * len(manifests),
            seq_len=seq_len,
            num_workers=num_workers,
            allow_multiple_epochs=True,
            prefetch_factor=8,
        )
        loader = create_dataloader(
            params, World(), global_batch_size=batch_size * 16, per_gpu_batch_size=batch_size, seed=SEED
        )
        return lambda: loader.microbatches(0)

    tokens, json_lists = folder / "tokens" / "manifest.jsonl", folder / "json" / "manifest.jsonl"
    second = folder / "tokens" / "manifest_2.jsonl"
    second.write_text(tokens.read_text(encoding="utf-8"), encoding="utf-8")
    return {
        "bare copy": (lambda: copy_rows(folder / "tokens", seq_len, batch_size), 1.0),
        "records, in this process": (start([tokens], 0), 1.0),
        "records, one worker": (start([tokens], 1), 1.0),
        "records of two datasets, one worker": (start([tokens, second], 1), 1.0),
        "gzipped JSON, in this process": (start([json_lists], 0), 0.02),
        "gzipped JSON, one worker": (start([json_lists], 1), 0.02),
    }


def copy_rows(folder: Path, seq_len: int, batch_size: int) -> Iterator[np.ndarray]:
    """Gather the rows of the plan from bare memory maps."""
    maps = []
    for number in range(NUM_SHARDS):
        path = folder / f"shard_{number:06d}.tar"
        with tarfile.open(path) as tar:
            offset = tar.getmember(f"shard_{number:06d}.tokens.u16").offset_data
        shape = (RECORDS_PER_SHARD, seq_len + 1)
        maps.append(np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=shape)))
    sizes = [[RECORDS_PER_SHARD] * NUM_SHARDS]
    plan = SamplePlan(sizes, [1.0], seed=SEED, global_batch_size=batch_size, block_size=200_000)
    order = plan.locate(np.arange(NUM_SHARDS * RECORDS_PER_SHARD))
    shards, rows = order.shard.tolist(), order.row.tolist()
    for first in itertools.count(0, batch_size):
        batch = np.empty((batch_size, seq_len + 1), dtype=np.int32)
        for place in range(batch_size):
            number = (first + place) % len(rows)
            batch[place] = maps[shards[number]][rows[number]]
        yield batch


def write_tokens(folder: Path, seq_len: int) -> None:
    """Write shards of tokenized records with document boundaries."""
    folder.mkdir()
    rng = np.random.default_rng(SEED)
    entries = []
    for number in range(NUM_SHARDS):
        name = f"shard_{number:06d}"
        tokens = rng.integers(0, VOCAB_SIZE, (RECORDS_PER_SHARD, seq_len + 1)).astype("<u2")
        ends, offsets = draw_documents(rng, seq_len + 1)
        info = {"dtype": "uint16", "record_length": seq_len + 1, "num_sequences": RECORDS_PER_SHARD}
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            add_member(tar, f"{name}.tokens.u16", tokens.tobytes())
            add_member(tar, f"{name}.document_ends.u32", ends.tobytes())
            add_member(tar, f"{name}.document_offsets.u64", offsets.tobytes())
            add_member(tar, f"{name}.records.json", json.dumps(info).encode())
        entries.append(ManifestEntry(shard=name, num_sequences=RECORDS_PER_SHARD))
    (folder / "manifest.jsonl").write_text(format_manifest(entries), encoding="utf-8")


def draw_documents(rng: np.random.Generator, record_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide one shard's stream of tokens into documents; return their ends by record, and where each record begins."""
    total = RECORDS_PER_SHARD * record_length
    lengths = rng.exponential(MEAN_DOCUMENT_LENGTH, 2 * total // MEAN_DOCUMENT_LENGTH).astype(np.int64) + 2
    boundaries = np.cumsum(lengths)
    record_ends = np.arange(1, RECORDS_PER_SHARD + 1) * record_length
    boundaries = np.union1d(boundaries[boundaries < total], record_ends)
    offsets = np.concatenate([[0], np.searchsorted(boundaries, record_ends) + 1])
    return ((boundaries - 1) % record_length + 1).astype("<u4"), offsets.astype("<u8")


def write_json(folder: Path, seq_len: int) -> None:
    """Write a shard of gzipped JSON lists."""
    folder.mkdir()
    rng = np.random.default_rng(SEED)
    with tarfile.open(folder / "shard_000000.tar", "w") as tar:
        for number in range(NUM_JSON_SAMPLES):
            tokens = rng.integers(0, VOCAB_SIZE, seq_len + 1).tolist()
            add_member(tar, f"{number:032x}.json.gz", gzip.compress(json.dumps(tokens).encode()))
    entry = ManifestEntry(shard="shard_000000", num_sequences=NUM_JSON_SAMPLES)
    (folder / "manifest.jsonl").write_text(format_manifest([entry]), encoding="utf-8")


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append one member."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
