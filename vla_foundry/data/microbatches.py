"""What a loader process does: make microbatch t of a rank.

Microbatch t of a rank is positions [(t * world_size + rank) * m, ... + m), with m = per_gpu_batch_size. So a global
batch has the same samples, divided into the same microbatches, however many ranks share them.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch.utils.data

from vla_foundry.data.cache import LookAhead
from vla_foundry.data.pipelines.stages import Pipeline, Rows
from vla_foundry.data.plan import Location, SamplePlan
from vla_foundry.data.reader import ShardReader
from vla_foundry.data.transport import Message, pack

# microbatches whose places are computed at once
_MIN_LOCATED_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which positions make each microbatch of a rank."""

    rank: int
    world_size: int
    microbatch_size: int
    global_batch_size: int
    # positions there are; None: no end
    num_positions: int | None
    # False: for validation, so nothing is changed at random
    is_training: bool = True

    def first_microbatch(self, global_batch: int) -> int:
        """Return the number of the first microbatch of a global batch."""
        return global_batch * self.global_batch_size // (self.world_size * self.microbatch_size)

    @property
    def num_microbatches(self) -> int | None:
        """Microbatches of each rank; the last may be short or empty on some ranks. None: no end."""
        if self.num_positions is None:
            return None
        return math.ceil(self.num_positions / (self.world_size * self.microbatch_size))

    def positions(self, microbatch: int) -> np.ndarray:
        """Return the positions of a microbatch, int64 [S]; S is 0 where other ranks have the last samples."""
        first = (microbatch * self.world_size + self.rank) * self.microbatch_size
        end = first + self.microbatch_size
        if self.num_positions is not None:
            end = min(end, self.num_positions)
        return np.arange(first, max(first, end), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the trainer counts of a microbatch."""

    num_samples: int
    dropped: dict[str, int] = field(default_factory=dict)
    last_dropped: str = ""


@dataclass(frozen=True)
class Failure:
    """What a loader process sends in place of a microbatch that can not be made."""

    text: str

    def pin_memory(self) -> "Failure":
        return self


class Microbatches(torch.utils.data.Dataset):
    """Microbatches by their numbers; lives in loader processes.

    Args:
        plan: the order.
        reader: opens shards.
        pipeline: makes batches.
        schedule: this rank's share.
        group_size: microbatches that are asked for at once.
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

    def __getitems__(self, numbers: range) -> list[Message | Failure]:
        """Return microbatches; after a failure there are no more."""
        messages: list[Message | Failure] = []
        for number in numbers:
            try:
                messages.append(self._create_message(number))
            except (ValueError, OSError) as error:
                messages.append(Failure(" ".join(str(error).split())))
                break
        return messages

    def _create_message(self, number: int) -> Message:
        positions, location = self._locate(number)
        if any(dataset.is_remote for dataset in self._reader.datasets) and len(positions):
            self._fetch_ahead(int(positions[0]))
        rows = Rows(positions, location, self._plan, self._reader, is_training=self._schedule.is_training)
        batch = self._pipeline.create_batch(rows) if len(rows) else self._pipeline.create_empty_batch()
        batch["modality"] = self._reader.datasets[0].modality
        batch["positions"] = positions
        batch["dropped"] = dict(rows.drops.counts)
        report = Report(num_samples=len(rows), dropped=batch["dropped"], last_dropped=rows.drops.last)
        return pack(batch, report, for_transport=torch.utils.data.get_worker_info() is not None)

    def _locate(self, number: int) -> tuple[np.ndarray, Location]:
        """Locate a microbatch, together with those that this process is likely to be asked for next."""
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

    def _fetch_ahead(self, position: int) -> None:
        ahead = self._plan.shards_ahead(position)
        if ahead == self._ahead:
            return
        self._ahead = ahead
        if self._look_ahead is None:
            self._look_ahead = LookAhead(self._reader.cache)
        datasets = self._reader.datasets
        self._look_ahead.want([datasets[d].remote_shard(s) for d, s in ahead if datasets[d].is_remote])
