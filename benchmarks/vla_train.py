"""Measure samples and draws per second of a policy's optimizer step, against bare matrix products of its shapes.

The step is that of the training loop: normalise images, forward, backward, clip, AdamW. `share_of_floor` is the time of
the step's matrix products alone, over that of the step. Prints one JSON object.

    uv run python benchmarks/vla_train.py --steps 4 --rounds 3
"""

import argparse
import json
import statistics
import time

import torch
from bare_matmuls import measure_matmul_rate, record, time_products
from policy_setup import PRESET, create_batch, create_params, create_policy

from vla_foundry.params import TrainExperimentParams
from vla_foundry.training.loop import train_step
from vla_foundry.training.state import create_train_state
from vla_foundry.world import World


def measure(params: TrainExperimentParams, *, batch_size: int, views: int, steps: int, rounds: int) -> dict[str, float]:
    """Time a step, and its matrix products alone."""
    model, handler = create_policy(params)
    model.train()
    state = create_train_state(model, model, hparams=params.hparams, ema=params.ema, total_steps=10_000)
    batch = create_batch(params, num_samples=batch_size, num_views=views)

    def step() -> None:
        train_step(state, [batch], handler=handler, hparams=params.hparams, world=World())

    step()
    floor = time_products(record(step))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        seconds.append((time.perf_counter() - start) / steps)
    second = statistics.median(seconds)
    draws = params.model.action_head.num_action_head_repeats  # pyright: ignore
    return {
        "samples_per_second": round(batch_size / second, 2),
        "draws_per_second": round(batch_size * draws / second, 2),
        "step_ms": round(1000 * second, 1),
        "floor_ms": round(1000 * floor, 1),
        "share_of_floor": round(floor / second, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "amp_bfloat16"])
    parser.add_argument("--time_conditioning", nargs="+", default=["concat", "adaln_zero"])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for precision in arguments.precisions:
        for time_conditioning in arguments.time_conditioning:
            for repeats in arguments.repeats:
                params = create_params(
                    arguments.preset, repeats=repeats, time_conditioning=time_conditioning, precision=precision
                )
                measured = measure(
                    params,
                    batch_size=arguments.batch,
                    views=arguments.views,
                    steps=arguments.steps,
                    rounds=arguments.rounds,
                )
                about = {"precision": precision, "time_conditioning": time_conditioning, "repeats": repeats}
                results.append({**about, **measured})
    rates = {name: round(measure_matmul_rate(getattr(torch, name)) / 1e9) for name in ("float32", "bfloat16")}
    summary = {"threads": arguments.threads, "matmul_gflops_per_second": rates, "batch": arguments.batch}
    print(json.dumps({**summary, "results": results}, indent=1))


if __name__ == "__main__":
    main()
