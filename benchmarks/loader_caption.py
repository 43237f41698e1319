"""Measure the caption loader: samples/s of one process on JPEG files with captions, next to a raw decode loop.

    python benchmarks/loader_caption.py [--image_size 224] [--batch_size 32] [--repeats 5]

Writes its own data to a temporary folder and alternates the readers. The raw loop only reads the same files in the same
order and decodes them with the same decoder; a second one also tokenizes the captions. Prints one JSON object: medians
in samples per second of processor time, and the medians of the ratios to the raw loop within a round. With a worker the
time is the clock's, which means little unless the machine is idle.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from caption_data import SAMPLES_PER_SHARD, write_caption_data
from tokenizers import Tokenizer

from vla_foundry.data import create_dataloader
from vla_foundry.data.plan import SamplePlan
from vla_foundry.images.codec import decode_image
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.shards import MemberSpan, index_shard
from vla_foundry.world import World

SEED = 0
WITH_WORKER = "loader, one worker"
Reader = Callable[[], Iterator[object]]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--num_samples", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_batches", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    # all readers decode and tokenize on one core, as workers do
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_caption_data(folder, num_samples=arguments.num_samples, image_size=arguments.image_size)
        readers = create_readers(folder, arguments)
        speeds: dict[str, list[float]] = {reader: [] for reader in readers}
        for round_number in range(arguments.repeats):
            for reader in list(readers)[:: 1 if round_number % 2 == 0 else -1]:
                batches = readers[reader]()
                for _ in range(6):
                    next(batches)
                clock = time.perf_counter if reader == WITH_WORKER else time.process_time
                start = clock()
                for _ in range(arguments.num_batches):
                    next(batches)
                seconds = clock() - start
                speeds[reader].append(arguments.num_batches * arguments.batch_size / seconds)
    raw = speeds["raw decode loop"]
    result = {
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "samples_per_second": {reader: round(statistics.median(values)) for reader, values in speeds.items()},
        "ratio_to_raw_decode_loop": {
            reader: round(statistics.median(a / b for a, b in zip(values, raw, strict=True)), 3)
            for reader, values in speeds.items()
        },
        "all_runs": {reader: [round(value) for value in values] for reader, values in speeds.items()},
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def create_readers(folder: Path, arguments: argparse.Namespace) -> dict[str, Reader]:
    """Return the readers to measure: name -> start reading from the beginning."""

    def start(num_workers: int) -> Reader:
        params = ImageCaptionDataParams(
            dataset_manifest=[str(folder / "train" / "manifest.jsonl")],
            tokenizer=str(folder / "tokenizer"),
            image_size=arguments.image_size,
            img_num_tokens=64,
            pack=True,
            seq_len=2048,
            num_workers=num_workers,
            allow_multiple_epochs=True,
            prefetch_factor=4,
        )
        size = arguments.batch_size
        loader = create_dataloader(params, World(), global_batch_size=16 * size, per_gpu_batch_size=size, seed=SEED)
        return lambda: loader.microbatches(0)

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    return {
        "raw decode loop": lambda: decode_raw(folder / "train", arguments.num_samples, arguments.batch_size),
        "raw decode loop that tokenizes": lambda: decode_raw(
            folder / "train", arguments.num_samples, arguments.batch_size, tokenizer=tokenizer
        ),
        "loader, in this process": start(0),
        WITH_WORKER: start(1),
    }


def decode_raw(folder: Path, num_samples: int, batch_size: int, tokenizer: Tokenizer | None = None) -> Iterator[object]:
    """Read and decode the files of the plan, tokenize captions if there is a tokenizer, and nothing else."""
    files, spans = [], []
    for number in range(-(-num_samples // SAMPLES_PER_SHARD)):
        file = (folder / f"shard_{number:06d}.tar").open("rb")
        spans.append([(members["jpg"], members["txt"]) for _, members in index_shard(file).samples])
        files.append(file)
    plan = SamplePlan(
        [[len(rows) for rows in spans]], [1.0], seed=SEED, global_batch_size=batch_size, block_size=20_000
    )
    order = plan.locate(np.arange(num_samples))
    places = itertools.cycle(zip(order.shard.tolist(), order.row.tolist(), strict=True))
    while True:
        batch = []
        for shard, row in itertools.islice(places, batch_size):
            image, caption = spans[shard][row]
            batch.append(decode_image(read(files[shard], image)))
            if tokenizer is not None:
                tokenizer.encode(read(files[shard], caption).decode())
        yield torch.stack(batch)


def read(file: BinaryIO, span: MemberSpan) -> bytes:
    """Read one member."""
    file.seek(span.offset)
    return file.read(span.size)


if __name__ == "__main__":
    main()
