"""The order of samples as a function of position."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from vla_foundry.data.plan import NUM_NEAR_REPLACEMENTS, SamplePlan, permute
from vla_foundry.randomness import hash_int, hash_ints

MIXES = [
    # shard sizes per dataset, weights, global batch size, block size
    ([[5, 3, 8]], [1.0], 4, 6),
    ([[7], [2, 2]], [0.9, 0.1], 10, 100),
    ([[4, 0, 4], [9, 1], [6]], [1.0, 2.0, 3.0], 7, 5),
    ([[3, 3, 3, 3]] * 5, [0.01, 0.2, 0.3, 0.4, 7.0], 16, 4),
    ([[50], [20, 30]], [1.0, 1.0], 1, 10),
    ([[11, 13]] * 4, [1.0, 1.0, 1.0, 1.0], 33, 1),
]


def create_plan(mix: tuple, *, seed: int = 3, shuffle: bool = True) -> SamplePlan:
    sizes, weights, global_batch_size, block_size = mix
    return SamplePlan(
        sizes, weights, seed=seed, global_batch_size=global_batch_size, block_size=block_size, shuffle=shuffle
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_each_sample_comes_exactly_once_per_epoch(mix: tuple, shuffle: bool) -> None:
    plan = create_plan(mix, shuffle=shuffle)
    location = plan.locate(np.arange(150 * mix[2]))
    for dataset, sizes in enumerate(mix[0]):
        mine = location.dataset == dataset
        samples = sorted((shard, row) for shard, size in enumerate(sizes) for row in range(size))
        epochs = location.epoch[mine]
        for epoch in range(int(epochs.max())):  # the last one may be cut
            chosen = epochs == epoch
            found = zip(location.shard[mine][chosen].tolist(), location.row[mine][chosen].tolist(), strict=True)
            assert sorted(found) == samples


@pytest.mark.parametrize("mix", MIXES)
def test_every_global_batch_holds_each_share_to_within_one_sample(mix: tuple) -> None:
    sizes, weights, global_batch_size, _ = mix
    num_batches = 128
    dataset = create_plan(mix).locate(np.arange(num_batches * global_batch_size)).dataset
    counts = np.stack([np.bincount(batch, minlength=len(sizes)) for batch in dataset.reshape(num_batches, -1)])
    shares = np.asarray(weights) / sum(weights) * global_batch_size
    assert (counts >= np.floor(shares - 1e-6)).all()
    assert (counts <= np.ceil(shares + 1e-6)).all()
    # and shares do not drift: over aligned runs of 2**j batches they hold to within one sample too
    for run in (2, 16, 128):
        in_run = counts.reshape(num_batches // run, run, -1).sum(axis=1)
        assert (abs(in_run - shares * run) < 1 + 1e-3).all()


@pytest.mark.parametrize("mix", MIXES)
def test_position_is_located_alike_alone_and_in_any_company(mix: tuple) -> None:
    plan = create_plan(mix)
    together = plan.locate(np.arange(400))
    for position in (399, 0, 17, 256):
        alone = create_plan(mix).locate(np.asarray([position]))
        assert all(one[0] == many[position] for one, many in zip(alone, together, strict=True))
    backwards = plan.locate(np.arange(400)[::-1])
    assert all(np.array_equal(a[::-1], b) for a, b in zip(backwards, together, strict=True))


def test_far_positions_are_found_without_what_lies_before() -> None:
    plan = create_plan(MIXES[2])
    near = plan.locate(np.arange(7 * 2**20, 7 * 2**20 + 21))
    shares = [1, 2, 3]
    for dataset, num_samples in enumerate(plan.num_samples_of):
        passes = 7 * 2**20 * shares[dataset] / 6 / num_samples
        assert abs(near.epoch[near.dataset == dataset] - passes).max() < 2


def test_counts_before_a_batch_equal_a_plain_count() -> None:
    plan = create_plan(MIXES[3])
    location = plan.locate(np.arange(16 * 300))
    for dataset, num_samples in enumerate(plan.num_samples_of):
        mine = location.dataset == dataset
        # the epoch of the k-th sample of a dataset is k // num_samples
        in_batch_order = location.epoch[mine]
        per_batch = np.add.reduceat(mine, np.arange(0, len(mine), 16))
        expected = np.concatenate([np.full(n, 1) for n in per_batch]).cumsum() - 1
        assert np.array_equal(np.sort(in_batch_order), expected // num_samples)


def test_without_shuffling_samples_come_in_the_order_of_the_manifest() -> None:
    plan = create_plan(([[2, 3]], [1.0], 5, 2), shuffle=False)
    location = plan.locate(np.arange(10))
    assert location.shard.tolist() == [0, 0, 1, 1, 1] * 2
    assert location.row.tolist() == [0, 1, 0, 1, 2] * 2


def test_order_changes_with_seed_and_epoch() -> None:
    mix = ([[10] * 10], [1.0], 10, 30)
    first, second = (create_plan(mix, seed=seed).locate(np.arange(200)) for seed in (1, 2))
    ids = first.shard * 10 + first.row
    assert not np.array_equal(ids, second.shard * 10 + second.row)
    assert not np.array_equal(ids[:100], ids[100:])


def test_shuffling_stays_within_blocks_of_shards() -> None:
    location = create_plan(([[10] * 20], [1.0], 10, 40)).locate(np.arange(200))
    for block in location.shard.reshape(5, 40):
        assert len(set(block.tolist())) == 4
    first = location.shard[:40]
    assert len(set(first[:10].tolist())) > 1  # and they are mixed


def test_replacement_is_of_the_same_dataset_and_first_of_the_same_block() -> None:
    mix = ([[10] * 20, [10] * 3], [3.0, 1.0], 12, 40)
    plan = create_plan(mix)
    positions = np.arange(240)
    location = plan.locate(positions)
    for attempt in range(NUM_NEAR_REPLACEMENTS + 3):
        replaced = plan.replacements(positions, attempt)
        assert np.array_equal(replaced.dataset, location.dataset)
        assert all(np.array_equal(a, b) for a, b in zip(replaced, plan.replacements(positions, attempt), strict=True))
        assert (replaced.row < 10).all()
    plan = create_plan(([[10] * 20], [1.0], 12, 40))
    location, near, far = plan.locate(positions), plan.replacements(positions, 0), plan.replacements(positions, 6)
    assert set(near.shard[:40].tolist()) == set(location.shard[:40].tolist())
    assert len(set(far.shard[:40].tolist())) > 10
    assert (near.shard * 10 + near.row != location.shard * 10 + location.row).mean() > 0.8


@pytest.mark.parametrize("mix", MIXES)
def test_positions_in_one_epoch_end_before_the_first_repeat(mix: tuple) -> None:
    plan = create_plan(mix)
    num_positions = plan.num_positions_in_one_epoch()
    epochs = plan.locate(np.arange(num_positions + 1)).epoch
    assert (epochs[:-1] == 0).all()
    assert epochs[-1] == 1


def test_shards_ahead_are_those_of_the_coming_positions_in_order() -> None:
    plan = create_plan(([[10] * 20], [1.0], 10, 40))
    location = plan.locate(np.arange(400))
    for position in (0, 70, 160, 190):
        block = position // 40
        ahead = [shard for _, shard in plan.shards_ahead(position)]
        now, after = (set(location.shard[b * 40 : b * 40 + 40].tolist()) for b in (block, block + 1))
        assert set(ahead[:4]) == now
        assert set(ahead) == now | after


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([[0]], [1.0], "holds no samples"),
        ([[1]], [0.0], "positive"),
        ([[1], [1]], [1.0, float("inf")], "positive"),
        ([[1]], [float("nan")], "positive"),
    ],
)
def test_impossible_plans_are_refused(sizes: list, weights: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplePlan(sizes, weights, seed=0, global_batch_size=4, block_size=10)


def test_order_never_changes() -> None:
    # a change of these numbers breaks the resuming of every run: raise PLAN_VERSION with it
    location = create_plan(MIXES[2]).locate(np.arange(7))
    assert location.dataset.tolist() == [2, 0, 1, 2, 1, 2, 2]
    assert (location.shard * 100 + location.row).tolist() == [4, 203, 7, 3, 3, 5, 1]


def test_large_plans_are_located_without_building_their_order() -> None:
    plan = SamplePlan([[8192] * 20_000] * 2, [1.0, 2.0], seed=0, global_batch_size=512, block_size=20_000_000)
    tracemalloc.start()
    location = plan.locate(np.arange(10**9, 10**9 + 512))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # the order of one block of 20 million samples would take 160 MB, that of one epoch 2.6 GB
    assert peak < 10_000_000
    assert len(set(zip(*(array.tolist() for array in location), strict=True))) == 512


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 31, 1000, 4097, 65_536])
def test_permutation_is_a_bijection(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_every_order_of_four_is_about_equally_likely() -> None:
    num_keys = 24_000
    keys = hash_ints(7, np.arange(num_keys))
    orders = np.stack([permute(np.full(num_keys, index), 4, keys) for index in range(4)], axis=1)
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 24
    assert all(850 < count < 1150 for count in counts.values())  # mean 1000, standard deviation 31


def test_neighbours_do_not_stay_together() -> None:
    order = permute(np.arange(50_000), 50_000, 3)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(50_000), order)[0, 1]) < 0.02


def test_sizes_and_keys_may_differ_per_index() -> None:
    sizes, keys = np.asarray([5, 9, 1000]), np.asarray([3, 4, 5])
    together = permute(np.asarray([2, 2, 2]), sizes, keys)
    assert together.tolist() == [permute(np.asarray([2]), int(s), int(k))[0] for s, k in zip(sizes, keys, strict=True)]


def test_hash_never_changes() -> None:
    # the order of every run hangs on these numbers
    assert hash_int(42, 1) == 0xFA4F945599F9054A
    assert permute(np.arange(6), 1000, 1).tolist() == [784, 523, 749, 6, 470, 584]
