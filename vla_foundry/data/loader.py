"""Load a rank's microbatches in plan order, with any number of worker processes.

The loader's only state is the number of the next global batch. A checkpoint also holds `describe()`, everything that
determines the sample order, and a resumed run compares it with its own.
"""

import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.utils.data

from vla_foundry.batch import Batch
from vla_foundry.data.cache import ShardCache
from vla_foundry.data.faults import Fault, FaultLog
from vla_foundry.data.indexing import user_cache_folder
from vla_foundry.data.pipelines.stages import Pipeline, create_pipeline
from vla_foundry.data.plan import PLAN_VERSION, SamplePlan
from vla_foundry.data.reader import Dataset, ShardReader
from vla_foundry.data.worker import (
    Failure,
    Message,
    Microbatches,
    Schedule,
    describe_dead_process,
    prepare_process,
    start_context,
    stop_processes,
    widen_pipe,
)
from vla_foundry.params.data.base import DataParams
from vla_foundry.provenance import hide_folder
from vla_foundry.shards import parse_manifest
from vla_foundry.storage.uri import absolute_uri, file_test, parent_uri, read_text
from vla_foundry.world import World

Split: TypeAlias = Literal["train", "validation"]

# data.max_bad_fraction is checked against at least this many samples
_MIN_JUDGED_SAMPLES = 1000


class _Groups:
    """Groups of microbatch numbers; each iteration may begin at a different number."""

    def __init__(self, group_size: int, end: int | None) -> None:
        self.start = 0
        self.group_size = group_size
        self.end = end

    def __iter__(self) -> Iterator[range]:
        for first in itertools.count(self.start, self.group_size):
            end = first + self.group_size if self.end is None else min(first + self.group_size, self.end)
            if end <= first:
                return
            yield range(first, end)


class DataLoader:
    """Loads one rank's microbatches. See `create_dataloader`.

    Args:
        params: the data params.
        world: this rank.
        reader: opens the shards of the datasets, all of one modality.
        plan: the sample order.
        pipeline: makes batches.
        schedule: this rank's share of the positions.
        split: "train" or "validation".
    """

    def __init__(
        self,
        params: DataParams,
        world: World,
        *,
        reader: ShardReader,
        plan: SamplePlan,
        pipeline: Pipeline,
        schedule: Schedule,
        split: Split,
    ) -> None:
        self._params = params
        self.plan = plan
        self._schedule = schedule
        self._split = split
        self._datasets = reader.datasets
        self._num_read = 0
        self._num_dropped = 0
        # faulty samples that no log has yet
        self._faults: list[Fault] = []
        self._fault_log: FaultLog | None = None
        self._name: str | None = None
        self._iterator: Any = None
        # the global batch that `_iterator` begins at, until `microbatches` takes it over
        self._started: int | None = None
        pipeline.check(reader)
        self._pipeline = pipeline
        num_workers = params.num_workers or 0
        group_size = max(1, pipeline.rows_per_message // schedule.microbatch_size) if num_workers else 1
        self._groups = _Groups(group_size, schedule.num_microbatches)
        self._torch_loader = torch.utils.data.DataLoader(
            Microbatches(plan, reader, pipeline, schedule, group_size),
            batch_sampler=self._groups,  # pyright: ignore[reportArgumentType]
            collate_fn=_return_unchanged,
            num_workers=num_workers,
            pin_memory=world.device.startswith("cuda"),
            multiprocessing_context=start_context(pipeline) if num_workers else None,
            prefetch_factor=max(2, -(-params.prefetch_factor // group_size)) if num_workers else None,
            persistent_workers=num_workers > 0 and split == "train",  # idle validation workers would waste memory
            worker_init_fn=functools.partial(prepare_process, dict(os.environ)) if num_workers else None,
            generator=torch.Generator(),  # PyTorch draws a number per iterator: do not use the trainer's generator
        )

    @property
    def num_samples(self) -> int:
        """Number of samples in all datasets, each counted once."""
        return self.plan.num_samples

    @property
    def num_microbatches(self) -> int | None:
        """Number of microbatches that `microbatches(0)` yields, the same on every rank; None: unlimited."""
        return self._schedule.num_microbatches

    def describe(self) -> dict[str, Any]:
        """Return everything that determines the sample order, in plain JSON types."""
        description = describe_plan(self.plan, self._datasets, seq_len=self._params.seq_len)
        stages = self._pipeline.stages.describe()
        return {**description, "stages": None if stages == self._params.default_stages() else stages}

    def mix(self, num_samples: int) -> dict[str, tuple[float, int]]:
        """Return of each manifest its share of the samples, and how many of the first `num_samples` it really has."""
        numbers = self.plan.locate(np.arange(num_samples)).dataset
        counts = np.bincount(numbers, minlength=len(self._datasets)).tolist()
        shares = [share / sum(self.plan.shares) for share in self.plan.shares]
        names = [dataset.manifest for dataset in self._datasets]
        return dict(zip(names, zip(shares, counts, strict=True), strict=True))

    def progress(self, global_batch: int) -> dict[str, float]:
        """Return what to log about the data before a global batch: nothing, for the step says it."""
        return {}

    def check_plan(self, saved_description: dict[str, Any]) -> list[str]:
        """Check that a checkpoint's `describe()` matches this loader; return lines for the user.

        Raises:
            ValueError: the sample order changed; the message says why.
        """
        check_description(saved_description, self.describe())
        return []

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's microbatches from the beginning; see `microbatches`."""
        return self.microbatches(0)

    def start(self, first_global_batch: int) -> None:
        """Start the worker processes, so that they load while the caller prepares what will take the microbatches."""
        self._groups.start = self._schedule.first_microbatch(first_global_batch)
        self._iterator = None  # ends an unfinished validation
        self._iterator = iter(self._torch_loader)
        widen_pipe(self._iterator)
        self._started = first_global_batch

    def microbatches(self, first_global_batch: int) -> Iterator[Batch]:
        """Yield this rank's microbatches, starting at the first one of a global batch. One iterator at a time.

        Training never ends. Validation ends after `total_samples` samples. Every rank yields the same number of
        microbatches: a rank that has run out of samples yields a row of padding without targets.

        Raises:
            ValueError: training needs a second epoch without data.allow_multiple_epochs, or data cannot be read.
        """
        if self._started != first_global_batch:
            self.start(first_global_batch)
        iterator, self._started = self._iterator, None
        while True:
            try:
                messages = next(iterator)
            except StopIteration:
                break
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise ValueError(describe_dead_process(iterator, self._params)) from None
            for message in messages:
                yield self._accept(message)
        if self._split == "train":
            raise ValueError(
                f"The data ends after {self._schedule.num_positions} samples, as no dataset is repeated. "
                "Lower the budget, or set --data.allow_multiple_epochs true."
            )

    def _accept(self, message: Message | Failure) -> Batch:
        if faults := message.faults if isinstance(message, Failure) else message.report.faults:
            self._faults += faults
            self._write_faults()
        if isinstance(message, Failure):
            raise ValueError(message.text)
        report = message.report
        num_dropped = len(report.faults)
        self._num_read += report.num_samples + num_dropped
        self._num_dropped += num_dropped
        limit = self._params.max_bad_fraction * max(self._num_read, _MIN_JUDGED_SAMPLES)
        if num_dropped and self._num_dropped > limit:
            raise ValueError(
                f"{self._num_dropped} of {self._num_read} samples cannot be used, more than data.max_bad_fraction "
                f"({self._params.max_bad_fraction:g}) allows; the last one: {report.faults[-1]}."
            )
        return message.unpack()

    def keep_faults(self, log: FaultLog, dataset: str | None = None) -> None:
        """Write all faulty samples to a log, those that were met before included.

        Args:
            log: the log.
            dataset: the dataset's name in a mixture.
        """
        self._fault_log, self._name = log, dataset
        self._write_faults()

    def _write_faults(self) -> None:
        if self._fault_log is not None:
            named = [fault if self._name is None else replace(fault, dataset=self._name) for fault in self._faults]
            self._fault_log.add(named)
            self._faults.clear()

    def save_files(self, folder: Path) -> None:
        """Write the files that inference needs when the datasets are not available."""
        self._pipeline.save_files(folder)

    def close(self) -> None:
        """Stop the worker processes."""
        iterator, self._iterator, self._torch_loader._iterator = self._iterator, None, None
        self._started = None
        stop_processes(iterator)


def create_dataloader(
    params: DataParams,
    world: World | None = None,
    *,
    global_batch_size: int | None = None,
    per_gpu_batch_size: int = 1,
    seed: int | None = None,
    split: Split = "train",
    total_samples: int | None = None,
    pipeline: Pipeline | None = None,
) -> DataLoader:
    """Create a rank's loader.

    Args:
        params: the data params.
        world: this rank; None: one process.
        global_batch_size: samples per step over all ranks; None: one microbatch per rank.
        per_gpu_batch_size: samples per microbatch.
        seed: seed of the sample order; None: data.seed, or else 0.
        split: "train", or "validation" for the val_ lists, read in manifest order.
        total_samples: number of validation samples; None: all. Training ignores it.
        pipeline: makes batches, for example with your own stages; None: the pipeline registered for the modality.

    Raises:
        FileNotFoundError: a manifest or a shard is missing.
        ValueError: params, manifests and shards contradict each other.
    """
    world = world or World()
    global_batch_size = global_batch_size or world.world_size * per_gpu_batch_size
    seed = params.seed or 0 if seed is None else seed
    check_divisible(global_batch_size, world, per_gpu_batch_size)
    is_training = split == "train"
    datasets, weights = _read_datasets(params, "" if is_training else "val_")
    pipeline = create_pipeline(datasets[0].modality, params) if pipeline is None else pipeline
    reader = _create_reader(params, datasets)
    plan = SamplePlan(
        [[entry.num_sequences for entry in dataset.entries] for dataset in datasets],
        weights,
        seed=seed,
        global_batch_size=global_batch_size,
        block_size=params.shuffle_buffer_size,
        shuffle=params.shuffle and is_training,
        pieces=[count * pipeline.stages.samples_per_row for count in pipeline.pieces_per_row(reader)],
    )
    schedule = Schedule(
        rank=world.rank,
        world_size=world.world_size,
        microbatch_size=per_gpu_batch_size,
        global_batch_size=global_batch_size,
        num_positions=(
            _num_training_samples(plan, params) if is_training else _num_validation_samples(plan, total_samples)
        ),
        is_training=is_training,
    )
    return DataLoader(params, world, reader=reader, plan=plan, pipeline=pipeline, schedule=schedule, split=split)


def _create_reader(params: DataParams, datasets: list[Dataset]) -> ShardReader:
    cache_params = params.dataset_cache
    folder = cache_params.cache_dir or os.path.join(user_cache_folder(), "shards")
    cache = ShardCache(os.path.abspath(folder), int(cache_params.cache_size_gb * 1e9))
    return ShardReader(datasets, cache, by_ranges=cache_params.mode == "ranges")


def check_divisible(global_batch_size: int, world: World, per_gpu_batch_size: int) -> None:
    """Check that a global batch is whole microbatches on each rank."""
    if global_batch_size % (world.world_size * per_gpu_batch_size):
        raise ValueError(
            f"hparams.global_batch_size ({global_batch_size}) must be a multiple of num_ranks ({world.world_size}) x "
            f"hparams.per_gpu_batch_size ({per_gpu_batch_size}) = {world.world_size * per_gpu_batch_size}."
        )


def _read_datasets(params: DataParams, prefix: Literal["", "val_"]) -> tuple[list[Dataset], list[float]]:
    kinds = ("manifest", "modality", "weighting")
    names, modalities, weights = (getattr(params, f"{prefix}dataset_{kind}") for kind in kinds)
    if not names:
        raise ValueError(f"data.{prefix}dataset_manifest is empty. Name at least one manifest.jsonl.")
    weights = weights or [1.0] * len(names)
    modalities = modalities or [*params.modalities[:1], params.type][:1] * len(names)
    if len(set(modalities)) > 1:
        raise ValueError(f"data.{prefix}dataset_modality must be the same for all datasets of a run, got {modalities}.")
    datasets = []
    for name, modality in zip(names, modalities, strict=True):
        manifest = absolute_uri(name)
        entries = parse_manifest(read_text(manifest), manifest, file_test(parent_uri(manifest)))
        datasets.append(Dataset(manifest=manifest, modality=modality, entries=tuple(entries)))
    return datasets, weights


def _num_training_samples(plan: SamplePlan, params: DataParams) -> int | None:
    if params.allow_multiple_epochs:
        return None
    return plan.num_positions_in_one_epoch() // plan.global_batch_size * plan.global_batch_size


def _num_validation_samples(plan: SamplePlan, total_samples: int | None) -> int:
    available = plan.num_positions_in_one_epoch()
    if total_samples is None:
        return available
    if total_samples > available:
        raise ValueError(
            f"total_val_samples ({total_samples}) must be at most {available}: more would repeat a sample of "
            "data.val_dataset_manifest."
        )
    return total_samples


def _return_unchanged(value: Any) -> Any:
    return value


# key of `describe_plan` -> its name in messages
_NAMES = {
    "plan_version": "the version of the plan",
    "seed": "data.seed",
    "shuffle": "data.shuffle",
    "shuffle_buffer_size": "data.shuffle_buffer_size",
    "global_batch_size": "hparams.global_batch_size",
    "seq_len": "data.seq_len",
    "stages": "the list of stages",
}
_DATASET_NAMES = {
    "modality": "modality",
    "share": "share of a batch",
    "num_shards": "number of shards",
    "num_samples": "number of samples",
    "digest": "list of shards (names, counts or checksums)",
}


def describe_plan(plan: SamplePlan, datasets: Sequence[Dataset], *, seq_len: int) -> dict[str, Any]:
    """Describe everything that determines the sample order, in plain JSON types."""
    total = sum(plan.shares)
    return {
        "plan_version": PLAN_VERSION,
        "seed": plan.seed,
        "shuffle": plan.shuffle,
        "shuffle_buffer_size": plan.block_size,
        "global_batch_size": plan.global_batch_size,
        "seq_len": seq_len,
        "datasets": [
            {
                "manifest": hide_folder(dataset.manifest),
                "modality": dataset.modality,
                "share": round(share / total, 9),
                "num_shards": len(dataset.entries),
                "num_samples": num_samples,
                "digest": _digest(dataset),
            }
            for dataset, share, num_samples in zip(datasets, plan.shares, plan.num_samples_of, strict=True)
        ],
    }


def _digest(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for entry in dataset.entries:
        digest.update(f"{entry.shard}\t{entry.num_sequences}\t{entry.sha256 or entry.num_bytes}\n".encode())
    return digest.hexdigest()


def check_description(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Check that two descriptions give the same sample order.

    Raises:
        ValueError: they do not; the message says what changed.
    """
    changes = [] if "sequential" in saved else list_changes(saved, current, _NAMES)
    rows, saved_rows = current["datasets"], saved.get("datasets", [])
    if len(rows) != len(saved_rows):
        changes.append(f"data.dataset_manifest had {len(saved_rows)} datasets, has {len(rows)}")
    else:
        for number, (row, saved_row) in enumerate(zip(rows, saved_rows, strict=True)):
            changes += _dataset_changes(f"dataset {number} ({row['manifest']})", saved_row, row)
    if changes:
        raise changed_order(changes)


def list_changes(saved: dict[str, Any], current: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Return a line for each key of a description that changed.

    Args:
        names: {key: its name in messages}.
    """
    return [
        f"{name} was {saved.get(key)}, is {current[key]}"
        for key, name in names.items()
        if saved.get(key) != current[key]
    ]


def changed_order(changes: Sequence[str]) -> ValueError:
    """Return the error of a run that continues on data in another order."""
    return ValueError(
        f"The order of the data differs from the checkpoint's: {'; '.join(changes)}. Restore it, or continue with "
        "--data.accept_changed_data true (samples may be repeated or skipped)."
    )


def _dataset_changes(where: str, saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    names = {key: f"{where}: {name}" for key, name in _DATASET_NAMES.items() if key != "digest"}
    changes = list_changes(saved, current, names)
    if not changes and saved.get("digest") != current["digest"]:
        changes.append(f"{where}: {_DATASET_NAMES['digest']} changed")
    return changes
