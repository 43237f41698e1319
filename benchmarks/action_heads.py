"""Measure the time of one chunk of actions of several policies, side by side, on held-out observations of their data.

From the uint8 images of one observation to normalised actions, at batch 1. Policies take turns, so that what else the
machine does hits all alike. Prints one JSON object: for each run milliseconds (median, 99th percentile) and the median
over that of the first run.

    uv run python benchmarks/action_heads.py --manifest shards/validation/manifest.jsonl runs/flow runs/fast_tokens
"""

import argparse
import json
import statistics
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vla_foundry.data import create_dataloader
from vla_foundry.inference.policy_files import load_policy_files
from vla_foundry.models.policy import RoboticsBatchHandler


def load(run: str, manifest: str, rounds: int) -> tuple[Any, list[dict[str, Any]]]:
    """Return a run's model and its inputs for some observations."""
    files = load_policy_files(run)
    data = replace(files.data, val_dataset_manifest=[manifest], num_workers=0)
    loader = create_dataloader(data, split="validation", per_gpu_batch_size=1, total_samples=rounds)
    handler = RoboticsBatchHandler(files.params)
    with closing(loader):
        inputs = [handler.prepare_sampling(batch, "cpu") for batch in islice(loader.microbatches(0), rounds)]
    return files.load_model(run, device="cpu", use_ema=None), inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = {Path(run).name: load(run, options.manifest, options.rounds) for run in options.runs}
    times: dict[str, list[float]] = {name: [] for name in loaded}
    for number in range(-2, options.rounds):
        for name, (model, inputs) in loaded.items():
            start = time.perf_counter()
            model.sample(inputs[max(0, number)], seeds=torch.tensor([0]))
            if number >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    first = statistics.median(next(iter(times.values())))
    report = {
        name: {
            "p50_ms": round(statistics.median(laps), 2),
            "p99_ms": round(sorted(laps)[int(0.99 * len(laps))], 2),
            "ratio": round(statistics.median(laps) / first, 2),
        }
        for name, laps in times.items()
    }
    print(json.dumps({"rounds": options.rounds, "threads": options.threads, "policies": report}, indent=2))


if __name__ == "__main__":
    main()
