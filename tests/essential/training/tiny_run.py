"""A tiny model, loader and handler that obey the specs of the loop, and scenarios to train them in.

Imported by the tests through the fixture `tiny`; run by torchrun as a script, for several scenarios in one launch:
    torchrun --nproc_per_node 2 tiny_run.py SCENARIOS.json OUTPUT.pt
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_foundry.batch import Batch, LossOutput
from vla_foundry.models.layers import add_adapters
from vla_foundry.models.weights import describe_base
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.params.models.roles import LoRAParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.run_folder import find_checkpoint
from vla_foundry.training.checkpoint import load_checkpoint
from vla_foundry.training.distributed import (
    gather,
    leave_process,
    local_shard,
    parallelize,
    shard_like,
    start_process_group,
    stop_process_group,
)
from vla_foundry.training.experiment import cast_parameters, create_state
from vla_foundry.training.loop import Run, train
from vla_foundry.training.metrics import MetricLog
from vla_foundry.training.start import check_same_config
from vla_foundry.training.state import create_train_state
from vla_foundry.world import World, read_world

VOCAB, WIDTH, LENGTH = 13, 10, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class TinyModel(nn.Module):
    """Embedding, blocks, a tied head, a scalar parameter, a persistent and a temporary buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embeddings.weight
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("offset", torch.linspace(-1, 1, VOCAB))
        self.register_buffer("table", torch.ones(VOCAB), persistent=False)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def num_flops_per_token(self, seq_len: int) -> float:
        return 6.0 * WIDTH * WIDTH * len(self.layers)

    def forward(self, input_ids: Tensor, targets: Tensor, factor: float = 1.0) -> LossOutput:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.scale * self.head(x) + self.offset * self.table
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        count = (targets != -100).sum()
        hits = ((logits.argmax(dim=-1) == targets) & (targets != -100)).sum()
        return LossOutput(sum=factor * loss, count=count, logs={"accuracy": hits})


@dataclass
class TinyHandler:
    """Turns a batch into inputs; the loss of a microbatch that holds a position in `spoiled` is not finite."""

    seen: list[list[int]]
    spoiled: list[int]
    # position at which this process gets SIGTERM, fails, or can write no more than some bytes to a file
    stop_at: int = -1
    fail_at: int = -1
    full_at: int = -1

    def prepare(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        self.seen.append(batch["positions"].tolist())
        if self.stop_at in self.seen[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.fail_at in self.seen[-1]:
            raise ValueError("this rank fails")
        if self.full_at in self.seen[-1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        tokens = batch["input_ids"].long()
        targets = tokens[:, 1:].masked_fill(~batch["target_mask"][:, 1:], -100)
        factor = float("nan") if set(self.spoiled) & set(self.seen[-1]) else 1.0
        return {"input_ids": tokens[:, :-1], "targets": targets, "factor": factor}

    def count_targets(self, inputs: dict[str, Any]) -> Tensor:
        return (inputs["targets"] != -100).sum()


@dataclass
class TinyLoader:
    """Samples that are functions of their position, with 0 to 6 targets each."""

    world: World
    global_batch_size: int
    per_gpu_batch_size: int
    num_samples: int | None = None

    def microbatches(self, first_global_batch: int) -> Iterator[Batch]:
        size = self.per_gpu_batch_size * self.world.world_size
        number = first_global_batch * self.global_batch_size // size
        while self.num_samples is None or number * size < self.num_samples:
            first = number * size + self.world.rank * self.per_gpu_batch_size
            end = first + self.per_gpu_batch_size
            yield self.read(np.arange(first, end if self.num_samples is None else min(end, self.num_samples)))
            number += 1

    def read(self, positions: np.ndarray) -> Batch:
        tokens, masks = [], []
        for position in positions:
            draw = np.random.Generator(np.random.Philox(key=int(position)))
            tokens.append(np.cumsum(draw.integers(0, 3, LENGTH + 1)) % VOCAB)
            masks.append(np.arange(LENGTH + 1) > LENGTH - draw.integers(0, LENGTH + 1) * (position % 5 != 3))
        mask = np.array(masks)
        mask[:, 0] = False
        return {
            "modality": "text",
            "positions": torch.from_numpy(positions),
            "input_ids": torch.from_numpy(np.array(tokens, dtype=np.int32)),
            "target_mask": torch.from_numpy(mask),
            "dropped": {"short": 1} if positions[0] == 0 else {},
        }

    def describe(self) -> dict[str, Any]:
        return {"global_batch_size": self.global_batch_size}

    def progress(self, global_batch: int) -> dict[str, float]:
        return {}


@dataclass
class Recorder:
    """A sink that keeps what is written to it."""

    lines: list[dict[str, Any]]

    def write(self, kind: str, step: int, metrics: Any) -> None:
        self.lines.append({"kind": kind, "step": step, **metrics})

    def close(self) -> None: ...


def create_params(save_path: str | Path, **changes: Any) -> TrainExperimentParams:
    """Params of 20 steps of 16 samples in double precision, each logged; `changes` as `hparams__lr` or `num_epochs`."""
    params = TrainExperimentParams(
        name="run",
        save_path=str(save_path),
        total_train_samples=20 * 16,
        total_val_samples=24,
        num_checkpoints=2,
        log_every_n_steps=1,
        wandb=False,
        data=TextDataParams(),
        model=TransformerParams(),
        hparams=HyperParams(
            precision="fp64",
            global_batch_size=16,
            per_gpu_batch_size=2,
            lr=0.03,
            warmup=3.0,
            grad_clip_norm=0.5,
            wd=0.1,
        ),
        distributed=DistributedParams(),
        ema=EMAParams(enabled=True, type="vanilla", alpha=0.8),
    )
    for name, value in changes.items():
        section, _, leaf = name.rpartition("__")
        if name == "model__lora":
            value = LoRAParams(**value)
        if section:
            params = replace(params, **{section: replace(getattr(params, section), **{leaf: value})})
        else:
            params = replace(params, **{leaf: value})
    return params


def create_run(
    params: TrainExperimentParams, world: World, *, model: nn.Module | None = None, spoiled: Sequence[int] = ()
) -> Run:
    """Make a run of the tiny parts, at step 0."""
    hparams = params.hparams
    torch.manual_seed(hparams.seed)
    model = TinyModel() if model is None else model
    if params.model.lora is not None:
        add_adapters(model, params.model.lora)
    base = describe_base(model, params.model)
    cast_parameters(model, hparams.precision)
    forward = parallelize(
        model,
        params.distributed,
        world=world,
        grad_checkpointing=hparams.grad_checkpointing,
        compile_blocks=bool(hparams.torchcompile),
        precision=hparams.precision,
    )
    total_steps = (params.total_train_samples or 0) // hparams.global_batch_size
    state = create_train_state(model, forward, hparams=hparams, ema=params.ema, total_steps=total_steps, base=base)
    sizes = (hparams.global_batch_size, hparams.per_gpu_batch_size)
    return Run(
        params=params,
        world=world,
        folder=Path(params.save_path) / str(params.name),
        total_steps=total_steps,
        state=state,
        handler=TinyHandler([], list(spoiled)),
        loader=TinyLoader(world, *sizes),
        validation_loader=TinyLoader(world, *sizes, num_samples=params.total_val_samples),
        log=MetricLog([Recorder([])], None),
    )


def read_result(run: Run) -> dict[str, Any]:
    """Collective: everything that two runs are compared by."""
    state = run.state
    averages = state.ema.averages if state.ema is not None else {}
    return {
        "lines": run.log._sinks[0].lines,
        "weights": {name: gather(value).clone() for name, value in state.parameters.items()},
        "averages": {name: gather(shard_like(v, state.parameters[name])).clone() for name, v in averages.items()},
        "moments": {
            f"{name} {moment}": gather(tensor).clone()
            for name, value in state.parameters.items()
            for moment, tensor in state.optimizer.state[value].items()
        },
        "counters": {name: int(value) for name, value in vars(state.counters).items()},
        "held": count_held(run),
    }


def count_held(run: Run) -> dict[str, int]:
    """The bytes that this rank holds, by what they are."""
    state = run.state
    gradients = [value.grad for value in state.parameters.values() if value.grad is not None]
    moments = [tensor for entry in state.optimizer.state.values() for tensor in entry.values()]
    averages = [] if state.ema is None else [*state.ema.averages.values()]
    parts = {"weights": [*state.parameters.values()], "gradients": gradients, "moments": moments, "average": averages}
    return {
        name: sum(local_shard(tensor).numel() * tensor.element_size() for tensor in tensors)
        for name, tensors in parts.items()
    }


def start_scenario(changes: dict[str, Any], world: World) -> dict[str, Any]:
    """Create the state of a transformer as a run does; its weights, and by how much the peak of memory rose."""
    model = TransformerParams(
        hidden_dim=320, n_layers=28, n_heads=4, vocab_size=1003, resume_from_checkpoint=changes.pop("weights", None)
    )
    is_restored = changes.pop("is_restored", False)
    params = replace(create_params("", hparams__precision="fp32", **changes), model=model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = create_state(params, world, is_restored=is_restored)
    rise = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    weights = {name: gather(weight).clone() for name, weight in state.parameters.items()}
    buffers = {name: buffer.clone() for name, buffer in state.model.named_buffers()}
    return {"weights": weights, "buffers": buffers, "rise": rise, "drawn_next": torch.rand(1)}


def read_error(action: Callable[[], Any]) -> str:
    """What this rank says when an action fails, or the code that it ends with."""
    try:
        action()
    except (ValueError, SystemExit) as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ""


def run_scenario(scenario: dict[str, Any], world: World) -> dict[str, Any]:
    """Train one scenario: changes to the params, and perhaps what befalls it."""
    changes = dict(scenario)
    if changes.pop("starts", False):
        return start_scenario(changes, world)
    if changes.pop("differs", False):
        return {"error": read_error(lambda: check_same_config(create_params("", hparams__lr=1.0 + world.rank), world))}
    start = changes.pop("start", None)
    spoiled = changes.pop("spoiled", [])
    stop_at, fail_at = changes.pop("stop_at", -1), changes.pop("fail_at", -1)
    full_at = changes.pop("full_at", -1)
    run = create_run(create_params(**changes), world, spoiled=spoiled)
    run.handler.stop_at, run.handler.fail_at, run.handler.full_at = stop_at, fail_at, full_at
    if start is not None:
        load_checkpoint(find_checkpoint(start), run.state)
    if full_at >= 0:
        return {"error": read_error(lambda: train(run))}
    assert (train(run) == 0) is (stop_at < 0)
    return {**read_result(run), "positions": run.handler.seen, "step": run.state.step}


def main() -> None:
    scenarios: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    world = read_world(0)
    start_process_group(DistributedParams(timeout_s=60.0), world)
    results = {name: run_scenario(scenario, world) for name, scenario in scenarios.items()}
    torch.save(results, f"{sys.argv[2]}.{world.rank}")
    stop_process_group()
    leave_process(0)


if __name__ == "__main__":
    main()
