"""Start the loader's worker processes, shield them from signals, make microbatches and send them to the trainer.

Microbatch t of a rank covers positions [(t * world_size + rank) * m, ... + m), with m = per_gpu_batch_size. So a global
batch holds the same samples, divided into the same microbatches, for any number of ranks.

Small arrays travel inside the message and large ones through shared memory. A tensor in shared memory costs about half
a millisecond, whatever its size; bytes in a message cost a copy through a pipe. Tokens travel as uint16 if they fit,
masks as bits.
"""

import contextlib
import fcntl
import itertools
import math
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing import forkserver, get_all_start_methods, get_context, parent_process, resource_tracker
from typing import Any

import numpy as np
import torch
import torch.utils.data

from vla_foundry.batch import Batch
from vla_foundry.config.command_line import describe_error
from vla_foundry.data.cache import LookAhead
from vla_foundry.data.faults import Fault
from vla_foundry.data.pipelines.stages import RECORDING, Drops, Pipeline, Rows
from vla_foundry.data.plan import Location, SamplePlan
from vla_foundry.data.reader import ShardReader
from vla_foundry.params.data.base import DataParams

# larger arrays (in bytes) travel through shared memory
_MAX_INLINE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class _Bits:
    """A bool array packed into bits."""

    bits: np.ndarray
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Narrow:
    """An int32 array of values below 2**16, stored as uint16."""

    values: np.ndarray


class Message:
    """A packed microbatch; see `pack`."""

    def __init__(self, values: Batch, report: Any) -> None:
        self.values = values
        # sent unchanged
        self.report = report

    def unpack(self) -> Batch:
        """Return the batch, with each top-level array as a tensor."""
        return {key: _unpack_value(value) for key, value in self.values.items()}

    def pin_memory(self) -> "Message":
        """Unpack into page-locked memory. PyTorch's pinning thread calls this."""
        batch = self.unpack()
        pinned = {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}
        return Message(pinned, self.report)


def pack(batch: Batch, report: Any, *, for_transport: bool) -> Message:
    """Pack a batch of NumPy arrays.

    Args:
        batch: the batch.
        report: anything picklable.
        for_transport: False if the message stays in this process.
    """
    return Message({key: _pack_value(value) for key, value in batch.items()} if for_transport else batch, report)


def _pack_value(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == np.bool_:
        value = _Bits(np.packbits(value), value.shape)
        return value if value.bits.nbytes <= _MAX_INLINE_BYTES else torch.from_numpy(_unpack_bits(value))
    if value.dtype == np.int32 and value.nbytes // 2 <= _MAX_INLINE_BYTES and _fits_uint16(value):
        return _Narrow(value.astype(np.uint16))
    return value if value.nbytes <= _MAX_INLINE_BYTES else torch.from_numpy(value)


def _fits_uint16(value: np.ndarray) -> bool:
    return value.size > 0 and int(value.min()) >= 0 and int(value.max()) < 1 << 16


def _unpack_value(value: Any) -> Any:
    if isinstance(value, _Bits):
        value = _unpack_bits(value)
    elif isinstance(value, _Narrow):
        value = value.values.astype(np.int32)
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _unpack_bits(value: _Bits) -> np.ndarray:
    count = int(np.prod(value.shape))
    return np.unpackbits(value.bits, count=count).view(np.bool_).reshape(value.shape)


# smallest number of microbatches to locate at once
_MIN_LOCATED_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which positions form each microbatch of a rank."""

    rank: int
    world_size: int
    microbatch_size: int
    global_batch_size: int
    # number of positions; None: unlimited
    num_positions: int | None
    # False for validation: no random augmentation
    is_training: bool = True

    def first_microbatch(self, global_batch: int) -> int:
        """Return the number of a global batch's first microbatch."""
        return global_batch * self.global_batch_size // (self.world_size * self.microbatch_size)

    @property
    def num_microbatches(self) -> int | None:
        """Number of microbatches per rank; the last may be short or empty on some ranks. None: unlimited."""
        if self.num_positions is None:
            return None
        return math.ceil(self.num_positions / (self.world_size * self.microbatch_size))

    def positions(self, microbatch: int) -> np.ndarray:
        """Return a microbatch's positions, int64 [S]; S is 0 if other ranks hold the last samples."""
        first = (microbatch * self.world_size + self.rank) * self.microbatch_size
        end = first + self.microbatch_size
        if self.num_positions is not None:
            end = min(end, self.num_positions)
        return np.arange(first, max(first, end), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Sample counts of a microbatch, for the trainer."""

    num_samples: int
    # the samples that were replaced
    faults: tuple[Fault, ...] = ()
    # passes over the data that were read, where they cannot be computed
    epochs: float = 0.0


@dataclass(frozen=True)
class Failure:
    """The error that a worker sends instead of a microbatch."""

    text: str
    # the bad samples that led to it
    faults: tuple[Fault, ...] = ()

    def pin_memory(self) -> "Failure":
        return self


class Microbatches(torch.utils.data.Dataset):
    """Microbatches by number; lives in the worker processes.

    Args:
        plan: the sample order.
        reader: opens shards.
        pipeline: makes batches.
        schedule: this rank's share of the positions.
        group_size: microbatches per request.
    """

    def __init__(
        self, plan: SamplePlan, reader: ShardReader, pipeline: Pipeline, schedule: Schedule, group_size: int
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._pipeline = pipeline
        self._schedule = schedule
        self._group_size = group_size
        self._located: dict[int, tuple[np.ndarray, Location]] = {}
        self._look_ahead: LookAhead | None = None
        self._ahead: list[tuple[int, int]] = []
        self._is_remote = any(dataset.is_remote for dataset in reader.datasets)

    def __getitems__(self, numbers: range) -> list[Message | Failure]:
        """Return microbatches, up to the first failure."""
        messages: list[Message | Failure] = []
        for number in numbers:
            drops = Drops()
            try:
                messages.append(self._create_message(number, drops))
            except (ValueError, OSError) as error:
                messages.append(Failure(describe_error(error), tuple(drops.faults)))
                break
        return messages

    def _create_message(self, number: int, drops: Drops) -> Message:
        positions, location = self._locate(number)
        if self._is_remote and len(positions):
            self._fetch_ahead(location, int(positions[0]))
        rows = Rows(
            positions,
            location,
            self._plan,
            self._reader,
            is_training=self._schedule.is_training,
            drops=drops,
            samples_per_row=self._pipeline.stages.samples_per_row,
        )
        if len(rows):
            batch = RECORDING.time("whole", len(rows), self._pipeline.create_batch, rows)
        else:
            batch = self._pipeline.create_empty_batch()
        batch["modality"] = self._reader.datasets[0].modality
        batch["positions"] = positions
        batch["dropped"] = dict(drops.counts)
        report = Report(num_samples=len(rows), faults=tuple(drops.faults), epochs=self._reader.epochs)
        return pack(batch, report, for_transport=torch.utils.data.get_worker_info() is not None)

    def _locate(self, number: int) -> tuple[np.ndarray, Location]:
        """Locate a microbatch, together with the ones this worker will probably make next."""
        if number not in self._located:
            worker = torch.utils.data.get_worker_info()
            stride = self._group_size * (worker.num_workers if worker is not None else 1)
            num_groups = -(-_MIN_LOCATED_AT_ONCE // self._group_size)
            groups = range(number, number + stride * num_groups, stride)
            numbers = [first + place for first in groups for place in range(self._group_size)]
            positions = [self._schedule.positions(next_number) for next_number in numbers]
            ends = np.cumsum([len(part) for part in positions])
            location = self._plan.locate(np.concatenate(positions))
            parts = zip(*(np.split(array, ends[:-1]) for array in location), strict=True)
            self._located = {
                next_number: (part, Location(*arrays))
                for next_number, part, arrays in zip(numbers, positions, parts, strict=True)
            }
        return self._located.pop(number)

    def _fetch_ahead(self, location: Location, position: int) -> None:
        if self._reader.by_ranges:
            # these samples, and those that this worker makes next
            following = [location for _, location in itertools.islice(self._located.values(), 1)]
            parts = zip(*(each for each in (location, *following)), strict=True)
            whole = Location(*(np.concatenate(arrays) for arrays in parts))
            self._reader.read_ahead(whole, self._pipeline.images_of_windows)
            return
        ahead = self._plan.shards_ahead(position)
        if ahead == self._ahead:
            return
        self._ahead = ahead
        if self._look_ahead is None:
            self._look_ahead = LookAhead(self._reader.cache)
        datasets = self._reader.datasets
        self._look_ahead.want([datasets[d].remote_shard(s) for d, s in ahead if datasets[d].is_remote])


# seconds that a worker survives SIGTERM, so that the trainer can save a checkpoint
_GRACE_SECONDS = 120.0
# pipe size in bytes: a message that fits lets the worker continue without waiting for the trainer
_PIPE_SIZE = 1 << 20
# what the server imports for its workers, where this process has needed it to check the pipeline
_SHARED_MODULES = ("transformers.models.auto.tokenization_auto", "transformers.models.auto.processing_auto")
# signals that reach the trainer's whole process group
_SHIELDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start_context(pipeline: Pipeline) -> Any:
    """Return the context that forks workers from a server, which imports PyTorch once and has no threads."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    shared = [name for name in _SHARED_MODULES if name in sys.modules]
    context.set_forkserver_preload(["vla_foundry.data.loader", type(pipeline).__module__, *shared])
    # a signal to the whole process group must not end these two before the trainer has saved, nor interrupt an import
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)  # starting the tracker unblocks two of them
        forkserver.ensure_running()  # the server imports while the trainer creates the model
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def widen_pipe(iterator: Any) -> None:
    """Enlarge the pipe from the workers to the trainer, if the system supports and allows it."""
    queue = getattr(iterator, "_worker_result_queue", None)
    if queue is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(queue._reader.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


def prepare_process(environment: dict[str, str], worker: int) -> None:
    """Set up a worker process."""
    os.environ.update(environment)  # the fork server still has the environment it was started with
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer stops its workers itself
    signal.signal(signal.SIGTERM, _leave_later)
    signal.signal(signal.SIGHUP, _leave_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SHIELDED)
    threading.Thread(target=_leave_with_trainer, daemon=True, name="leave-with-trainer").start()


def _leave_with_trainer() -> None:
    """End this process when its trainer dies, however it dies. PyTorch watches the parent, which is the fork server."""
    trainer = parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def _leave_later(signal_number: int, frame: Any) -> None:
    timer = threading.Timer(_GRACE_SECONDS, os._exit, (128 + signal_number,))
    timer.daemon = True
    timer.start()


def stop_processes(iterator: Any) -> None:
    """Stop the processes of a torch loader's iterator, if it has some."""
    if not hasattr(iterator, "_shutdown_workers"):
        return
    iterator._shutdown_workers()
    # a process that exits at once would leave semaphores of queues behind whose threads have not ended
    for queue in iterator._index_queues:
        if queue._thread is not None:
            queue._thread.join(timeout=1.0)


def describe_dead_process(iterator: Any, params: DataParams) -> str:
    """Explain why workers died, in one line."""
    codes = {process.exitcode for process in iterator._workers if process.exitcode}
    killed = " (killed; most often the machine ran out of memory)" if -signal.SIGKILL in codes else ""
    if codes == {1}:  # Python ended it, as in a script that starts processes while it is imported
        return (
            "A loader process died with exit code 1; its error stands above. A script must start loaders below "
            'if __name__ == "__main__", or set data.num_workers to 0.'
        )
    return (
        f"A loader process died with exit code {', '.join(str(code) for code in sorted(codes)) or 'unknown'}{killed}. "
        f"Lower data.num_workers ({params.num_workers}) or data.prefetch_factor ({params.prefetch_factor})."
    )
