"""Mix datasets of several types into one stream of microbatches, in an order that is a function of the position.

Global batches consist of blocks of data.modality_block samples. A block holds samples of one dataset, so that at every
moment all ranks work on the same one. A fixed pattern says which (`BlockPattern`): a dataset's samples before any
block are its share, to one block. Each dataset has an order of its own, which no other dataset, its end or its weight
changes.
"""

import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vla_foundry.batch import Batch
from vla_foundry.data import loader as single
from vla_foundry.data.faults import FaultLog
from vla_foundry.data.loader import DataLoader, Split
from vla_foundry.data.plan import BlockPattern
from vla_foundry.data.robotics import find_dataset_folder
from vla_foundry.data.sequential import create_sequential_loader
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.randomness import hash_int
from vla_foundry.world import World

# key of draws: the order within each dataset
_DATASETS = 12
_ORDER_VERSION = 2
# key of `describe` -> its name in messages
_NAMES = {
    "order_version": "the version of the order",
    "global_batch_size": "hparams.global_batch_size",
    "modality_block": "data.modality_block",
    "shares": "the datasets' shares",
}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the dataset in an error of its loader."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.datasets.{name}: {error}") from None


class MixtureLoader:
    """Loads one rank's microbatches of a mixture. See `create_dataloader`.

    Args:
        params: the data params.
        loaders: the datasets' loaders by name; to each of them, a block is a global batch.
        pattern: which dataset each block is of.
        world: this rank.
        global_batch_size: samples per step over all ranks.
        per_gpu_batch_size: samples per microbatch.
        block_size: samples in a block.
        is_training: False: each dataset in turn, from its first sample to its last.
    """

    def __init__(
        self,
        params: MixtureDataParams,
        loaders: dict[str, DataLoader],
        pattern: BlockPattern,
        world: World,
        *,
        global_batch_size: int,
        per_gpu_batch_size: int,
        block_size: int,
        is_training: bool,
    ) -> None:
        self._params = params
        self.loaders = loaders
        self._pattern = pattern
        self._world = world
        self._global_batch_size = global_batch_size
        self._per_gpu_batch_size = per_gpu_batch_size
        self._block_size = block_size
        self._is_training = is_training

    @property
    def num_samples(self) -> int:
        """Number of samples in all datasets, each counted once."""
        return sum(loader.num_samples for loader in self.loaders.values())

    @property
    def num_microbatches(self) -> int | None:
        """Number of microbatches that `microbatches(0)` yields, the same on every rank; None: unlimited."""
        counts = [loader.num_microbatches for loader in self.loaders.values()]
        return None if self._is_training else sum(count for count in counts if count is not None)

    def describe(self) -> dict[str, Any]:
        """Return everything that determines the sample order, in plain JSON types."""
        shares = zip(self.loaders, self._pattern.shares, strict=True)
        return {
            "order_version": _ORDER_VERSION,
            "modality_block": self._block_size,
            "global_batch_size": self._global_batch_size,
            "shares": {name: round(share, 9) for name, share in shares},
            "mixture": {name: loader.describe() for name, loader in self.loaders.items()},
        }

    def check_plan(self, saved_description: dict[str, Any]) -> list[str]:
        """Check that a checkpoint's `describe()` matches this loader; return lines for the user.

        Raises:
            ValueError: the sample order changed; the message says why.
        """
        if "mixture" not in saved_description:
            raise single.changed_order(["data.type was not mixture"])
        changes = single.list_changes(saved_description, self.describe(), _NAMES)
        before, now = list(saved_description["mixture"]), list(self.loaders)
        if not changes and before != now:  # it settles which of two datasets comes first
            changes = [f"data.datasets were in the order {', '.join(before)}, are in the order {', '.join(now)}"]
        if changes:
            raise single.changed_order(changes)
        for name, loader in self.loaders.items():
            with _naming(name):
                loader.check_plan(saved_description["mixture"][name])
        return []

    def progress(self, global_batch: int) -> dict[str, float]:
        """Return how many passes over each dataset come before a global batch, to log."""
        blocks = self._blocks_before(global_batch)
        return {
            f"epochs_{name}": count * self._block_size / loader.num_samples
            for (name, loader), count in zip(self.loaders.items(), blocks, strict=True)
        }

    def _blocks_before(self, global_batch: int) -> list[int]:
        return self._pattern.num_before(global_batch * self._global_batch_size // self._block_size)

    def start(self, first_global_batch: int) -> None:
        """Start the worker processes."""
        for loader, block in zip(self.loaders.values(), self._blocks_before(first_global_batch), strict=True):
            loader.start(block)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's microbatches from the beginning; see `microbatches`."""
        return self.microbatches(0)

    def microbatches(self, first_global_batch: int) -> Iterator[Batch]:
        """Yield this rank's microbatches; each also has the name of its `dataset`. See DataLoader.microbatches."""
        if not self._is_training:
            for name, loader in self.loaders.items():
                with _naming(name):
                    for batch in loader.microbatches(0):
                        yield {**batch, "dataset": name}
            return
        names, counts = list(self.loaders), self._blocks_before(first_global_batch)
        streams = [loader.microbatches(count) for loader, count in zip(self.loaders.values(), counts, strict=True)]
        size = self._per_gpu_batch_size
        per_block = self._block_size // (self._world.world_size * size)
        for block in itertools.count(first_global_batch * self._global_batch_size // self._block_size):
            dataset = self._pattern.dataset_of(block)
            with _naming(names[dataset]):
                self._check_end(names[dataset], counts[dataset])
            counts[dataset] += 1
            for number in range(per_block):
                first = block * self._block_size + (number * self._world.world_size + self._world.rank) * size
                with _naming(names[dataset]):
                    batch = next(streams[dataset])
                yield {**batch, "dataset": names[dataset], "positions": torch.arange(first, first + size)}

    def keep_faults(self, log: FaultLog) -> None:
        """Write all faulty samples to a log, under the names of their datasets."""
        for name, loader in self.loaders.items():
            loader.keep_faults(log, name)

    def _check_end(self, name: str, block: int) -> None:
        """Check that a block of a dataset begins before its end, which it may pass, if it is not to be repeated.

        Raises:
            ValueError: it does not.
        """
        if self._params.allow_multiple_epochs or self._params.datasets[name].allow_multiple_epochs:
            return
        epoch = self.loaders[name].plan.num_positions_in_one_epoch()
        if block * self._block_size >= epoch:
            raise ValueError(
                f"The data ends after {epoch} samples, as no dataset is repeated. Lower the budget, or set "
                "--data.allow_multiple_epochs true."
            )

    def save_files(self, folder: Path) -> None:
        """Write the files that inference needs when the datasets are not available."""
        for name, loader in self.loaders.items():
            loader.save_files(Path(find_dataset_folder(self._params, str(folder), name)))

    def close(self) -> None:
        """Stop the worker processes."""
        for loader in self.loaders.values():
            loader.close()


def create_dataloader(params: DataParams, world: World | None = None, **options: Any) -> DataLoader | MixtureLoader:
    """Create a rank's loader of one dataset or of a mixture.

    Args:
        params: the data params.
        world: this rank; None: one process.
        options: see `vla_foundry.data.loader.create_dataloader`; a mixture takes no `pipeline`.

    Raises:
        FileNotFoundError: a manifest or a shard is missing.
        ValueError: params, manifests and shards contradict each other.
    """
    if params.sequential_shards and options.get("split", "train") == "train":
        for_training = {name: value for name, value in options.items() if name not in ("split", "total_samples")}
        return create_sequential_loader(params, world or World(), **for_training)
    create = _create_mixture if isinstance(params, MixtureDataParams) else single.create_dataloader
    return create(params, world or World(), **options)  # pyright: ignore[reportArgumentType]


def _create_mixture(
    params: MixtureDataParams,
    world: World,
    *,
    global_batch_size: int | None = None,
    per_gpu_batch_size: int = 1,
    seed: int | None = None,
    split: Split = "train",
    total_samples: int | None = None,
) -> MixtureLoader:
    unit = world.world_size * per_gpu_batch_size
    batch_size = global_batch_size or unit
    block = params.modality_block or unit
    if batch_size % block or block % unit:
        raise ValueError(
            f"data.modality_block ({block}) must be a multiple of {unit} (num_ranks x hparams.per_gpu_batch_size) and "
            f"divide hparams.global_batch_size ({batch_size})."
        )
    seed = params.seed or 0 if seed is None else seed
    counts = params.num_val_samples(total_samples)
    loaders = {}
    for name, part in params.datasets.items():
        if split == "validation" and counts[name] is None:
            continue
        with _naming(name):
            loaders[name] = single.create_dataloader(
                # the end of one pass rarely is the end of a block; `MixtureLoader` sees to it
                replace(part, allow_multiple_epochs=True),
                world,
                global_batch_size=block,
                per_gpu_batch_size=per_gpu_batch_size,
                # by name: the order of a dataset does not depend on the others
                seed=hash_int(seed, _DATASETS, zlib.crc32(name.encode())) >> 1,
                split=split,
                total_samples=counts[name],
            )
    return MixtureLoader(
        params,
        loaders,
        BlockPattern([params.blocks()[name] for name in loaders]),
        world,
        global_batch_size=batch_size,
        per_gpu_batch_size=per_gpu_batch_size,
        block_size=block,
        is_training=split == "train",
    )
