"""The loader: microbatches of a rank in the order of the plan, made by any number of processes."""

import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.utils.data

from vla_foundry.batch import Batch
from vla_foundry.data.cache import ShardCache
from vla_foundry.data.description import check_description, describe_plan, fingerprint_of
from vla_foundry.data.indexing import user_cache_folder
from vla_foundry.data.microbatches import Failure, Microbatches, Report, Schedule
from vla_foundry.data.pipelines.stages import PIPELINES, Pipeline, SavesFiles
from vla_foundry.data.plan import SamplePlan
from vla_foundry.data.processes import describe_dead_process, prepare_process, start_context, widen_pipe
from vla_foundry.data.reader import Dataset, ShardReader
from vla_foundry.data.transport import Message
from vla_foundry.params.data.base import DataParams
from vla_foundry.shards import parse_manifest
from vla_foundry.storage.uri import is_remote, read_text
from vla_foundry.world import World

Split: TypeAlias = Literal["train", "validation"]

# the share of bad samples is judged as if at least this many samples had been read
_MIN_JUDGED_SAMPLES = 1000


class _Groups:
    """Numbers of microbatches in groups, from a start that can be set anew."""

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
    """A rank's loader. See create_dataloader.

    Args:
        params: the data's params.
        world: this rank.
        datasets: what to read, all of one modality.
        plan: the order.
        pipeline: makes batches.
        schedule: this rank's share.
        split: "train" or "validation".
    """

    def __init__(
        self,
        params: DataParams,
        world: World,
        *,
        datasets: list[Dataset],
        plan: SamplePlan,
        pipeline: Pipeline,
        schedule: Schedule,
        split: Split,
    ) -> None:
        self._params = params
        self._plan = plan
        self._schedule = schedule
        self._split = split
        self._datasets = datasets
        self._num_read = 0
        self._num_dropped = 0
        self._num_tokens = 0
        self._num_padding = 0
        self._iterator: Any = None
        cache_params = params.dataset_cache
        folder = cache_params.cache_dir or os.path.join(user_cache_folder(), "shards")
        cache = ShardCache(os.path.abspath(os.path.expanduser(folder)), int(cache_params.cache_size_gb * 1e9))
        reader = ShardReader(datasets, cache)
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
            multiprocessing_context=start_context() if num_workers else None,
            prefetch_factor=max(2, -(-params.prefetch_factor // group_size)) if num_workers else None,
            persistent_workers=num_workers > 0 and split == "train",  # between validations they would only take memory
            worker_init_fn=functools.partial(prepare_process, dict(os.environ)) if num_workers else None,
            generator=torch.Generator(),  # PyTorch draws a number per iterator: not from the trainer's generator
        )

    @property
    def num_samples(self) -> int:
        """Samples in all datasets, each once."""
        return self._plan.num_samples

    @property
    def num_microbatches(self) -> int | None:
        """Microbatches that `microbatches(0)` yields, the same on every rank; None: no end."""
        return self._schedule.num_microbatches

    def describe(self) -> dict[str, Any]:
        """Return what decides the order of the samples, in plain JSON types."""
        return describe_plan(self._plan, self._datasets, seq_len=self._params.seq_len)

    @property
    def fingerprint(self) -> str:
        """A hash of `describe()`; the same hash means the same samples at every position."""
        return fingerprint_of(self.describe())

    def check_plan(self, saved_description: dict[str, Any]) -> None:
        """Compare with the `describe()` of a checkpoint.

        Raises:
            ValueError: the order is not the same; says what changed.
        """
        check_description(saved_description, self.describe())

    def metrics(self) -> dict[str, float]:
        """Return shares since the loader was made, on this rank: bad samples, and padding among all tokens."""
        return {
            "data/bad_fraction": self._num_dropped / max(self._num_read, 1),
            "data/padding_fraction": self._num_padding / max(self._num_tokens, 1),
        }

    def microbatches(self, first_global_batch: int) -> Iterator[Batch]:
        """Yield this rank's microbatches from the first one of a global batch on. One iterator at a time.

        For training it has no end. For validation it ends after `total_samples` samples: every rank yields as many
        microbatches, and where a rank has no samples left, its last one is a row of padding without a target.

        Raises:
            ValueError: training goes past one epoch without data.allow_multiple_epochs; or data can not be read.
        """
        self._groups.start = self._schedule.first_microbatch(first_global_batch)
        self._iterator = None  # ends what is left of a validation
        iterator = self._iterator = iter(self._torch_loader)
        widen_pipe(iterator)
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
        if isinstance(message, Failure):
            raise ValueError(message.text)
        report: Report = message.report
        num_dropped = sum(report.dropped.values())
        self._num_read += report.num_samples + num_dropped
        self._num_dropped += num_dropped
        limit = self._params.max_bad_fraction * max(self._num_read, _MIN_JUDGED_SAMPLES)
        if num_dropped and self._num_dropped > limit:
            raise ValueError(
                f"{self._num_dropped} of {self._num_read} samples can not be used, more than data.max_bad_fraction "
                f"({self._params.max_bad_fraction:g}) allows; the last one: {report.last_dropped}."
            )
        batch = message.unpack()
        if "documents" in batch:
            documents = batch["documents"]
            self._num_tokens += int(documents.lengths.sum())
            self._num_padding += int(documents.lengths[documents.is_padding].sum())
        return batch

    def save_files(self, folder: Path) -> None:
        """Write what a run has to keep of its data, so that its model can be used without them."""
        if isinstance(self._pipeline, SavesFiles):
            self._pipeline.save_files(folder)

    def close(self) -> None:
        """Stop the loader processes."""
        iterator, self._iterator, self._torch_loader._iterator = self._iterator, None, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def create_dataloader(
    params: DataParams,
    world: World,
    *,
    global_batch_size: int,
    per_gpu_batch_size: int,
    seed: int,
    split: Split = "train",
    total_samples: int | None = None,
    pipeline: Pipeline | None = None,
) -> DataLoader:
    """Create a rank's loader.

    Args:
        params: the data's params.
        world: this rank.
        global_batch_size: samples per step over all ranks.
        per_gpu_batch_size: samples per microbatch.
        seed: seed of the order.
        split: "train", or "validation": the val_ lists, in the order of the manifests.
        total_samples: validation reads so many; all, if not given. Not used for training.
        pipeline: makes batches, with stages of your own; the one that is registered for the modality if not given.

    Raises:
        FileNotFoundError: a manifest or a shard is missing.
        ValueError: params, manifests and shards do not fit each other.
    """
    _check_divisible(global_batch_size, world, per_gpu_batch_size)
    is_training = split == "train"
    datasets, weights = _read_datasets(params, "" if is_training else "val_")
    plan = SamplePlan(
        [[entry.num_sequences for entry in dataset.entries] for dataset in datasets],
        weights,
        seed=seed,
        global_batch_size=global_batch_size,
        block_size=params.shuffle_buffer_size,
        shuffle=params.shuffle and is_training,
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
    return DataLoader(
        params,
        world,
        datasets=datasets,
        plan=plan,
        pipeline=PIPELINES.get(datasets[0].modality)(params) if pipeline is None else pipeline,
        schedule=schedule,
        split=split,
    )


def _check_divisible(global_batch_size: int, world: World, per_gpu_batch_size: int) -> None:
    if global_batch_size % (world.world_size * per_gpu_batch_size):
        raise ValueError(
            f"hparams.global_batch_size ({global_batch_size}) must be a multiple of num_ranks ({world.world_size}) x "
            f"hparams.per_gpu_batch_size ({per_gpu_batch_size}) = {world.world_size * per_gpu_batch_size}."
        )


def _read_datasets(params: DataParams, prefix: Literal["", "val_"]) -> tuple[list[Dataset], list[float]]:
    if prefix:
        names, modalities = params.val_dataset_manifest, params.val_dataset_modality
        weights = params.val_dataset_weighting
    else:
        names, modalities, weights = params.dataset_manifest, params.dataset_modality, params.dataset_weighting
    if not names:
        raise ValueError(f"data.{prefix}dataset_manifest is empty. Name at least one manifest.jsonl.")
    weights = weights or [1.0] * len(names)
    modalities = modalities or [*params.modalities[:1], params.type][:1] * len(names)
    if len(set(modalities)) > 1:
        raise ValueError(f"data.{prefix}dataset_modality must be the same for all datasets of a run, got {modalities}.")
    datasets = []
    for name, modality in zip(names, modalities, strict=True):
        manifest = name if is_remote(name) else os.path.abspath(os.path.expanduser(name))
        entries = parse_manifest(read_text(manifest), manifest)
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
            f"total_val_samples ({total_samples}) must be at most {available}: beyond, a sample of "
            "data.val_dataset_manifest would be repeated."
        )
    return total_samples


def _return_unchanged(value: Any) -> Any:
    return value
