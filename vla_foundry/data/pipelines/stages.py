"""Define pipelines: ordered stages that turn the content of shards into samples, and samples into a batch.

A stage is a callable `sample -> sample | None`; a `BatchStage` takes many samples at once; see named.py for those of
users. A sample is a dictionary: `__key__` and `__url__` as in WebDataset, each member's bytes by its suffix
("json.gz"), and whatever stages add; `__piece__` says which piece of a stored row the sample is, where rows are cut,
and `__part__` which of the samples that users' stages make of it. Random draws are keyed by `__seed__` and
`__position__`; if `__is_training__` is False, nothing is random. A stage drops a sample by returning None or by raising
`Dropped` with a reason; any other error marks the sample as broken. Either way the sample is counted by reason, and
another sample of the same dataset, chosen by a hash of the position, replaces it.
"""

import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from vla_foundry.batch import Batch
from vla_foundry.data.faults import Fault
from vla_foundry.data.pipelines.named import (
    BatchStage,
    Sample,
    Stage,
    Stages,
    Unselected,
    name_of_stage,
)
from vla_foundry.data.plan import Location, SamplePlan
from vla_foundry.data.reader import Dropped, SampleShard, Shard, ShardReader, TokenShard
from vla_foundry.params.data.base import DataParams
from vla_foundry.registry import Registry

T = TypeVar("T")
# (dataset number, open shard, row) -> input of the first stage
ReadContent: TypeAlias = Callable[[int, Shard, int], Sample]

# replacements to try where users' stages drop samples
_MAX_UNSELECTED = 1000


@dataclass(frozen=True)
class Failure:
    """Why a sample cannot be used."""

    # a few words; samples are counted by reason
    reason: str
    # what happened, with the name of the stage
    description: str
    # the exception raised; None: the stage returned None
    error: Exception | None = None


class Recording:
    """What the stages make in this process, and how long they take; `data inspect` switches it on."""

    def __init__(self) -> None:
        self._is_on = False
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        # samples that came out of the last stage
        self.samples: list[Sample] = []
        # {step: [(milliseconds per sample, number of samples)]}
        self.times: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Record within the block."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            self.clear()

    def add(self, samples: Sequence[Sample]) -> None:
        """Record samples."""
        if self._is_on:
            self.samples += samples

    def time(self, step: str, num_samples: int, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function and return its result; record the time."""
        if not self._is_on:
            return function(*arguments)
        started = time.perf_counter()
        result = function(*arguments)
        self.times[step].append((1000 * (time.perf_counter() - started) / max(num_samples, 1), num_samples))
        return result


RECORDING = Recording()


def _describe_failure(error: Exception, step: str) -> Failure:
    if isinstance(error, Dropped):
        return Failure(error.reason, f"{error.reason}: {error}", error)
    fault = type(error).__name__
    return Failure(f"{step}: {fault}", f"{step}: {' '.join(str(error).split()) or fault}", error)


def apply_stages(samples: "Sequence[Sample | Failure]", stages: Sequence[Stage]) -> list[Sample | Failure]:
    """Run samples through the stages in order; failures pass through unchanged."""
    results = list(samples)
    names = stages.names if isinstance(stages, Stages) else map(name_of_stage, stages)
    named = zip(names, stages, strict=True)
    for is_batch, members in groupby(named, key=lambda pair: isinstance(pair[1], BatchStage)):
        run = list(members)
        if not is_batch:
            # one sample at a time, so that the large arrays between two stages exist only once
            results = [each if isinstance(each, Failure) else _apply_each(each, run) for each in results]
            continue
        for name, stage in run:
            numbers = [number for number, each in enumerate(results) if not isinstance(each, Failure)]
            kept: Any = [results[number] for number in numbers]
            made = _apply_batch(kept, name, stage)
            for number, result in zip(numbers, made, strict=True):
                results[number] = result
    return results


def _apply_each(sample: Sample, stages: Sequence[tuple[str, Any]]) -> Sample | Failure:
    for name, stage in stages:
        try:
            result = RECORDING.time(name, 1, stage, sample)
        except Exception as error:  # a broken sample or an error in a user's stage must not end the run: count it
            return _describe_failure(error, name_of_stage(stage))
        if result is None:
            step = name_of_stage(stage)
            return Failure(f"{step}: dropped", f"{step} dropped it")
        sample = result
    return sample


def _apply_batch(samples: Sequence[Sample], name: str, stage: Any) -> list[Sample | Failure]:
    step = name_of_stage(stage)
    try:
        results = RECORDING.time(name, len(samples), stage.apply, samples)
    except Exception as error:  # as above
        if len(samples) == 1:
            return [_describe_failure(error, step)]
        middle = len(samples) // 2
        return [*_apply_batch(samples[:middle], name, stage), *_apply_batch(samples[middle:], name, stage)]
    return [_describe_failure(each, step) if isinstance(each, Exception) else each for each in results]


@dataclass
class Drops:
    """Bad samples that were replaced, in the order they were met."""

    faults: list[Fault] = field(default_factory=list)
    # {reason: count} of samples that users' stages dropped: they are not bad
    unselected: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> Counter[str]:
        """The number of replaced samples by reason."""
        return Counter(fault.reason for fault in self.faults) + self.unselected

    @property
    def last(self) -> str:
        """Describe the last one: shard, key and reason."""
        return str(self.faults[-1]) if self.faults else ""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a microbatch, before they are read."""

    # int64 [S]
    positions: np.ndarray
    # where the samples at these positions are stored
    location: Location
    plan: SamplePlan
    reader: ShardReader
    # False for validation
    is_training: bool = True
    drops: Drops = field(default_factory=Drops)
    # most samples that the stages make of one
    samples_per_row: int = 1

    def __len__(self) -> int:
        return len(self.positions)

    def open(self, number: int) -> Shard:
        """Return the open shard of a row. Do not keep it: a process can open only so many files.

        Raises:
            Dropped: the shard is damaged.
        """
        return self.reader.open(int(self.location.dataset[number]), int(self.location.shard[number]))

    def read_samples(
        self, stages: Sequence[Stage], numbers: Iterable[int] | None = None, *, read: ReadContent | None = None
    ) -> list[Sample]:
        """Read rows and run them through the stages; replace and count bad samples.

        Args:
            stages: stages in the order they are applied.
            numbers: which rows; None: all.
            read: reads the input of the first stage; None: `read_content`, which reads all members.

        Raises:
            OSError: a shard cannot be read; the error names it, and the sample.
            ValueError: too many consecutive samples were bad, or a shard contradicts its manifest.
        """
        order = list(range(len(self)) if numbers is None else numbers)
        found: dict[int, Sample] = {}
        # rows still without a sample, and where their next candidates are stored: at first one candidate per row of the
        # microbatch, later one per row in `waiting`
        waiting, location, places = order, self.location, order
        num_broken: Counter[int] = Counter()
        attempt, last = 0, None
        while attempt <= _MAX_UNSELECTED and max(num_broken.values(), default=0) <= self.reader.max_replacements:
            samples = [
                self._read(location, place, number, read or read_content)
                for place, number in zip(places, waiting, strict=True)
            ]
            results = apply_stages([sample for sample, _, _ in samples], stages)
            failed = []
            for number, place, result, (_, uri, key) in zip(waiting, places, results, samples, strict=True):
                if isinstance(result, Failure):
                    failed.append(number)
                    dataset = self.reader.datasets[int(location.dataset[place])].manifest
                    last = Fault(
                        dataset=dataset, shard=uri, member=key, reason=result.reason, detail=result.description
                    )
                    if isinstance(result.error, Unselected):
                        self.drops.unselected[result.reason] += 1
                    else:
                        self.drops.faults.append(last)
                        num_broken[number] += 1
                else:
                    found[number] = result
            if not failed:
                made = [found[number] for number in order]
                RECORDING.add(made)
                return made
            waiting, places = failed, range(len(failed))
            location = self.plan.replacements(self.positions[waiting], attempt)
            attempt += 1
        manifest = self.reader.datasets[int(location.dataset[0])].manifest
        raise ValueError(f"{attempt} samples in a row of {manifest} cannot be used; the last one: {last}.")

    def _read(
        self, location: Location, place: int, number: int, read: ReadContent
    ) -> tuple[Sample | Failure, str, str]:
        """Return the input of the first stage, the name of its shard, and its key there."""
        dataset, shard, row = (int(array[place]) for array in location[:3])
        key = f"row {row}"
        try:
            opened = self.reader.open(dataset, shard)
        except Dropped as error:
            return _describe_failure(error, "read"), self.reader.datasets[dataset].shard_uri(shard), key
        try:
            key = f"record {row}" if isinstance(opened, TokenShard) else opened.key(row)
            piece, part = divmod(int(location.piece[place]), self.samples_per_row)
            draws = {
                "__seed__": self.plan.seed,
                "__position__": int(self.positions[number]),
                "__piece__": piece,
                "__part__": part,
                "__is_training__": self.is_training,
            }
            sample = {
                "__key__": key,
                "__url__": opened.uri,
                **draws,
                **RECORDING.time("read", 1, read, dataset, opened, row),
            }
            return sample, opened.uri, key
        except OSError as error:
            if error.errno is None:  # a decoder's
                return _describe_failure(error, "read"), opened.uri, key
            # the disk's, not the sample's: which samples are dropped must not depend on it
            raise OSError(error.errno, f"{error.strerror} (while reading {key})", opened.uri) from error
        except Exception as error:  # a broken sample must not end the run: count it
            return _describe_failure(error, "read"), opened.uri, key


def read_content(dataset: int, shard: Shard, row: int) -> Sample:
    """Read all members of a sample by their suffixes, or a tokenized record.

    Raises:
        ValueError: the shard holds whole episodes, or is truncated.
    """
    if isinstance(shard, TokenShard):
        return read_record(shard, row)
    if isinstance(shard, SampleShard):
        return dict(shard.read(row))
    raise ValueError("it holds whole episodes, which data.type robotics reads")


def read_record(shard: TokenShard, row: int) -> Sample:
    """Return a tokenized record as a sample: `input_ids` int32 [T] and `document_ends` int64."""
    tokens, ends = shard.read(row)
    return {"input_ids": tokens.astype(np.int32), "document_ends": ends.astype(np.int64)}


def check_text(text: str) -> str:
    """Return a sample's text.

    Raises:
        Dropped: it holds NUL characters, as damaged files do, or see `check_unicode`.
    """
    if "\0" in text:
        raise Dropped("damaged text", f"its text has {text.count(chr(0))} NUL characters")
    return check_unicode(text)


def check_unicode(text: str) -> str:
    """Return a sample's text.

    Raises:
        Dropped: it holds half of a surrogate pair, which JSON can spell and no encoding can store.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Dropped("not Unicode", f"character {error.start} of its text is half of a surrogate pair") from None
    return text


class Pipeline(ABC):
    """Turns rows into batches of one modality. It is sent to loader processes, so it must be picklable.

    Batches hold NumPy arrays here; the loader turns them into tensors.
    """

    # small microbatches share a message of up to this many rows; 1 unless a message costs more than making its rows
    rows_per_message = 1
    # of each dataset: cameras and frames, from the anchor, of the images of a window; none: it holds no robot data
    images_of_windows: Sequence[tuple[Sequence[str], Sequence[int]]] = ()
    _stages = Stages()

    @property
    def stages(self) -> Stages:
        """The stages of a sample. Assign another list to change them: `pipeline.stages.insert(...)`."""
        return self._stages

    @stages.setter
    def stages(self, stages: Iterable[Stage]) -> None:
        self._stages = stages if isinstance(stages, Stages) else Stages(stages)

    @staticmethod
    def name_stages(params: DataParams, stages: Sequence[Stage]) -> Stages:
        """Return stages under the names that the params give them."""
        return Stages(dict(zip(params.default_stages(), stages, strict=True)))

    def check(self, reader: ShardReader) -> None:  # noqa: B027 (optional)
        """Check the datasets before training.

        Raises:
            ValueError: the datasets cannot be read with these params.
        """

    def pieces_per_row(self, reader: ShardReader) -> list[int]:
        """Return for each dataset how many samples each of its rows is cut into.

        Raises:
            ValueError: the datasets cannot be read with these params.
        """
        return [1] * len(reader.datasets)

    @abstractmethod
    def create_batch(self, rows: Rows) -> Batch:
        """Read a microbatch. The result depends only on the rows."""

    @abstractmethod
    def create_empty_batch(self) -> Batch:
        """Return a microbatch of padding, for a rank that has no samples left while other ranks do."""

    def save_files(self, folder: Path) -> None:  # noqa: B027 (optional)
        """Write the files needed to use the run's model on other data to the run folder."""


# modality -> factory: (params) -> Pipeline
PIPELINES: Registry[Callable[[DataParams], Pipeline]] = Registry(
    "data.dataset_modality", package="vla_foundry.data.pipelines", decorator="register_pipeline"
)
register_pipeline = PIPELINES.register


def create_pipeline(modality: str, params: DataParams) -> Pipeline:
    """Create the pipeline of a modality, with the user's changes of its stages.

    Raises:
        ValueError: the modality, a stage or a function is unknown.
    """
    pipeline = PIPELINES.get(modality)(params)
    pipeline.stages = pipeline.stages.with_params(params)
    return pipeline
