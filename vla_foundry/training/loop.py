"""The training loop: take data, step, log, validate, save. It depends on no modality or wrapper.

A step's loss is the mean over the valid targets of the whole global batch, over all ranks and microbatches (in
a mixture, the means of the datasets weighted by share of samples). Gradients therefore do not depend on accumulation,
the number of ranks or padding.
"""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vla_foundry.batch import Batch, LossOutput
from vla_foundry.models.registry import BatchHandler, count_flops_per_token
from vla_foundry.params.experiment import TrainExperimentParams, accumulation_steps, checkpoint_steps
from vla_foundry.params.hparams import HyperParams
from vla_foundry.training.checkpoint_writer import CheckpointWriter
from vla_foundry.training.distributed import all_reduce, gradient_sync, lower_blocks, reshard
from vla_foundry.training.meter import Meter, StepResult
from vla_foundry.training.metrics import MetricLog
from vla_foundry.training.remote_sync import RemoteSync
from vla_foundry.training.state import TrainState, update_weights
from vla_foundry.world import World

# each saves a checkpoint and ends the run with 128 + its number, as shells report it
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@runtime_checkable
class Loader(Protocol):
    """What the loop needs from a data loader; its only state is the index of the next global batch."""

    def microbatches(self, first_global_batch: int) -> Iterator[Batch]: ...
    def describe(self) -> dict[str, Any]: ...
    def progress(self, global_batch: int) -> dict[str, float]: ...


@dataclass(kw_only=True)
class Run:
    """The parts of a run; experiment.py creates them."""

    params: TrainExperimentParams
    world: World
    folder: Path
    total_steps: int
    state: TrainState
    handler: BatchHandler
    loader: Loader
    # iterates over the validation samples from the first; None: no validation
    validation_loader: Loader | None
    log: MetricLog
    # the run continues from a checkpoint that was saved on a stop signal, before its validation
    is_validation_owed: bool = False
    # copies the run folder elsewhere after each checkpoint; rank 0 only; None: no copy
    sync: RemoteSync | None = None
    # collective: writes the rest of the run folder at its first call; returns what checkpoints keep about their inputs
    prepare: Callable[[], dict[str, Any]] = dict


def train(run: Run) -> int:
    """Collective: call on every rank. Train from `run.state.step` to the end of the budget.

    Returns:
        0 at the end of the budget, else the number of the signal that stopped the run; it saves a checkpoint too.

    Raises:
        ValueError: the data ends early or is broken, or too many updates in a row were skipped.
    """
    params, state, world = run.params, run.state, run.world
    accumulation = accumulation_steps(params, world.world_size)
    # the end of the run is always saved
    saves = checkpoint_steps(params) or (run.total_steps,)
    meter = create_meter(run)
    microbatches = run.loader.microbatches(state.step)
    if run.is_validation_owed and is_validation_due(run, saves):
        run.prepare()
        validate(run)
    clock = SaveClock(params.checkpoint_every_minutes if world.is_main else None)
    with create_writer(run) as writer, StopSignal(world) as stop:
        while state.step < run.total_steps:
            batches, waited = take_microbatches(microbatches, accumulation)
            meter.add_data(batches, waited)
            meter.add_step(train_step(state, batches, handler=run.handler, hparams=params.hparams, world=world))
            run.prepare()
            run.log.advance(state.step)

            stopping, is_late, has_failed = stop.poll(clock.rings(), writer.has_failed)
            if has_failed:
                writer.wait()
            saving = stopping or is_late or state.step in saves
            if saving or state.step == 1 or state.step % params.log_every_n_steps == 0:
                log_metrics(run, meter)
            if saving or state.step == 1:
                run.log.show(state.step, batches[0])
            if saving:
                is_due = is_validation_due(run, saves)
                if is_due and not stopping:
                    validate(run)
                save(run, writer, is_validation_owed=is_due and bool(stopping))
                clock.reset()
                meter.restart()
            if stopping:
                writer.wait()
                run.log.say(
                    f"Stopped by {signal.Signals(stopping).name} after step {state.step} of {run.total_steps}. "
                    "Continue with --resume auto."
                )
                return stopping
    return 0


class SaveClock:
    """Says once that it is time to save; it is set again by a save. Only rank 0's runs."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self.reset()

    def reset(self) -> None:
        """Start again."""
        self._started: float | None = time.monotonic()

    def rings(self) -> bool:
        """Return True in the first call after the time is over."""
        if self._seconds is None or self._started is None or time.monotonic() - self._started < self._seconds:
            return False
        self._started = None
        return True


class StopSignal:
    """Listen for SIGTERM, SIGINT and SIGHUP inside a `with` block, and stop all ranks after the same step.

    A signal that was ignored when the run started stays ignored (nohup, jobs in the background). In a run of one
    process, a second Ctrl-C interrupts at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._received = 0
        self._flags = torch.zeros(0)
        self._pending: dist.Work | None = None

    def __enter__(self) -> "StopSignal":
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None and self._pending is not None:
            self._pending.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_alone = self._world.world_size == 1
        if number == signal.SIGINT and self._received and is_alone:
            raise KeyboardInterrupt
        self._received = self._received or number
        if number == signal.SIGINT and self._world.is_main:
            again = " Ctrl-C again stops at once, without it." if is_alone else ""
            # a handler may interrupt a print, which could not print a second time
            with suppress(OSError):
                os.write(2, f"\nSaving a checkpoint after this step.{again}\n".encode())

    def poll(self, *notes: bool) -> tuple[int, ...]:
        """Collective: call on every rank, once a step. Return the number of the signal to stop for now, or 0.

        The signal reaches ranks at different moments. Each rank sends its own and reads the largest from one step
        earlier: hosts agree without waiting for each other, and the accelerator is not touched.

        Args:
            notes: what else all ranks must act on in the same step.

        Returns:
            The number, and for each note whether some rank gave it.
        """
        if self._world.world_size == 1:
            return (self._received, *notes)
        numbers = [0] * (1 + len(notes))
        if self._pending is not None:
            self._pending.wait()
            numbers = [int(flag) for flag in self._flags]
        self._flags = torch.tensor([float(self._received), *map(float, notes)])
        self._pending = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, async_op=True)
        return tuple(numbers)


def take_microbatches(source: Iterator[Batch], count: int) -> tuple[list[Batch], float]:
    """Return one step's microbatches and the seconds spent waiting for them."""
    started = time.perf_counter()
    return [next(source) for _ in range(count)], time.perf_counter() - started


def train_step(
    state: TrainState, microbatches: Sequence[Batch], *, handler: BatchHandler, hparams: HyperParams, world: World
) -> StepResult:
    """Collective: call on every rank. Run one optimizer step on one global batch, without a host sync."""
    inputs = prepare_inputs(handler, microbatches, world.device)
    datasets = [name_of(batch) for batch in microbatches]

    # the valid targets of the whole global batch, before the first backward
    counts = count_targets(handler, datasets, inputs)
    weights = {name: datasets.count(name) / len(datasets) / counts[name].clamp(min=1) for name in counts}

    # forward and backward; gradients are exchanged in the last backward only, and averaged over ranks there
    seed_dropout(hparams.seed, state.step, world.rank)
    state.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    log_sums: dict[str, Tensor] = {}
    is_joint = len(counts) == 1
    with lower_blocks(state.model, hparams.precision):
        for index, (dataset, kwargs) in enumerate(zip(datasets, inputs, strict=True)):
            # a part that the last microbatch does not use has gradients of earlier ones
            with gradient_sync(state.forward, enabled=not is_joint or index == len(inputs) - 1):
                with autocast(hparams.precision, world.device):
                    output = state.forward(**kwargs)
                if not isinstance(output, LossOutput):
                    kind = type(output).__name__
                    raise ValueError(f"The model's forward returned {kind}, not a LossOutput (batch.py).")
                share = output.sum * weights[dataset]
                (share * world.world_size).backward()
            loss += share.detach()
            for name, value in name_logs(output, microbatches[index]).items():
                log_sums[name] = log_sums.get(name, 0.0) + value.detach().double()
    all_reduce(loss)

    # clip and update, unless loss or gradient is not finite
    norm, skip = update_weights(state, loss, max_norm=hparams.grad_clip_norm)
    state.step += 1
    num_targets = torch.stack(list(counts.values())).sum().to(norm.device)
    state.counters.targets += num_targets.long() * (1 - skip.long())
    updated = 1.0 - skip.to(world.device)
    return StepResult(
        loss=torch.where(updated > 0, loss, 0.0),
        grad_norm=torch.where(skip > 0, 0.0, norm),
        updated=updated,
        log_sums={name: torch.where(updated > 0, value, 0.0) for name, value in log_sums.items()},
    )


def prepare_inputs(handler: BatchHandler, microbatches: Sequence[Batch], device: str) -> list[dict[str, Any]]:
    """Prepare microbatches; on a GPU in a stream of its own, so that copies do not wait for the step before."""
    if not device.startswith("cuda"):
        return [handler.prepare(batch, device) for batch in microbatches]
    stream, current = _create_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        inputs = [handler.prepare(batch, device) for batch in microbatches]
    current.wait_stream(stream)
    for value in tree_leaves(inputs):
        if isinstance(value, Tensor) and value.is_cuda:
            value.record_stream(current)
    return inputs


@cache
def _create_stream(device: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def name_of(batch: Batch) -> str:
    """Return what a microbatch's loss is averaged with: its dataset in a mixture, else its modality."""
    return str(batch.get("dataset") or batch["modality"])


def name_logs(output: LossOutput, batch: Batch) -> dict[str, Tensor]:
    """Return a microbatch's sums to log, and their divisor as "count"; in a mixture with "/" and the dataset."""
    if "dataset" not in batch:
        return {**output.logs, "count": output.count}
    sums = {**output.logs, "loss": output.sum, "count": output.count}
    return {f"{name}/{batch['dataset']}": value for name, value in sums.items()}


def autocast(precision: str, device: str) -> AbstractContextManager[object]:
    """Return a context that computes in bf16 if the precision asks for it."""
    if precision in ("amp_bfloat16", "pure_bf16"):
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


def count_targets(
    handler: BatchHandler, datasets: Sequence[str], inputs: Sequence[dict[str, Any]]
) -> dict[str, Tensor]:
    """Collective: call on every rank. Count the valid targets of each dataset over all ranks, as float64 scalars.

    All ranks have the same dataset at the same index.
    """
    counts: dict[str, Tensor] = {}
    for dataset, kwargs in zip(datasets, inputs, strict=True):
        counts[dataset] = counts.get(dataset, 0.0) + handler.count_targets(kwargs).double()
    return dict(zip(counts, all_reduce(torch.stack(list(counts.values()))).unbind(), strict=True))


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators from (seed, step, rank), so that a resumed run draws the same numbers."""
    digest = hashlib.blake2b(f"dropout {seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def create_meter(run: Run) -> Meter:
    """Create the meter of a run."""
    return Meter(
        world=run.world,
        flops_per_token=partial(count_flops_per_token, run.state.model),
        uses_bf16=run.params.hparams.precision in ("amp_bfloat16", "pure_bf16"),
    )


def log_metrics(run: Run, meter: Meter) -> None:
    """Collective: call on every rank. Read the meter and log it.

    Raises:
        ValueError: too many updates in a row were skipped.
    """
    run.log.write("train", run.state.step, {**meter.read(run.state), **run.loader.progress(run.state.step)})
    limit = run.params.hparams.max_skipped_steps
    longest = meter.longest_skipped_row
    if longest >= limit:
        raise ValueError(
            f"{longest} steps in a row until about step {run.state.step} had a loss or gradient that is not finite "
            f"(hparams.max_skipped_steps is {limit}). Lower hparams.lr, or clip with hparams.grad_clip_norm."
        )


def is_validation_due(run: Run, saves: Sequence[int]) -> bool:
    """Return True at every val_every_n_checkpoints-th checkpoint and at the last one."""
    if run.validation_loader is None or run.state.step not in saves:
        return False
    number = saves.index(run.state.step) + 1
    return number % run.params.val_every_n_checkpoints == 0 or number == len(saves)


@torch.no_grad()
def validate(run: Run) -> None:
    """Collective: call on every rank. Log the validation loss, using the averaged weights if there are any.

    The loader gives all ranks the same number of microbatches of the same datasets, so all run the same passes.
    """
    assert run.validation_loader is not None
    state, world = run.state, run.world
    totals: dict[str, Tensor] = {}
    state.model.eval()
    reshard(state.model)
    precision, swapped_in = run.params.hparams.precision, nullcontext() if state.ema is None else state.ema.swapped_in()
    with swapped_in, lower_blocks(state.model, precision):
        for batch in run.validation_loader.microbatches(0):
            with autocast(precision, world.device):
                output = state.model(**run.handler.prepare(batch, world.device))
            num_samples = torch.full_like(output.sum, len(batch["positions"]), dtype=torch.float64)
            sums = torch.stack([output.sum.double(), output.count.double(), num_samples])
            totals[name_of(batch)] = totals.get(name_of(batch), 0.0) + sums
        # weights gathered from the average must not be used for training
        reshard(state.model)
    state.model.train()
    names = sorted(totals)
    loss_sums, counts, samples = all_reduce(torch.stack([totals[name] for name in names])).cpu().unbind(dim=1)
    losses = loss_sums / counts.clamp(min=1)
    metrics: dict[str, Any] = {
        "loss": float((losses * samples).sum() / samples.sum()),
        "targets": int(counts.sum()),
        "samples": int(samples.sum()),
        "weights": "ema" if state.ema is not None else "model",
    }
    if len(names) > 1:
        metrics.update({f"loss_{name}": float(loss) for name, loss in zip(names, losses, strict=True)})
    run.log.write("validation", state.step, metrics)


def create_writer(run: Run) -> CheckpointWriter:
    """Collective: call on every rank. Create the writer of a run's checkpoints."""

    def report(line: str, folder: Path | None) -> None:
        run.log.say(line)
        if folder is not None and run.sync is not None:
            run.sync.request()

    in_background = run.params.checkpoint_async
    if in_background is None:
        in_background = run.world.device.startswith("cuda")
    return CheckpointWriter(
        run.folder,
        run.world,
        max_checkpoints=run.params.max_checkpoint_limit,
        background=run.params.distributed if in_background else None,
        report=report,
    )


def save(run: Run, writer: CheckpointWriter, *, is_validation_owed: bool) -> None:
    """Collective: call on every rank. Save a checkpoint; once it is complete, log it and request a remote copy."""
    facts = {
        "data": run.loader.describe(),
        "samples": run.state.step * run.params.hparams.global_batch_size,
        "is_validation_owed": is_validation_owed,
        "inputs": run.prepare(),
    }
    writer.save(run.state, facts)
