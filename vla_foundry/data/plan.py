"""The sample order: the sample at position g is a pure function of shard sizes, weights and seed.

Global batch b covers positions [b * G, (b + 1) * G). Three steps resolve a position. None depends on earlier reads,
ranks or workers:

1. Batch -> dataset. Each batch holds each dataset's share, rounded down or up; a keyed permutation assigns the slots
   of a batch to datasets.
2. Dataset -> ordinal. The number of samples a dataset contributes before batch b has a closed form (see
   `Interleaving.num_before`).
3. Ordinal -> (epoch, shard, row). Each epoch permutes the shards, then the samples within blocks of shards.

The plan does no I/O. It holds a few integers per shard and resolves a position in O(log shards).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from vla_foundry.randomness import draw_below, hash_int, hash_ints

PLAN_VERSION = 1
# each hash key includes its purpose, so that draws for different purposes are independent
_SLOTS, _SHARDS, _SAMPLES, _REPLACEMENT = 1, 2, 3, 4
# shares are integers in units of 2**-32 samples
_UNIT_BITS = 32
_UNIT = 1 << _UNIT_BITS
_MAX_LAYOUTS = 64
# a bad sample is replaced first from its own block, whose shards are open, then from the whole dataset
NUM_NEAR_REPLACEMENTS = 4

# with fewer rounds, permutations of small domains show visible patterns
_ROUND_KEYS = np.arange(1, 13, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93)


class Location(NamedTuple):
    """Where samples are stored: five int64 arrays [n]."""

    dataset: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    epoch: np.ndarray
    # number of the piece of the row that is the sample; 0 where rows are not cut
    piece: np.ndarray


@dataclass(frozen=True, eq=False)
class _Layout:
    """One epoch of one dataset: the shard order, and the blocks the shards form."""

    # int64 [num_shards], shards in reading order
    order: np.ndarray
    # int64 [num_shards + 1], samples before each shard
    starts: np.ndarray
    # int64 [num_blocks + 1], samples before each block
    block_starts: np.ndarray
    # uint64 [num_blocks], permutation key of each block
    block_keys: np.ndarray


class Interleaving:
    """Which dataset each position belongs to, in closed form.

    Each dataset's count in a batch is its share, rounded down or up. Its count in the first n batches is off by less
    than one for each 1 among the binary digits of n, so a window of batches may be off by a few. `BlockPattern`, of
    mixtures, is off by less than one block for ever.

    Args:
        weights: relative share of each dataset; any positive numbers.
        batch_size: positions in a batch.
        seed: seed of the permutation that assigns a batch's slots to datasets.
    """

    def __init__(self, weights: Sequence[float], batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self._seed = seed
        self._boundaries = _share_boundaries(weights, batch_size)

    @property
    def num_datasets(self) -> int:
        """Number of datasets."""
        return len(self._boundaries) - 1

    @property
    def shares(self) -> list[int]:
        """Each dataset's share of a batch, in units of 2**-32 positions; they sum to batch_size * 2**32."""
        return np.diff(self._boundaries).tolist()

    def place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each position's dataset, and its ordinal among that dataset's positions; int64 [n] each."""
        if self.num_datasets == 1:
            return np.zeros_like(positions), positions
        batch, slot = np.divmod(positions, self.batch_size)
        slot = permute(slot, self.batch_size, hash_ints(hash_int(self._seed, _SLOTS), batch))
        batches, of_position = np.unique(batch, return_inverse=True)
        edges = ((self._boundaries + _reversed_bits(batches)[:, None]) >> _UNIT_BITS)[of_position]  # (n, D + 1)
        dataset = (slot[:, None] >= edges[:, 1:]).sum(axis=1)
        rows = np.arange(len(positions))
        return dataset, self.num_before(batches)[of_position, dataset] + slot - edges[rows, dataset]

    def num_before(self, batches: np.ndarray) -> np.ndarray:
        """Return how many positions of each dataset precede each batch, int64 [batches, datasets].

        Batch b gives the first d datasets floor((A_d + v_b) / U) slots, where A_d is their share of a batch in units
        of 1 / U and v_b is b with its binary digits reversed (the van der Corput sequence). So each dataset's count in
        a batch is its share rounded down or up. The same holds for its total over the batches
        [k * 2**j, (k + 1) * 2**j). The sum over all b' < b is split into such aligned ranges, one per binary digit
        of b.
        """
        whole, fraction = np.divmod(self._boundaries, _UNIT)
        batches = batches[:, None, None]  # (batches, boundaries, digits)
        digit = np.arange(_UNIT_BITS, dtype=np.int64)
        in_range = (batches >> digit) & 1
        lowest = _reversed_bits(batches) & ((1 << (_UNIT_BITS - 1 - digit)) - 1)
        threshold = (_UNIT - fraction)[:, None]  # round up if v_b is at or above the threshold
        missing = np.maximum(threshold - lowest, 0)
        num_below = -((-missing) >> (_UNIT_BITS - digit))
        num_up = (in_range * ((1 << digit) - num_below)).sum(axis=2)
        periods = batches[:, :, 0] >> _UNIT_BITS
        before = whole * batches[:, :, 0] + num_up + periods * fraction
        return np.diff(before, axis=1)


class BlockPattern:
    """Which dataset each block of a mixture is of: a pattern of blocks, repeated.

    At every block, the number of each dataset's blocks so far differs from its share by less than one (R. Tijdeman, The
    chairman assignment problem, 1980).

    Args:
        units: blocks of each dataset in the pattern.
    """

    def __init__(self, units: Sequence[int]) -> None:
        self.units = list(units)
        length, last = sum(self.units), max(1, 2 * len(self.units) - 2)
        self._datasets = np.zeros(length, dtype=np.int64)
        counts = np.zeros((length + 1, len(self.units)), dtype=np.int64)
        for block in range(length):
            # how far each dataset is behind, in units of 1 / (length x last) blocks
            behind = [
                (unit * (block + 1) - count * length) * last
                for unit, count in zip(self.units, counts[block].tolist(), strict=True)
            ]
            due = [((last - 1) * length - lag) / unit for lag, unit in zip(behind, self.units, strict=True)]
            chosen = min((d for d, lag in enumerate(behind) if lag >= length), key=due.__getitem__)
            self._datasets[block] = chosen
            counts[block + 1] = counts[block]
            counts[block + 1, chosen] += 1
        self._counts = counts

    @property
    def shares(self) -> list[float]:
        """Each dataset's share of the blocks; they sum to 1."""
        return [unit / len(self._datasets) for unit in self.units]

    def dataset_of(self, block: int) -> int:
        """Return the dataset of a block."""
        return int(self._datasets[block % len(self._datasets)])

    def num_before(self, block: int) -> list[int]:
        """Return how many blocks of each dataset come before a block."""
        repeats, rest = divmod(block, len(self._datasets))
        return [repeats * unit + count for unit, count in zip(self.units, self._counts[rest].tolist(), strict=True)]


class SamplePlan:
    """The sample order.

    Args:
        shard_sizes: for each dataset, the number of rows in each shard, in manifest order.
        weights: relative share of each dataset; any positive numbers.
        seed: seed of all permutations.
        global_batch_size: G, samples per optimizer step.
        block_size: samples are shuffled within blocks of shards that hold about this many samples.
        shuffle: if False, shards and samples keep their manifest order.
        pieces: for each dataset, the number of samples that each of its rows is cut into; None: 1.

    Raises:
        ValueError: a dataset is empty, or a number is out of range.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int] | np.ndarray],
        weights: Sequence[float],
        *,
        seed: int,
        global_batch_size: int,
        block_size: int,
        shuffle: bool = True,
        pieces: Sequence[int] | None = None,
    ) -> None:
        self._pieces = np.asarray([1] * len(shard_sizes) if pieces is None else pieces, dtype=np.int64)
        self._shard_sizes = [
            np.asarray(sizes, dtype=np.int64) * count for sizes, count in zip(shard_sizes, self._pieces, strict=True)
        ]
        self.num_samples_of = [int(sizes.sum()) for sizes in self._shard_sizes]
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.block_size = block_size
        self.shuffle = shuffle
        self._interleaving = Interleaving(weights, global_batch_size, seed)
        self._layouts: OrderedDict[tuple[int, int], _Layout] = OrderedDict()
        assert len(weights) == len(shard_sizes), "one weight per dataset"
        if block_size < 1:
            raise ValueError(f"data.shuffle_buffer_size ({block_size}) must be at least 1.")
        for dataset, num_samples in enumerate(self.num_samples_of):
            if num_samples == 0:
                raise ValueError(f"Dataset {dataset} of data.dataset_manifest holds no samples.")

    @property
    def num_datasets(self) -> int:
        """Number of datasets."""
        return len(self._shard_sizes)

    @property
    def num_samples(self) -> int:
        """Number of samples in all datasets together, each counted once."""
        return sum(self.num_samples_of)

    @property
    def shares(self) -> list[int]:
        """Each dataset's share of a global batch, in units of 2**-32 samples; they sum to G * 2**32."""
        return self._interleaving.shares

    def locate(self, positions: np.ndarray) -> Location:
        """Return the sample at each position.

        Args:
            positions: int64 [n], each >= 0.
        """
        positions = np.asarray(positions, dtype=np.int64)
        dataset, ordinal = self._interleaving.place(positions)
        num_samples = np.asarray(self.num_samples_of, dtype=np.int64)[dataset]
        epoch, index = np.divmod(ordinal, num_samples)
        shard, row = np.empty_like(positions), np.empty_like(positions)
        for group, layout in self._groups(dataset, epoch):
            index_in_order = self._shuffle_in_blocks(layout, index[group])
            shard[group], row[group] = _split_by_shard(layout, index_in_order)
        row, piece = np.divmod(row, self._pieces[dataset])
        return Location(dataset, shard, row, epoch, piece)

    def replacements(self, positions: np.ndarray, attempt: int) -> Location:
        """Return replacements for bad samples at `positions`: other samples of the same datasets.

        Args:
            positions: int64 [n].
            attempt: 0 for the first replacement, 1 if that is bad too, and so on.
        """
        positions = np.asarray(positions, dtype=np.int64)
        dataset, ordinal = self._interleaving.place(positions)
        num_samples = np.asarray(self.num_samples_of, dtype=np.int64)[dataset]
        epoch, index = np.divmod(ordinal, num_samples)
        draws = hash_ints(hash_ints(hash_int(self.seed, _REPLACEMENT, attempt), positions), epoch)
        shard, row = np.empty_like(positions), np.empty_like(positions)
        for group, layout in self._groups(dataset, epoch):
            starts, sizes = np.zeros(1, dtype=np.int64), num_samples[group]
            if attempt < NUM_NEAR_REPLACEMENTS:
                block = np.searchsorted(layout.block_starts, index[group], side="right") - 1
                starts = layout.block_starts[block]
                sizes = layout.block_starts[block + 1] - starts
            chosen = starts + draw_below(draws[group], sizes).astype(np.int64)
            shard[group], row[group] = _split_by_shard(layout, chosen)
        row, piece = np.divmod(row, self._pieces[dataset])
        return Location(dataset, shard, row, epoch, piece)

    def num_positions_in_one_epoch(self) -> int:
        """Return how many positions, counted from 0, come before any dataset repeats a sample."""
        if self.num_datasets == 1:
            return self.num_samples
        low, high = 0, self.num_samples // self.global_batch_size + 2
        limits = np.asarray(self.num_samples_of)
        while high - low > 1:  # full batches: find the largest number that no dataset runs out in
            middle = (low + high) // 2
            fits = bool((self._interleaving.num_before(np.asarray([middle]))[0] <= limits).all())
            low, high = (middle, high) if fits else (low, middle)
        batch = np.arange(low * self.global_batch_size, (low + 1) * self.global_batch_size)
        repeated = np.flatnonzero(self.locate(batch).epoch)
        return int(batch[repeated[0]]) if len(repeated) else int(batch[-1]) + 1

    def shards_ahead(self, position: int) -> list[tuple[int, int]]:
        """Return (dataset, shard) pairs in the order they are needed: the blocks at `position`, then the next ones."""
        batch = np.asarray([position // self.global_batch_size])
        ordinals = [position] if self.num_datasets == 1 else self._interleaving.num_before(batch)[0].tolist()
        now: list[tuple[int, int]] = []
        later: list[tuple[int, int]] = []
        for dataset, ordinal in enumerate(ordinals):
            epoch, index = divmod(ordinal, self.num_samples_of[dataset])
            layout = self._layout(dataset, epoch)
            block = int(np.searchsorted(layout.block_starts, index, side="right")) - 1
            now += [(dataset, shard) for shard in _shards_of_block(layout, block)]
            if block + 2 < len(layout.block_starts):
                following, block = layout, block + 1
            else:
                following, block = self._layout(dataset, epoch + 1), 0
            later += [(dataset, shard) for shard in _shards_of_block(following, block)]
        return list(dict.fromkeys(now + later))

    def _shuffle_in_blocks(self, layout: _Layout, index: np.ndarray) -> np.ndarray:
        if not self.shuffle:
            return index
        block = np.searchsorted(layout.block_starts, index, side="right") - 1
        start = layout.block_starts[block]
        size = layout.block_starts[block + 1] - start
        return start + permute(index - start, size, layout.block_keys[block])

    def _groups(self, dataset: np.ndarray, epoch: np.ndarray) -> list[tuple[np.ndarray | slice, _Layout]]:
        """Group positions by dataset and epoch."""
        if not len(dataset):
            return []
        if (dataset == dataset[0]).all() and (epoch == epoch[0]).all():
            return [(slice(None), self._layout(int(dataset[0]), int(epoch[0])))]
        pairs, of_position = np.unique(np.stack([dataset, epoch]), axis=1, return_inverse=True)
        of_position = of_position.reshape(-1)
        return [
            (np.flatnonzero(of_position == number), self._layout(int(pair[0]), int(pair[1])))
            for number, pair in enumerate(pairs.T)
        ]

    def _layout(self, dataset: int, epoch: int) -> _Layout:
        """Return the layout of one epoch of a dataset; recent layouts are cached."""
        layout = self._layouts.get((dataset, epoch))
        if layout is None:
            layout = self._create_layout(dataset, epoch)
            self._layouts[dataset, epoch] = layout
            if len(self._layouts) > max(_MAX_LAYOUTS, 2 * self.num_datasets):
                self._layouts.popitem(last=False)
        else:
            self._layouts.move_to_end((dataset, epoch))
        return layout

    def _create_layout(self, dataset: int, epoch: int) -> _Layout:
        sizes = self._shard_sizes[dataset]
        order = np.flatnonzero(sizes)
        if self.shuffle:
            order = order[permute(np.arange(len(order)), len(order), hash_int(self.seed, _SHARDS, dataset, epoch))]
        starts = np.concatenate([[0], np.cumsum(sizes[order])])
        # a block begins at the first shard that starts at or after a multiple of block_size
        block_of_shard = starts[:-1] // self.block_size
        begins = np.flatnonzero(np.diff(block_of_shard, prepend=-1))
        keys = hash_ints(hash_int(self.seed, _SAMPLES, dataset, epoch), np.arange(len(begins)))
        return _Layout(order, starts, np.append(starts[begins], starts[-1]), keys)


def _share_boundaries(weights: Sequence[float], global_batch_size: int) -> np.ndarray:
    """Return the cumulative dataset shares in units of 2**-32 samples, int64 [num_datasets + 1]."""
    if not 1 <= global_batch_size < 1 << 30:
        raise ValueError(f"hparams.global_batch_size ({global_batch_size}) must be in 1 .. 2**30 - 1.")
    exact = [Fraction(0)]
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise ValueError(f"data.dataset_weighting must hold positive numbers, got {list(weights)}.")
        exact.append(exact[-1] + Fraction(weight))
    return np.asarray([round(part / exact[-1] * global_batch_size * _UNIT) for part in exact], dtype=np.int64)


def _reversed_bits(values: np.ndarray) -> np.ndarray:
    """Reverse the lowest 32 binary digits of each value."""
    result = values & (_UNIT - 1)
    for shift, mask in ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        result = ((result & mask) << shift) | ((result >> shift) & mask)
    return result


def _split_by_shard(layout: _Layout, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = np.searchsorted(layout.starts, index, side="right") - 1
    return layout.order[place], index - layout.starts[place]


def _shards_of_block(layout: _Layout, block: int) -> list[int]:
    first, end = np.searchsorted(layout.starts[:-1], layout.block_starts[block : block + 2])
    return layout.order[first:end].tolist()


def permute(indices: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Return the image of each index under a keyed permutation of 0 .. size - 1.

    A Feistel network permutes the cells of a rectangle that just covers the domain. An index that lands outside the
    domain (about one in sqrt(size)) is permuted again until it is inside.

    Args:
        indices: int64 [n], each in 0 .. size - 1.
        size: domain size, below 2**62; one for all indices or one each.
        key: 64-bit key; one for all indices or one each.

    Returns:
        int64 [n]; a bijection for a fixed size and key.
    """
    size = np.broadcast_to(np.asarray(size, np.uint64), indices.shape)
    key = np.broadcast_to(np.asarray(key, np.uint64), indices.shape)
    result = _feistel(indices.astype(np.uint64), size, key)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], size[outside], key[outside])
        outside = outside[result[outside] >= size[outside]]
    return result.astype(np.int64)


def _feistel(indices: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permute the cells, numbered row by row, of a rectangle with width x height >= size."""
    width = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    height = (size + width - np.uint64(1)) // width
    left, right = np.divmod(indices, width)  # left < height, right < width
    for round_number in range(len(_ROUND_KEYS)):
        round_key = key + _ROUND_KEYS[round_number]
        if round_number % 2 == 0:
            left = (left + draw_below(hash_ints(round_key, right), height)) % height
        else:
            right = (right + draw_below(hash_ints(round_key, left), width)) % width
    return left * width + right
