"""Measure how training scales over ranks and nodes: samples per second and GPU with DDP, FSDP2 and HSDP.

    python benchmarks/scaling.py                            # 1, 2, 4, ... ranks, up to the GPUs of this machine
    python benchmarks/scaling.py --preset tiny --ranks 1 2  # toy model on a CPU, ranks meet by gloo
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 benchmarks/scaling.py \\
        --output scaling.jsonl                              # on each node: all ranks of 4 nodes

One JSON line for each wrapper and number of ranks. `efficiency` is the rate of a GPU over that of the same preset in
the run with the fewest ranks, DDP where there is one, among the lines so far: those of `--output` count too. Samples
are random, and loading is not included.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

WRAPPERS = ("ddp", "fsdp", "hsdp")
PRESETS = ("tiny", "llm", "vlm", "vla")
NUM_LAPS, NUM_WARM_UPS = 20, 5


def create_case(preset: str) -> Any:
    """Return the model and the batches of a preset."""
    from gpu_cases import create_llm_case, create_vla_case, create_vlm_case

    if preset == "vlm":
        return create_vlm_case(False, packed=True)
    if preset == "vla":
        return create_vla_case(False, batch=32, draws=8)
    return create_llm_case(preset == "tiny", batch=8)


def measure(preset: str, wrapper: str, world: Any, num_nodes: int) -> dict[str, Any] | None:
    """Collective: call on every rank. Measure steps; None if the ranks do not form groups, as HSDP needs them."""
    import torch
    from gpu_rows import read_peak_memory, time_laps

    from vla_foundry.models import create_batch_handler, create_model
    from vla_foundry.params.distributed import DistributedParams
    from vla_foundry.training.distributed import gather_objects, parallelize
    from vla_foundry.training.loop import train_step
    from vla_foundry.training.state import create_train_state

    # gradients alone cross nodes
    groups = num_nodes if num_nodes > 1 else 2
    if wrapper == "hsdp" and world.world_size % groups:
        return None
    case, on_gpu = create_case(preset), world.device != "cpu"
    hparams = case.params.hparams
    torch.manual_seed(0)
    model = create_model(case.params.model).train()
    forward = parallelize(
        model,
        DistributedParams(fsdp=wrapper != "ddp", replicate_size=groups if wrapper == "hsdp" else 1),
        world=world,
        compile_blocks=on_gpu,
        precision=hparams.precision,
    )
    state = create_train_state(model, forward, hparams=hparams, ema=case.params.ema, total_steps=10_000)
    handler = create_batch_handler(case.params)

    def step(number: int) -> None:
        batch = case.batches[number % len(case.batches)]
        train_step(state, [batch], handler=handler, hparams=hparams, world=world)

    time_laps(step, NUM_WARM_UPS, world.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    # the slowest rank's, if they differ
    seconds = max(gather_objects(statistics.median(time_laps(step, NUM_LAPS, world.device))))
    return {
        "preset": preset,
        "wrapper": wrapper,
        "ranks": world.world_size,
        "nodes": num_nodes,
        "step_ms": round(1000 * seconds, 2),
        "samples_per_s_per_gpu": float(f"{case.units['samples'] / seconds:.5g}"),
        "peak_memory_gb": max(gather_objects(read_peak_memory(world.device))),
        "repeats": NUM_LAPS,
    }


def run_ranks(arguments: argparse.Namespace) -> None:
    """Collective: call on every rank. Measure all wrappers on the ranks that torchrun started; rank 0 prints."""
    import torch

    from vla_foundry.params.distributed import DistributedParams
    from vla_foundry.training.distributed import leave_process, start_process_group, stop_process_group
    from vla_foundry.world import read_ranks_per_node, read_world

    world = read_world(0 if arguments.preset == "tiny" else torch.cuda.device_count())
    if world.device == "cpu":
        torch.set_num_threads(1)
    # of one rank too, for FSDP
    start_process_group(DistributedParams(fsdp=True), world)
    num_nodes = world.world_size // read_ranks_per_node(world.world_size)
    lines = read_lines(arguments.output)
    for wrapper in arguments.wrappers:
        line = measure(arguments.preset, wrapper, world, num_nodes)
        gc.collect()
        if line is None or not world.is_main:
            continue
        lines.append(add_efficiency(line, lines))
        print(json.dumps(line), flush=True)
        if arguments.output is not None:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
    stop_process_group()
    leave_process(0)


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    """Return what was measured before; [] if there is no such file."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def add_efficiency(line: dict[str, Any], lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Add the rate of a GPU relative to that with the fewest ranks, with DDP where that was measured."""
    same = [other for other in (*lines, line) if other["preset"] == line["preset"]]
    base = min(same, key=lambda other: (other["ranks"], WRAPPERS.index(other["wrapper"])))
    line["efficiency"] = float(f"{line['samples_per_s_per_gpu'] / base['samples_per_s_per_gpu']:.4g}")
    return line


def list_numbers_of_ranks(arguments: argparse.Namespace) -> Iterator[int]:
    """Yield the numbers of ranks to measure on this machine."""
    if arguments.ranks:
        yield from arguments.ranks
        return
    import torch

    most = 2 if arguments.preset == "tiny" else torch.cuda.device_count()
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="llm")
    parser.add_argument("--wrappers", nargs="+", choices=WRAPPERS, default=WRAPPERS)
    parser.add_argument("--ranks", nargs="+", type=int, help="numbers of ranks; by default powers of 2, and all GPUs")
    parser.add_argument("--output", type=Path, help="a file that the lines are appended to")
    arguments = parser.parse_args()
    if arguments.ranks and min(arguments.ranks) < 1:
        parser.error("--ranks must be above 0.")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        parser.error(f"--output {arguments.output}: its folder does not exist.")
    if arguments.preset != "tiny":
        import torch

        if not torch.cuda.is_available():
            parser.error(f"--preset {arguments.preset} needs GPUs, but torch sees none. Use --preset tiny.")
    return arguments


def main() -> int:
    """Measure on the ranks of this launch, or launch some."""
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent)]
    arguments = parse()
    if "WORLD_SIZE" in os.environ:
        run_ranks(arguments)
    lines = read_lines(arguments.output)
    for count in list_numbers_of_ranks(arguments):
        words = [str(here / "scaling.py"), "--preset", arguments.preset, "--wrappers", *arguments.wrappers]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        done = subprocess.run([*launcher, *words], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode
        for text in done.stdout.splitlines():
            line = json.loads(text)
            lines.append(add_efficiency(line, lines))
            print(json.dumps(line), flush=True)
            if arguments.output is not None:
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(line)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
