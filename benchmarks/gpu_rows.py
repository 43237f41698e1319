"""The rows of gpu.py: each function measures one, and returns its figures and the FLOPs of a step."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_cases import Case, create_llm_case, create_qwen3vla_case, create_vla_case, create_vlm_case
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vla_foundry.inference.cuda_graphs import GraphedSampler
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.training.checkpoint_writer import save_checkpoint
from vla_foundry.training.distributed import parallelize
from vla_foundry.training.loop import autocast, train_step
from vla_foundry.training.state import TrainState, create_train_state
from vla_foundry.world import World

Figures = dict[str, Any]

NUM_LAPS, NUM_WARM_UPS = 10, 3
NUM_SAMPLING_STEPS = 10


def choose_device() -> str:
    """Return the first GPU, or the CPU."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def synchronize(device: str) -> None:
    """Wait until the device has done all its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def time_laps(run: Callable[[int], Any], count: int, device: str) -> list[float]:
    """Return the seconds of each of `count` calls in a row, by the device's own clock; calls get their number."""
    if device == "cpu":
        times = [time.perf_counter()]
        for number in range(count):
            run(number)
            times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    synchronize(device)
    events[0].record()
    for number in range(count):
        run(number)
        events[number + 1].record()
    synchronize(device)
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def time_once(run: Callable[[], Any], device: str) -> float:
    """Return the seconds until a call's work is done."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def read_peak_memory(device: str) -> float:
    """Return the most memory in use so far, in GB: of tensors on a GPU, else of the process."""
    if device == "cpu":
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def measure_device(is_tiny: bool) -> Figures:
    """Measure a large matrix product and a large copy."""
    device = choose_device()
    side, num_bytes = (256, 1 << 22) if is_tiny else (8192, 1 << 32)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = lambda _: torch.mm(left, right), lambda _: target.copy_(source)
    seconds = []
    for run in (product, copy):
        time_laps(run, NUM_LAPS, device)
        seconds.append(statistics.median(time_laps(run, NUM_LAPS, device)))
    figures: Figures = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matmul_tflops": float(f"{2 * side**3 / seconds[0] / 1e12:.4g}"),
        "copy_gb_per_s": float(f"{2 * num_bytes / seconds[1] / 1e9:.4g}"),
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        figures |= {"device": properties.name, "cuda": torch.version.cuda}
        figures["memory_gb"] = round(properties.total_memory / 1e9, 1)
    return figures


def wrap(model: nn.Module, device: str, precision: str, *, compiled: bool, **options: Any) -> nn.Module:
    """Compile a model's blocks as a run does it; on a CPU, blocks are traced, but no code is generated."""
    if device == "cpu":
        torch.compiler.set_default_backend("eager")
    options |= {"world": World(device=device), "compile_blocks": compiled, "precision": precision}
    return parallelize(model, DistributedParams(), **options)


def create_state(case: Case, device: str, *, compiled: bool) -> TrainState:
    """Create a model on the device, wrapped and compiled as a run does it, and its optimizer."""
    torch.manual_seed(0)
    with torch.device(device):
        model = create_model(case.params.model)
    model.train()
    hparams, ema = case.params.hparams, case.params.ema
    options = {name: getattr(hparams, name) for name in ("fp8", "flash_attention_3", "activation_budget")}
    forward = wrap(model, device, hparams.precision, compiled=compiled, **options)
    return create_train_state(model, forward, hparams=hparams, ema=ema, total_steps=10_000)


def create_step(case: Case, state: TrainState, device: str) -> Callable[[int], Any]:
    """Return the step of the training loop, which takes the batches in turn."""
    handler = create_batch_handler(case.params)
    batches = case.batches
    if device != "cpu":  # as the loader does it
        batches = [{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in b.items()} for b in batches]

    def step(number: int) -> None:
        batch = batches[number % len(batches)]
        train_step(state, [batch], handler=handler, hparams=case.params.hparams, world=World(device=device))

    return step


def train(case: Case, *, compiled: bool) -> Figures:
    """Measure a training step."""
    device = choose_device()
    state = create_state(case, device, compiled=compiled)
    step = create_step(case, state, device)
    # each batch once
    num_warm_ups = max(NUM_WARM_UPS, len(case.batches))
    warm_up = time_once(lambda: [step(number) for number in range(num_warm_ups)], device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    graphs = counters["stats"]["unique_graphs"]
    median = statistics.median(time_laps(step, NUM_LAPS, device))
    figures: Figures = {
        "step_ms": round(1000 * median, 2),
        **{f"{unit}_per_s": float(f"{count / median:.5g}") for unit, count in case.units.items()},
        "peak_memory_gb": read_peak_memory(device),
    }
    if compiled:
        figures |= {
            "compile_s": round(warm_up - num_warm_ups * median, 1),
            "graph_breaks": sum(counters["graph_break"].values()),
            "recompilations": counters["stats"]["unique_graphs"] - graphs,
        }
    return figures | {"flops": case.count_flops(state.model), "seconds": median}


def train_llm(is_tiny: bool, *, compiled: bool = False, **options: Any) -> Figures:
    """Measure the language model of 1.2 B on rows of 2048 tokens; see `create_llm_case` for the options."""
    return train(create_llm_case(is_tiny, **options), compiled=compiled)


def train_vlm(is_tiny: bool, *, packed: bool, compiled: bool = False) -> Figures:
    """Measure the vision-language model of 1.3 B on 64 captions a step."""
    return train(create_vlm_case(is_tiny, packed=packed), compiled=compiled)


def train_vla(is_tiny: bool, *, draws: int, compiled: bool = False) -> Figures:
    """Measure the policy of 1.7 B."""
    return train(create_vla_case(is_tiny, batch=32, draws=draws), compiled=compiled)


def train_qwen3vla(is_tiny: bool, *, draws: int, compiled: bool = False) -> Figures:
    """Measure the policy on the architecture of Qwen3-VL-2B, with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        return train(create_qwen3vla_case(is_tiny, Path(folder), batch=32, draws=draws), compiled=compiled)


def infer(is_tiny: bool, *, compiled: bool = False, graphs: bool = False) -> Figures:
    """Measure from one observation's uint8 images on the host to its actions on the host."""
    device, case = choose_device(), create_vla_case(is_tiny, batch=1, draws=1)
    with torch.device(device):
        model: Any = create_model(case.params.model)
    model.eval()
    wrap(model, device, "fp32", compiled=compiled)
    handler: Any = create_batch_handler(case.params)
    seeds = torch.zeros(1, dtype=torch.int64, device=device)

    def sample(inputs: dict[str, Any], seeds: Tensor) -> Tensor:
        with autocast(case.params.hparams.precision, device):
            return model.sample(inputs, seeds=seeds, num_steps=NUM_SAMPLING_STEPS).float()

    # a CPU has no graphs, but the rest of the path runs
    capture = None if device != "cpu" else _run_again
    sampler: Any = GraphedSampler(sample, capture=capture) if graphs else sample

    def act() -> None:
        sampler(handler.prepare_sampling(case.batches[0], device), seeds).cpu()

    first = time_once(act, device)
    for _ in range(NUM_WARM_UPS):
        act()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    seconds = sorted(time_once(act, device) for _ in range(5 if is_tiny else 200))
    median = statistics.median(seconds)
    return {
        "p50_ms": round(1000 * median, 2),
        "p99_ms": round(1000 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], 2),
        "first_s": round(first, 2),
        "peak_memory_gb": read_peak_memory(device),
        # a forward pass is a third of a step; the head runs once for each sampling step
        "flops": case.count_flops(model, NUM_SAMPLING_STEPS) / 3,
        "seconds": median,
    }


def _run_again(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    output = run()
    return lambda: output.copy_(run()), output


def checkpoint(is_tiny: bool) -> Figures:
    """Measure how long a checkpoint of weights and moments stops training."""
    device, case = choose_device(), create_llm_case(is_tiny, batch=1)
    state = create_state(case, device, compiled=False)
    create_step(case, state, device)(0)
    with tempfile.TemporaryDirectory() as folder:
        save = partial(save_checkpoint, Path(folder), state, world=World(device=device), facts={})
        seconds = time_once(save, device)
        num_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"blocked_s": round(seconds, 2), "gb": float(f"{num_bytes / 1e9:.4g}"), "repeats": 1}


def start(is_tiny: bool) -> Figures:
    """Measure from the start of a process to its first step done, without and with a cache of compiled code."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        for name in ("cold_s", "warm_s"):
            code = f"import gpu_rows; gpu_rows.take_first_step({is_tiny})"
            started = time.time()
            output = subprocess.run(
                [sys.executable, "-c", code], env=os.environ | caches, stdout=subprocess.PIPE, check=True
            ).stdout
            figures[name] = round(float(output) - started, 1)
    return figures


def take_first_step(is_tiny: bool) -> None:
    """Create the language model, take one compiled step and print the time."""
    device, case = choose_device(), create_llm_case(is_tiny, batch=8)
    step = create_step(case, create_state(case, device, compiled=True), device)
    time_once(lambda: step(0), device)
    print(time.time())
