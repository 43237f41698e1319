"""What a pipeline is: an ordered list of small stages that make samples of what a shard holds, and a batch of samples.

A stage is a callable `sample -> sample | None`. A sample is a dictionary: `__key__` and `__url__` as in WebDataset,
each member's bytes by its suffix ("json.gz"), and what stages add. `__seed__` and `__position__` are what random draws
are keyed by, and where `__is_training__` is False nothing is to be changed at random. Returning None drops the sample,
and so does raising `Dropped`, which says why; any other error breaks it. Either way it is replaced by another of the
same dataset, chosen by a hash of its position, and counted by reason.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from vla_foundry.batch import Batch
from vla_foundry.data.plan import Location, SamplePlan
from vla_foundry.data.reader import SampleShard, Shard, ShardReader, TokenShard
from vla_foundry.params.data.base import DataParams
from vla_foundry.registry import Registry

Sample: TypeAlias = dict[str, Any]
Stage: TypeAlias = Callable[[Sample], Sample | None]
# (number of the dataset, open shard, row) -> what the stages of a sample begin with
ReadContent: TypeAlias = Callable[[int, Shard, int], Sample]

# bad samples in a row in place of one sample, after which the dataset counts as unreadable
MAX_REPLACEMENTS = 8


class Dropped(ValueError):
    """Raised by a stage that drops a sample.

    Args:
        reason: a few words that samples are counted by.
        detail: what is particular about this one.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass
class Drops:
    """Bad samples that were replaced."""

    # how many, by reason
    counts: Counter[str] = field(default_factory=Counter)
    # the last one: shard, key and reason
    last: str = ""

    def add(self, reason: str, description: str) -> None:
        """Count one."""
        self.counts[reason] += 1
        self.last = description

    def forget(self) -> None:
        """Count from the beginning, where the same samples are read again."""
        self.counts.clear()


@dataclass(frozen=True, eq=False)
class Rows:
    """What a microbatch is made of, before it is read."""

    # int64 [S]
    positions: np.ndarray
    # where the samples at these positions lie
    location: Location
    plan: SamplePlan
    reader: ShardReader
    # False: for validation
    is_training: bool = True
    drops: Drops = field(default_factory=Drops)

    def __len__(self) -> int:
        return len(self.positions)

    def open_shards(self) -> list[Shard]:
        """Return the open shard of each row."""
        datasets, shards = self.location.dataset.tolist(), self.location.shard.tolist()
        return [self.reader.open(dataset, shard) for dataset, shard in zip(datasets, shards, strict=True)]

    def read_samples(
        self, stages: Sequence[Stage], numbers: Iterable[int] | None = None, *, read: ReadContent | None = None
    ) -> list[Sample]:
        """Read rows and put them through the stages; bad ones are replaced and counted.

        Args:
            stages: applied in order.
            numbers: which rows; all if not given.
            read: reads what the stages begin with; all members (`read_content`) if not given.

        Raises:
            ValueError: too many samples in a row were bad, or a shard is not what its manifest says.
        """
        numbers = range(len(self)) if numbers is None else numbers
        return [self._read_sample(stages, number, read or read_content) for number in numbers]

    def _read_sample(self, stages: Sequence[Stage], number: int, read: ReadContent) -> Sample:
        location = self.location
        for attempt in range(MAX_REPLACEMENTS + 1):
            place = number if attempt == 0 else 0
            dataset, shard, row = (int(array[place]) for array in location[:3])
            opened = self.reader.open(dataset, shard)
            content = partial(read, dataset, opened, row)
            sample = self._try_sample(stages, opened, row, int(self.positions[number]), content)
            if sample is not None:
                return sample
            location = self.plan.replacements(self.positions[number : number + 1], attempt)
        manifest = self.reader.datasets[int(location.dataset[0])].manifest
        raise ValueError(
            f"{MAX_REPLACEMENTS + 1} samples in a row of {manifest} can not be used; the last one: {self.drops.last}."
        )

    def _try_sample(
        self, stages: Sequence[Stage], shard: Shard, row: int, position: int, read: Callable[[], Sample]
    ) -> Sample | None:
        step, key = "read", f"record {row}"
        draws = {"__seed__": self.plan.seed, "__position__": position, "__is_training__": self.is_training}
        try:
            key = key if isinstance(shard, TokenShard) else shard.key(row)
            sample: Sample | None = {"__key__": key, "__url__": shard.uri, **draws, **read()}
            for stage in stages:
                step = name_of_stage(stage)
                sample = stage(sample)
                if sample is None:
                    self.drops.add(f"{step}: dropped", f"{shard.uri} {key} ({step} dropped it)")
                    return None
            return sample
        except Dropped as drop:
            self.drops.add(drop.reason, f"{shard.uri} {key} ({drop.reason}: {drop})")
            return None
        except Exception as error:  # a broken sample or a user's stage must not end the run: it is counted
            fault = type(error).__name__
            text = " ".join(str(error).split()) or fault
            self.drops.add(f"{step}: {fault}", f"{shard.uri} {key} ({step}: {text})")
            return None


def read_content(dataset: int, shard: Shard, row: int) -> Sample:
    """Read all members of a sample by their suffixes, or a tokenized record.

    Raises:
        ValueError: the shard holds whole episodes, or is cut off.
    """
    if isinstance(shard, TokenShard):
        return read_record(shard, row)
    if isinstance(shard, SampleShard):
        return dict(shard.read(row))
    raise ValueError("it holds whole episodes, which data.type robotics reads")


def read_record(shard: TokenShard, row: int) -> Sample:
    """Return a tokenized record as a sample: `input_ids` int32 [T] and `document_ends` int64."""
    first, end = shard.document_offsets[row : row + 2].tolist()
    return {
        "input_ids": shard.tokens[row].astype(np.int32),
        "document_ends": shard.document_ends[first:end].astype(np.int64),
    }


def name_of_stage(stage: Stage) -> str:
    """Return the name of a stage for messages and counts."""
    return getattr(stage, "__name__", None) or type(stage).__name__


class WebDatasetStage:
    """Make a stage of a WebDataset one, which maps an iterable of samples to another: `WebDatasetStage(wds.decode())`.

    The stage must make at most one sample of one sample.
    """

    def __init__(self, stage: Callable[[Iterable[Sample]], Iterable[Sample]]) -> None:
        self.stage = stage

    def __call__(self, sample: Sample) -> Sample | None:
        """Apply the stage."""
        return next(iter(self.stage([sample])), None)


@runtime_checkable
class Pipeline(Protocol):
    """Turns rows into the batch of one modality. It is sent to loader processes, so it must be picklable.

    Arrays in a batch are NumPy's here; the loader makes tensors of them.
    """

    # small microbatches travel together, up to so many rows, where a message costs more than making its rows; else 1
    rows_per_message: int

    def check(self, reader: ShardReader) -> None:
        """Look at the datasets before training.

        Raises:
            ValueError: they can not be read with these params.
        """
        ...

    def create_batch(self, rows: Rows) -> Batch:
        """Read a microbatch. It depends on nothing but the rows."""
        ...

    def create_empty_batch(self) -> Batch:
        """Return a microbatch of padding only, for a rank that has no samples left while others do."""
        ...


@runtime_checkable
class SavesFiles(Protocol):
    """A pipeline of which a run keeps files."""

    def save_files(self, folder: Path) -> None:
        """Write what it takes to use the run's model on other data."""
        ...


# modality -> factory (params) -> Pipeline
PIPELINES: Registry[Callable[[DataParams], Pipeline]] = Registry(
    "data.dataset_modality", package="vla_foundry.data.pipelines", decorator="register_pipeline"
)
register_pipeline = PIPELINES.register
