"""Mixtures: shares over any window, the same batches for any number of ranks and after a restart."""

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_foundry.batch import Batch
from vla_foundry.data import create_dataloader
from vla_foundry.data.plan import BlockPattern
from vla_foundry.params.data.mixture import MixtureDataParams, pattern_blocks
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.world import World

SHARES = {"robots": 0.5, "captions": 0.3, "text": 0.2}
# first token of each dataset's records: they say which record it is, and of which dataset
FIRST = {"robots": 0, "captions": 1000, "text": 2000}
BATCH, BLOCK = 32, 4


@pytest.fixture
def params(tmp_path: Path, write_records: Callable) -> MixtureDataParams:
    """Three datasets of 100, 50 and 40 records."""
    sizes = {"robots": [30, 70], "captions": [20, 30], "text": [40]}
    datasets: dict[str, Any] = {
        name: TextDataParams(
            dataset_manifest=[str(write_records(tmp_path / name, sizes[name], 9, first_token=FIRST[name]))],
            val_dataset_manifest=[str(tmp_path / name / "manifest.jsonl")],
            seq_len=8,
            num_workers=0,
            allow_multiple_epochs=True,
        )
        for name in SHARES
    }
    return MixtureDataParams(datasets=datasets, weights=SHARES, modality_block=BLOCK)


def take(params: MixtureDataParams, num_batches: int, *, first: int = 0, ranks: int = 1, size: int = 1) -> list[Batch]:
    """Return the microbatches of all ranks in the order of their positions, from the first global batch on."""
    count = num_batches * BATCH // (ranks * size)
    streams = []
    for rank in range(ranks):
        world = World(rank=rank, world_size=ranks)
        with closing(
            create_dataloader(params, world, global_batch_size=BATCH, per_gpu_batch_size=size, seed=7)
        ) as loader:
            streams.append(list(itertools.islice(loader.microbatches(first), count)))
    return [batch for slot in zip(*streams, strict=True) for batch in slot]


def samples(batches: list[Batch]) -> list[tuple[str, int, int]]:
    """(dataset, record, position) of each sample."""
    return [
        (batch["dataset"], int(token), int(position))
        for batch in batches
        for token, position in zip(batch["input_ids"][:, 0], batch["positions"], strict=True)
    ]


def test_shares_hold_over_any_window_to_one_block(params: MixtureDataParams) -> None:
    found = samples(take(params, 40))
    assert [position for _, _, position in found] == list(range(40 * BATCH))
    assert all(FIRST[name] <= record < FIRST[name] + 1000 for name, record, _ in found)
    for batch in range(40):
        counts = Counter(name for name, _, _ in found[batch * BATCH : (batch + 1) * BATCH])
        assert all(count % BLOCK == 0 for count in counts.values())
    owners = [name for name, _, _ in found][::BLOCK]
    for start, end in itertools.combinations(range(0, len(owners), 3), 2):
        counts = Counter(owners[start:end])
        assert all(abs(counts[name] - share * (end - start)) <= 1 + 1e-9 for name, share in SHARES.items())


@pytest.mark.parametrize(
    "weights", [[0.5, 0.3, 0.2], [1.0], [1.0, 2.0], [0.1] * 10, [7.0, 2.0, 0.7, 0.3], [3.14159, 1.0, 2.71828]]
)
def test_a_pattern_stays_within_one_block_of_the_shares_for_ever(weights: list[float]) -> None:
    pattern = BlockPattern(pattern_blocks(weights))
    shares = np.asarray(weights) / sum(weights)
    assert pattern.shares == pytest.approx(shares, abs=1e-4)
    for first in (0, 10**9 + 7):
        counts = np.asarray([pattern.num_before(block) for block in range(first, first + 2000)])
        owners = [pattern.dataset_of(block) for block in range(first, first + 1999)]
        assert (np.diff(counts, axis=0) == np.eye(len(weights))[owners]).all()
        expected = np.arange(first, first + 2000)[:, None] * np.asarray(pattern.shares)
        assert abs(counts - expected).max() < 1


def test_epochs_are_each_dataset_s_own(params: MixtureDataParams) -> None:
    found = samples(take(params, 20))
    for name, size in (("robots", 100), ("captions", 50), ("text", 40)):
        records = [record for other, record, _ in found if other == name]
        assert len(records) > 2 * size
        assert (
            sorted(records[:size]) == sorted(records[size : 2 * size]) == list(range(FIRST[name], FIRST[name] + size))
        )
        assert records[:size] != records[size : 2 * size]
    with closing(create_dataloader(params, global_batch_size=BATCH, per_gpu_batch_size=4, seed=7)) as loader:
        progress = loader.progress(20)
    for name, size in (("robots", 100), ("captions", 50), ("text", 40)):
        count = sum(other == name for other, _, _ in found)
        assert progress[f"epochs_{name}"] == count / size


@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 1), (1, 4)])
def test_ranks_share_the_batches_and_each_slot_is_of_one_dataset(
    params: MixtureDataParams, ranks: int, size: int
) -> None:
    batches = take(params, 6, ranks=ranks, size=size)
    assert samples(batches) == samples(take(params, 6))
    for slot in range(0, len(batches), ranks):
        assert len({batch["dataset"] for batch in batches[slot : slot + ranks]}) == 1


def test_loader_processes_change_nothing(params: MixtureDataParams) -> None:
    text = replace(params.datasets["text"], num_workers=2)
    found = samples(take(replace(params, datasets=params.datasets | {"text": text}), 5, first=2, size=4))
    assert found == samples(take(params, 7))[2 * BATCH :]


def test_a_restart_goes_on_where_the_data_was(params: MixtureDataParams) -> None:
    whole = samples(take(params, 9))
    for first in (1, 4, 8):
        assert samples(take(params, 9 - first, first=first)) == whole[first * BATCH :]


def test_no_dataset_changes_the_order_of_another(params: MixtureDataParams) -> None:
    alone = replace(params, datasets={"text": params.datasets["text"]}, weights={})
    heavy = replace(params, weights={"robots": 1.0, "captions": 1.0, "text": 8.0})
    orders = [
        [record for name, record, _ in samples(take(each, 8)) if name == "text"] for each in (params, alone, heavy)
    ]
    shortest = min(map(len, orders))
    assert shortest >= 8 * BATCH * 0.2 - BLOCK
    assert orders[0][:shortest] == orders[1][:shortest] == orders[2][:shortest]


def test_a_dataset_that_is_not_repeated_ends_the_run_after_its_last_block(params: MixtureDataParams) -> None:
    datasets = {name: replace(part, allow_multiple_epochs=name != "text") for name, part in params.datasets.items()}
    once = replace(params, datasets=datasets)
    assert sum(name == "text" for name, _, _ in samples(take(once, 6))) == 40
    with pytest.raises(ValueError, match=r"^data\.datasets\.text: The data ends after 40 samples"):
        take(once, 7)


def test_validation_reads_each_dataset_in_turn(params: MixtureDataParams) -> None:
    options: dict[str, Any] = {"global_batch_size": BATCH, "per_gpu_batch_size": 2, "seed": 7}
    with closing(create_dataloader(params, split="validation", total_samples=20, **options)) as loader:
        batches = list(loader)
        assert loader.num_microbatches == len(batches)
    assert Counter(name for name, _, _ in samples(batches)) == {"robots": 10, "captions": 6, "text": 4}
    assert [record for name, record, _ in samples(batches) if name == "text"] == [2000, 2001, 2002, 2003]
    some = dict(params.datasets) | {"robots": replace(params.datasets["robots"], val_dataset_manifest=[])}
    with closing(
        create_dataloader(replace(params, datasets=some), split="validation", total_samples=20, **options)
    ) as loader:
        assert Counter(name for name, _, _ in samples(list(loader))) == {"captions": 12, "text": 8}


def test_another_mixture_is_another_order(params: MixtureDataParams) -> None:
    def describe(changed: MixtureDataParams, size: int = 2) -> Any:
        loader = create_dataloader(changed, global_batch_size=BATCH, per_gpu_batch_size=size, seed=7)
        loader.close()
        return loader

    saved = describe(params).describe()
    describe(params, size=1).check_plan(saved)
    text = replace(params.datasets["text"], shuffle_buffer_size=5)
    for changed, message in (
        (replace(params, modality_block=8), r"data\.modality_block was 4, is 8"),
        (replace(params, weights={"robots": 1.0, "captions": 1.0, "text": 1.0}), r"the datasets' shares was"),
        (
            replace(params, datasets=dict(params.datasets) | {"text": text}),
            r"^data\.datasets\.text: .*shuffle_buffer_size was",
        ),
        (
            replace(params, datasets=dict(reversed(params.datasets.items()))),
            "were in the order robots, captions, text, are in the order text, captions, robots",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            describe(changed).check_plan(saved)
    with pytest.raises(ValueError, match=r"data\.type was not mixture"):
        describe(params).check_plan(saved["mixture"]["text"])


def test_blocks_that_ranks_cannot_share_are_refused(params: MixtureDataParams) -> None:
    for world_size, size in ((3, 1), (1, 3), (8, 1)):
        with pytest.raises(ValueError, match=rf"data\.modality_block \(4\) must be a multiple of {world_size * size}"):
            create_dataloader(params, World(world_size=world_size), global_batch_size=24, per_gpu_batch_size=size)


def test_draws_differ_between_datasets(params: MixtureDataParams, tmp_path: Path, write_records: Callable) -> None:
    """Two datasets of the same records are read in different orders, and no position comes twice."""
    twin = replace(params.datasets["robots"])
    both = MixtureDataParams(datasets={"one": params.datasets["robots"], "other": twin}, modality_block=BLOCK)
    found = samples(take(both, 6))
    orders = [[record for name, record, _ in found if name == each] for each in ("one", "other")]
    assert orders[0][:90] != orders[1][:90]
    assert len(np.unique([position for _, _, position in found])) == len(found)
