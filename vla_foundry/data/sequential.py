"""Read tars without a manifest in sequence, with webdataset. A run that continues does so at an approximate place."""

import errno
import itertools
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.utils.data

from vla_foundry.batch import Batch
from vla_foundry.data.loader import DataLoader, changed_order, check_divisible
from vla_foundry.data.pipelines.named import secure_webdataset
from vla_foundry.data.pipelines.stages import Pipeline, Sample, create_pipeline
from vla_foundry.data.plan import SamplePlan
from vla_foundry.data.reader import Dataset, Dropped, SampleShard, Shard, ShardReader
from vla_foundry.data.worker import Failure, Message, Schedule
from vla_foundry.params.data.base import DataParams
from vla_foundry.randomness import hash_int
from vla_foundry.shards import split_member_name
from vla_foundry.storage.local import is_pattern
from vla_foundry.storage.uri import absolute_uri, describe, list_visible, open_input
from vla_foundry.tars import DamagedTarError, read_files
from vla_foundry.world import World

_NAME = "data.sequential_shards"
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# most samples in the shuffle buffer of a process
_MAX_BUFFER = 1000
# passes without a sample after which a process gives up: its share of the tars differs from pass to pass
_MAX_EMPTY = 100
# remote tars to look for at once
_NUM_THREADS = 16
# rows of the plan, which only counts: the n-th row is the n-th sample that is read
_NUM_ROWS = 1 << 40


class _Stream(SampleShard):
    """The samples that a process reads, as one endless shard.

    Args:
        params: the data params.
        world: this rank.
        seed: seed of the order.
        samples_per_row: most samples that the stages make of one.
    """

    def __init__(self, params: DataParams, world: World, *, seed: int, samples_per_row: int) -> None:
        num_workers = max(1, params.num_workers or 0)
        self.uri = _NAME
        # passes over the tars that were read, and the part of the present one
        self.epochs = 0.0
        self._shards, self._seed = list_shards(params.sequential_shards, world), seed
        # of all ranks
        self._first_process, self._num_processes = world.rank * num_workers, world.world_size * num_workers
        # 0: keep the order of the tars
        self._buffer_size = min(params.shuffle_buffer_size, _MAX_BUFFER) if params.shuffle else 0
        self._samples_per_row = samples_per_row
        self._samples: Iterator[Sample] | None = None
        self._content: Sample = {}

    def key(self, row: int) -> str:
        """Go to the next sample, whatever the row, and return its key.

        Raises:
            OSError: a tar cannot be read, or this process has no samples.
        """
        if self._samples is None:
            self._samples = self._read()
        try:
            self._content = next(self._samples)
        except OSError as error:
            self._samples, self.uri = None, error.filename
            raise
        self.uri = self._content["__url__"]
        return self._content["__key__"]

    def read(self, row: int) -> Sample:
        """Return the content of the sample that `key` went to.

        Raises:
            Dropped: in its place the tar is damaged, or has a key again.
        """
        if "__fault__" in self._content:
            raise Dropped(*self._content["__fault__"])
        return self._content

    def _read(self) -> Iterator[Sample]:
        secure_webdataset()
        from webdataset.filters import shuffle

        worker = torch.utils.data.get_worker_info()
        process, num_empty = self._first_process + (worker.id if worker is not None else 0), 0
        for epoch in itertools.count(int(self.epochs)):
            samples, sample = self._read_epoch(epoch, process), None
            if self._buffer_size:
                seed = hash_int(self._seed, epoch, process)
                samples = shuffle(self._buffer_size, initial=self._buffer_size, seed=seed)(samples)
            for sample in samples:
                yield from ({**sample, "__part__": part} for part in range(self._samples_per_row))
            num_empty = num_empty + 1 if sample is None else 0
            if num_empty == _MAX_EMPTY:
                raise OSError(errno.ENODATA, f"loader process {process} finds no samples in any tar", _NAME)

    def _read_epoch(self, epoch: int, process: int) -> Iterator[Sample]:
        """Yield the samples of a process's share of the tars: each tar is one process's, or split between some."""
        shards, count = list(self._shards), self._num_processes
        if self._buffer_size:
            random.Random(hash_int(self._seed, epoch)).shuffle(shards)
        # processes go round, so that no one has the smallest tars, or empty ones, in every pass
        place = (process + epoch) % count
        part, first = divmod(place, len(shards))
        num_parts = len(range(first, count, len(shards)))
        share = shards[first::count]
        for number in range(round((self.epochs - epoch) * len(share)), len(share)):
            self.epochs = epoch + number / len(share)
            yield from itertools.islice(_read_tar(share[number]), part, None, num_parts)
        self.epochs = epoch + 1.0


def _read_tar(uri: str) -> Iterator[Sample]:
    """Yield a tar's samples, and a sample `__fault__` (reason, detail) where it is damaged."""
    from webdataset.tariterators import group_by_keys

    keys: set[str] = set()
    # members that the present sample has already
    repeated: list[Exception] = []
    try:
        with open_input(uri) as file:
            members = ({"fname": name, "data": content, "__url__": uri} for name, content in read_files(file))
            for sample in group_by_keys(members, _split, handler=lambda fault: not repeated.append(fault)):
                key = sample["__key__"]
                if key not in keys:
                    yield sample
                if key in keys or repeated:
                    repeated.clear()
                    yield _fault(uri, key, "repeated key", f"an earlier sample of the shard has the key '{key}' too")
                keys.add(key)
    except DamagedTarError as error:
        yield _fault(uri, "rest of the tar", "damaged shard", str(error))
    except (OSError, ValueError) as error:  # it cannot be reached, which says nothing about its samples
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).removeprefix(uri)
        raise OSError(errno.EIO, reason.strip(" :."), uri) from error


def _split(name: str) -> tuple[Any, Any]:
    return split_member_name(name) or (None, None)


def _fault(uri: str, key: str, *fault: str) -> Sample:
    return {"__key__": key, "__url__": uri, "__fault__": fault}


class _StreamReader(ShardReader):
    """Opens the stream as the only shard of a dataset."""

    # a tar may be bad as a whole; data.max_bad_fraction decides whether that ends the run
    max_replacements = 100

    def __init__(self, dataset: Dataset, stream: _Stream) -> None:
        self.datasets, self.by_ranges, self.stream = (dataset,), False, stream

    @property
    def epochs(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See ShardReader."""
        return self.stream.epochs

    def open(self, dataset: int, shard: int) -> Shard:
        """Return the stream."""
        return self.stream


class SequentialLoader(DataLoader):
    """Loads one rank's microbatches from a stream. See `create_sequential_loader`."""

    def __init__(self, params: DataParams, world: World, *, stream: _Stream, **parts: Any) -> None:
        super().__init__(params, world, split="train", **parts)
        self._stream, self._epochs = stream, 0.0

    def describe(self) -> dict[str, Any]:
        """Return where a run that continues begins: how many passes over the tars this rank has read."""
        return {"sequential": {"epochs": self._epochs}}

    def check_plan(self, saved_description: dict[str, Any]) -> list[str]:
        """Go to the approximate place of a checkpoint; return a line for the user.

        Raises:
            ValueError: its run did not read tars in sequence.
        """
        if "sequential" not in saved_description:
            raise changed_order([f"{_NAME} was not set"])
        self._epochs = self._stream.epochs = saved_description["sequential"]["epochs"]
        if (started := self._started) is not None:
            self.close()  # its processes began at the first tar
            self.start(started)
        return [
            f"{_NAME} do not resume exactly. They continue in pass {int(self._epochs) + 1} over the tars, after "
            f"{self._epochs % 1:.1%} of them. Up to a tar and a shuffle buffer of samples a process come twice, or not "
            "in this pass."
        ]

    def progress(self, global_batch: int) -> dict[str, float]:
        """Return how many passes over the tars this rank has read, to log."""
        return {"epochs": self._epochs}

    def _accept(self, message: Message | Failure) -> Batch:
        if isinstance(message, Message):
            self._epochs = message.report.epochs
        return super()._accept(message)


def list_shards(names: Sequence[str], world: World) -> list[str]:
    """Return the tars that paths, URIs, braces ({000..011}), patterns (*) and folders stand for.

    Each rank looks for its part of those that are named themselves.

    Raises:
        FileNotFoundError: there is no such tar.
        ValueError: a name is a shell command, or cannot be reached.
    """
    from webdataset.shardlists import expand_urls

    found: list[str] = []
    named: list[str] = []
    for name in (each for pattern in names for each in expand_urls(pattern)):
        if not name:
            raise ValueError(f"{_NAME} has an empty name.")
        place = absolute_uri(name)
        is_web = place.startswith(("http://", "https://"))
        path = place.partition("?")[0] if is_web else place  # a signature may follow
        if path.endswith(_SUFFIXES) and not is_pattern(path):
            named.append(place)
            found.append(place)
            continue
        try:
            listed = list_visible(place)
        except FileNotFoundError:
            listed = {}
        tars = [uri for uri in listed if uri.endswith(_SUFFIXES)]
        if not tars:
            raise FileNotFoundError(
                f"{_NAME}: there is no tar at {name}.{' Name each: a web server lists none.' * is_web}"
            )
        found += tars
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(describe, named[world.rank :: world.world_size]))
    return found


def create_sequential_loader(
    params: DataParams,
    world: World,
    *,
    global_batch_size: int | None = None,
    per_gpu_batch_size: int = 1,
    seed: int | None = None,
    pipeline: Pipeline | None = None,
) -> SequentialLoader:
    """Create a rank's loader over data.sequential_shards; it never ends. See `vla_foundry.data.loader`.

    Raises:
        FileNotFoundError: a tar is missing.
        ValueError: a tar cannot be reached, or the batch cannot be divided.
    """
    modality, batch_size = params.modalities[0], global_batch_size or world.world_size * per_gpu_batch_size
    check_divisible(batch_size, world, per_gpu_batch_size)
    seed = params.seed or 0 if seed is None else seed
    pipeline = pipeline or create_pipeline(modality, params)
    stream = _Stream(params, world, seed=seed, samples_per_row=pipeline.stages.samples_per_row)
    plan = SamplePlan([[_NUM_ROWS]], [1.0], seed=seed, global_batch_size=batch_size, block_size=1, shuffle=False)
    schedule = Schedule(
        rank=world.rank,
        world_size=world.world_size,
        microbatch_size=per_gpu_batch_size,
        global_batch_size=batch_size,
        num_positions=None,
    )
    reader = _StreamReader(Dataset(manifest=_NAME, modality=modality, entries=()), stream)
    return SequentialLoader(
        params, world, stream=stream, reader=reader, plan=plan, pipeline=pipeline, schedule=schedule
    )
