"""Checkpoints: how long training waits for a save, at once or in the background, on one process and on FSDP2 ranks.

    python benchmarks/checkpoint.py [--n_layers 8] [--hidden_dim 512] [--saves 5] [--folder DIR]

Weights, average and moments of a language model in fp32. Prints one JSON line for one process and one for two ranks:
medians over the saves, which alternate. `waits` is the time until `save` returns, `share` the background's waiting
over that of a save at once, `first_waits` that of the first save, which takes its memory from the system.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vla_foundry.models import create_model
from vla_foundry.params import DistributedParams, EMAParams, HyperParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.run_folder import find_fault
from vla_foundry.training.checkpoint_writer import CheckpointWriter
from vla_foundry.training.distributed import (
    barrier,
    leave_process,
    parallelize,
    start_process_group,
    stop_process_group,
)
from vla_foundry.training.state import TrainState, create_train_state, update_weights
from vla_foundry.world import World, read_world


def create_state(args: argparse.Namespace, params: DistributedParams, world: World) -> TrainState:
    """Create a state whose optimizer has moments."""
    model = create_model(
        TransformerParams(hidden_dim=args.hidden_dim, n_layers=args.n_layers, n_heads=8, vocab_size=8192)
    )
    forward = parallelize(model, params, world=world, precision="fp32")
    state = create_train_state(model, forward, hparams=HyperParams(), ema=EMAParams(enabled=True), total_steps=10**6)
    ids = torch.arange(16, device=world.device)[None]
    loss = forward(input_ids=ids, targets=ids).sum
    loss.backward()
    update_weights(state, loss.detach(), max_norm=None)
    return state


def save(writer: CheckpointWriter, state: TrainState) -> dict[str, float]:
    """Save the next step; return the seconds that training waits, and those until all is on disk."""
    state.step += 1
    barrier()
    started = time.perf_counter()
    folder = writer.save(state, {})
    waits = time.perf_counter() - started
    writer.wait()
    barrier()
    seconds = time.perf_counter() - started
    fault = find_fault(folder)
    assert fault is None, fault
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    barrier()
    if writer._world.is_main:
        shutil.rmtree(folder)
    return {"waits": waits, "seconds": seconds, "bytes": size}


def measure(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Collective: call on every rank. Alternate saves at once and in the background; return medians."""
    params = DistributedParams(fsdp=world.world_size > 1)
    start_process_group(params, world)
    state = create_state(args, params, world)
    run = Path(args.folder) / f"{world.world_size}"
    at_once = CheckpointWriter(run, world)
    background = CheckpointWriter(run, world, background=params)
    first = save(background, state)
    pairs = [(save(at_once, state), save(background, state)) for _ in range(args.saves)]
    median = {
        kind: {key: statistics.median(pair[index][key] for pair in pairs) for key in ("waits", "seconds")}
        for index, kind in enumerate(("at_once", "background"))
    }
    return {
        "ranks": world.world_size,
        "wrapper": "FSDP2" if params.fsdp else "none",
        "device": world.device,
        "megabytes": round(first["bytes"] / 1e6, 1),
        **{kind: {key: round(value, 4) for key, value in values.items()} for kind, values in median.items()},
        "share": round(median["background"]["waits"] / median["at_once"]["waits"], 4),
        "first_waits": round(first["waits"], 4),
        "saves": args.saves,
    }


def main() -> None:
    """Measure one process here, then two ranks that torchrun starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden_dim", 512), ("n_layers", 8), ("saves", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", help="where checkpoints are written, and deleted again; default: a temporary one")
    args = parser.parse_args()
    if min(args.n_layers, args.saves) < 1 or args.hidden_dim < 16 or args.hidden_dim % 16:
        parser.error("--n_layers and --saves must be above 0, and --hidden_dim a multiple of 16.")
    if args.folder is not None and not Path(args.folder).is_dir():
        parser.error(f"--folder {args.folder} does not exist.")
    world = read_world(torch.cuda.device_count())
    if world.world_size > 1:
        found = measure(args, world)
        if world.is_main:
            print(json.dumps(found), flush=True)
        stop_process_group()
        leave_process(0)
    with tempfile.TemporaryDirectory(prefix="checkpoint_", dir=args.folder) as folder:
        args.folder = folder
        print(json.dumps(measure(args, world)), flush=True)
        words = ["--folder", folder]
        for name in ("hidden_dim", "n_layers", "saves"):
            words += [f"--{name}", str(getattr(args, name))]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([sys.executable, *launcher, __file__, *words], check=True)


if __name__ == "__main__":
    main()
