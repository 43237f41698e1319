"""Measure the latency of sampling a chunk of actions, with and without caching the conditioning's keys and values.

From the uint8 images of one observation to actions, at batch 1. `kept` says whether keys and values are cached over the
sampling steps: not with time_conditioning concat, where the conditioning depends on the time and is encoded again at
every step. `share_of_floor` is the time of the computation's matrix products alone, over the median. Prints one JSON
object.

    uv run python benchmarks/vla_infer.py --rounds 20
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext

import torch
from bare_matmuls import measure_matmul_rate, record, time_products
from policy_setup import PRESET, create_batch, create_params, create_policy

from vla_foundry.params import TrainExperimentParams


def measure(params: TrainExperimentParams, *, views: int, steps: int, rounds: int, batch_size: int) -> dict[str, float]:
    """Time one call of the policy, and its matrix products alone."""
    model, handler = create_policy(params)
    model.eval()
    batch = create_batch(params, num_samples=batch_size, num_views=views)
    seeds = torch.arange(batch_size)
    uses_bf16 = params.hparams.precision == "amp_bfloat16"

    def act() -> None:
        with torch.autocast("cpu", torch.bfloat16) if uses_bf16 else nullcontext():
            model.sample(handler.prepare_sampling(batch, "cpu"), seeds=seeds, num_steps=steps)

    act()
    floor = time_products(record(act))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    median = statistics.median(seconds)
    return {
        "p50_ms": round(1000 * median, 1),
        "p99_ms": round(1000 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], 1),
        "floor_ms": round(1000 * floor, 1),
        "share_of_floor": round(floor / median, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sampling_steps", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--precisions", nargs="+", default=["fp32"])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for precision in arguments.precisions:
        for is_kept in (True, False):
            params = create_params(
                arguments.preset,
                repeats=1,
                time_conditioning="adaln_zero" if is_kept else "concat",
                precision=precision,
            )
            for views in arguments.views:
                for steps in arguments.sampling_steps:
                    measured = measure(
                        params, views=views, steps=steps, rounds=arguments.rounds, batch_size=arguments.batch
                    )
                    about = {"precision": precision, "kept": is_kept, "views": views, "sampling_steps": steps}
                    results.append({**about, **measured})
    rates = {name: round(measure_matmul_rate(getattr(torch, name)) / 1e9) for name in ("float32", "bfloat16")}
    summary = {"threads": arguments.threads, "matmul_gflops_per_second": rates, "batch": arguments.batch}
    print(json.dumps({**summary, "results": results}, indent=1))


if __name__ == "__main__":
    main()
