"""The loader: the same samples for any number of ranks, processes and restarts."""

import errno
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_foundry.batch import Batch
from vla_foundry.data import DataLoader, create_dataloader
from vla_foundry.data.faults import Fault, FaultLog
from vla_foundry.params.data.base import DatasetCacheParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.world import World


class Loaders:
    """Creates loaders over one dataset and closes them."""

    def __init__(self) -> None:
        self._opened: list[DataLoader] = []

    def create(self, *manifests: Path | str, rank: int = 0, world_size: int = 1, **changes: Any) -> DataLoader:
        call: dict[str, Any] = {"global_batch_size": 8, "per_gpu_batch_size": 2, "seed": 5}
        call |= {name: changes.pop(name) for name in (*call, "split", "total_samples") if name in changes}
        values: dict[str, Any] = {"seq_len": 8, "num_workers": 0, "allow_multiple_epochs": True}
        name = "val_dataset_manifest" if call.get("split") == "validation" else "dataset_manifest"
        values |= {"shuffle_buffer_size": 32, name: [str(manifest) for manifest in manifests]}
        params = changes.pop("params_class", TextDataParams)(**values | changes)
        loader = create_dataloader(params, World(rank=rank, world_size=world_size), **call)
        self._opened.append(loader)
        return loader

    def close(self) -> None:
        for loader in self._opened:
            loader.close()


@pytest.fixture
def loaders() -> Iterator[Loaders]:
    opened = Loaders()
    yield opened
    opened.close()


@pytest.fixture
def dataset(tmp_path: Path, write_records: Callable) -> Path:
    """100 records in 7 shards; a record's first token is its number."""
    return write_records(tmp_path / "dataset", [20, 10, 15, 5, 25, 15, 10], 9, documents=[[4, 9]] * 100)


def take(loader: DataLoader, count: int, first_global_batch: int = 0) -> list[Batch]:
    return list(itertools.islice(loader.microbatches(first_global_batch), count))


def records(batches: list[Batch]) -> list[int]:
    """The number of each record, in order."""
    return [int(token) for batch in batches for token in batch["input_ids"][:, 0]]


def test_params_are_enough_and_a_loader_is_iterable(dataset: Path) -> None:
    params = TextDataParams(dataset_manifest=[str(dataset)], seq_len=8, num_workers=0)
    with closing(create_dataloader(params)) as loader:
        assert len(records(list(itertools.islice(loader, 3)))) == 3
        assert next(iter(loader))["positions"].tolist() == [0]


def test_processes_that_were_started_early_load_the_same(loaders: Loaders, dataset: Path) -> None:
    expected = [records(take(loaders.create(dataset), 6, first)) for first in (0, 3)]
    loader = loaders.create(dataset, num_workers=1)
    for started in (0, 3):  # the second start was for another batch
        loader.start(started)
        assert [records(take(loader, 6, first)) for first in (0, 3)] == expected


def test_batch_keeps_its_spec(loaders: Loaders, dataset: Path) -> None:
    for num_workers in (0, 1):
        (batch,) = take(loaders.create(dataset, num_workers=num_workers), 1)
        assert batch["modality"] == "text"
        assert batch["positions"].dtype == torch.int64
        assert batch["positions"].tolist() == [0, 1]
        assert batch["input_ids"].dtype == torch.int32
        assert batch["input_ids"].shape == batch["target_mask"].shape == (2, 9)
        assert batch["target_mask"].dtype == torch.bool
        assert batch["documents"].lengths.tolist() == [4, 5, 4, 5]
        assert batch["documents"].num_per_row.tolist() == [2, 2]
        assert batch["dropped"] == {}


def test_an_epoch_has_each_sample_once(loaders: Loaders, dataset: Path) -> None:
    assert sorted(records(take(loaders.create(dataset), 50))) == list(range(100))


def test_order_depends_on_neither_processes_nor_grouping_nor_restarts(loaders: Loaders, dataset: Path) -> None:
    plain = take(loaders.create(dataset), 60)
    for num_workers in (1, 2):
        loader = loaders.create(dataset, num_workers=num_workers)
        assert records(take(loader, 60)) == records(plain)
        for first in (3, 0):  # 4 microbatches a global batch
            again = take(loader, 20, first)
            assert records(again) == records(plain[4 * first : 4 * first + 20])
            assert [b["positions"].tolist() for b in again] == [
                b["positions"].tolist() for b in plain[4 * first : 4 * first + 20]
            ]


@pytest.mark.parametrize(("world_size", "per_gpu_batch_size"), [(1, 1), (1, 8), (2, 2), (2, 4), (4, 1), (8, 1)])
def test_global_batches_are_the_same_for_every_world_size(
    loaders: Loaders, dataset: Path, world_size: int, per_gpu_batch_size: int
) -> None:
    whole = records(take(loaders.create(dataset), 40))
    ranks = [
        loaders.create(dataset, rank=rank, world_size=world_size, per_gpu_batch_size=per_gpu_batch_size)
        for rank in range(world_size)
    ]
    per_step = 8 // (world_size * per_gpu_batch_size)
    streams = [take(rank, 20 * per_step) for rank in ranks]
    in_order = []
    for slot in range(20 * per_step):  # a slot is one microbatch on each rank
        for stream in streams:
            in_order += records([stream[slot]])
    assert in_order[:80] == whole


def test_datasets_share_every_global_batch(loaders: Loaders, tmp_path: Path, write_records: Callable) -> None:
    first = write_records(tmp_path / "a", [30], 9)
    second = write_records(tmp_path / "b", [20, 20], 9, first_token=1000)
    loader = loaders.create(first, second, dataset_weighting=[0.7, 0.3], num_workers=1)
    for step in np.asarray(records(take(loader, 80))).reshape(20, 8):
        assert (step < 1000).sum() in (5, 6)  # 5.6


def test_pieces_of_records_are_samples(
    loaders: Loaders, dataset: Path, tmp_path: Path, write_records: Callable
) -> None:
    def pieces(batches: list[Batch]) -> list[tuple[int, int]]:
        return [(int(row[0]), int(row[-1])) for batch in batches for row in batch["input_ids"]]

    whole = loaders.create(dataset, seq_len=4)
    assert whole.num_samples == 200
    expected = pieces(take(whole, 100))
    # record n holds n, n + 1, ..., and is cut into n ... n + 4 and n + 4 ... n + 8
    assert sorted(expected) == sorted((n + first, n + first + 4) for n in range(100) for first in (0, 4))
    assert expected != sorted(expected)
    ranks = [
        take(loaders.create(dataset, seq_len=4, rank=rank, world_size=2, num_workers=2), 20, first_global_batch=5)
        for rank in (0, 1)
    ]
    together = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert pieces(together) == expected[40:120]
    # a dataset whose records are as long as a row, and one whose records are three rows
    other = write_records(tmp_path / "other", [30], 13, first_token=1000)
    mixed = loaders.create(write_records(tmp_path / "same", [40], 5, first_token=500), other, seq_len=4)
    assert mixed.num_samples == 40 + 90
    found = pieces(take(mixed, 40))
    assert sum(first >= 1000 for first, _ in found) == 40
    with pytest.raises(ValueError, match=r"data\.seq_len was 4, is 8; dataset 0 .*: number of samples was 200, is 100"):
        loaders.create(dataset).check_plan(whole.describe())


def test_without_shuffling_the_manifest_gives_the_order(loaders: Loaders, dataset: Path) -> None:
    assert records(take(loaders.create(dataset, shuffle=False), 50)) == list(range(100))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_running_out_of_data_is_an_error_at_the_last_full_batch(
    loaders: Loaders, dataset: Path, num_workers: int
) -> None:
    stream = loaders.create(dataset, allow_multiple_epochs=False, num_workers=num_workers).microbatches(10)
    assert len(list(itertools.islice(stream, 8))) == 8  # 12 whole global batches of 8 in 100 samples
    with pytest.raises(ValueError, match=r"ends after 96 samples.*--data\.allow_multiple_epochs"):
        next(stream)


@pytest.mark.parametrize("total_samples", [1, 3, 8, 13, 100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_reads_the_first_samples_once_and_ranks_step_together(
    loaders: Loaders, dataset: Path, world_size: int, total_samples: int
) -> None:
    streams = [
        list(
            loaders.create(
                dataset, rank=rank, world_size=world_size, split="validation", total_samples=total_samples
            ).microbatches(0)
        )
        for rank in range(world_size)
    ]
    assert len({len(stream) for stream in streams}) == 1
    assert len(streams[0]) == -(-total_samples // (2 * world_size))
    batches = [batch for stream in streams for batch in stream]
    filled = [batch for batch in batches if len(batch["positions"])]
    assert sorted(records(filled)) == list(range(total_samples))
    for batch in batches:
        if not len(batch["positions"]):
            assert not batch["target_mask"].any()
            assert batch["documents"].is_padding.all()


def test_validation_may_run_again(loaders: Loaders, dataset: Path) -> None:
    loader = loaders.create(dataset, split="validation", total_samples=10, num_workers=1)
    assert [records(list(loader.microbatches(0))) for _ in range(2)] == [list(range(10))] * 2
    assert loader.num_microbatches == 5


def test_validation_on_more_than_there_is_is_refused(loaders: Loaders, dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"total_val_samples \(101\) must be at most 100"):
        loaders.create(dataset, split="validation", total_samples=101)


@pytest.fixture
def create_spoilt(tmp_path: Path, write_samples: Callable, json_tokens: Callable) -> Callable[[int], Path]:
    """Write 300 samples of which every n-th is broken."""

    def create(every: int) -> Path:
        samples = [{"json.gz": b"broken"} if n % every == 0 else json_tokens(range(n, n + 9)) for n in range(300)]
        return write_samples(tmp_path / f"spoilt_{every}", [samples[:150], samples[150:]])

    return create


@pytest.mark.parametrize("num_workers", [0, 1])
def test_few_bad_samples_are_counted(loaders: Loaders, create_spoilt: Callable, num_workers: int) -> None:
    loader = loaders.create(create_spoilt(100), num_workers=num_workers)
    batches = take(loader, 150)
    found = records(batches)
    assert not {0, 100, 200} & set(found)
    assert len(found) == 300
    reasons = [reason for batch in batches for reason, count in batch["dropped"].items() for _ in range(count)]
    assert reasons == ["decode_json_tokens: BadGzipFile"] * 3
    assert (loader._num_dropped, loader._num_read) == (3, 303)


def read_faults(log: FaultLog) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert all(line["dataset"].endswith("manifest.jsonl") and "gzipped" in line["detail"] for line in lines)
    return [(Path(line["shard"]).name, line["member"], line["reason"]) for line in lines]


def test_same_faults_give_the_same_batches_and_the_same_list(
    loaders: Loaders, create_spoilt: Callable, tmp_path: Path
) -> None:
    manifest, reason = create_spoilt(60), "decode_json_tokens: BadGzipFile"
    expected = [
        (f"shard_{shard:06d}.tar", f"{shard:04d}{row:028x}", reason)
        for shard, row in ((0, 0), (0, 60), (0, 120), (1, 30), (1, 90))
    ]
    whole: list[int] = []
    for world_size, num_workers in ((1, 0), (2, 0), (1, 2)):
        name = f"run_{world_size}_{num_workers}"
        streams = []
        for rank in range(world_size):
            loader = loaders.create(manifest, rank=rank, world_size=world_size, num_workers=num_workers)
            # two epochs; the log comes after the first batches, as in training
            first = take(loader, 4)
            assert rank > 0 or not (tmp_path / name).exists()
            loader.keep_faults(FaultLog(tmp_path / name))
            streams.append(first + take(loader, 300 // world_size - 4, world_size))
        found = records([batch for slot in zip(*streams, strict=True) for batch in slot])
        whole = whole or found
        assert found == whole
        assert sorted(read_faults(FaultLog(tmp_path / name))) == expected
        # a resumed run meets them again
        resumed = loaders.create(manifest)
        resumed.keep_faults(FaultLog(tmp_path / name))
        take(resumed, 150)
        assert sorted(read_faults(FaultLog(tmp_path / name))) == expected


def test_several_writers_list_each_fault_once_and_mend_a_cut_line(tmp_path: Path) -> None:
    faults = [
        Fault(dataset="d", shard="s.tar", member=f"{number}\n", reason="r", detail="\u00e9" * 3000)
        for number in range(40)
    ]
    FaultLog(tmp_path).add(faults[:2])
    path = FaultLog(tmp_path).path
    path.write_bytes(path.read_bytes()[:-10])  # killed while it wrote
    logs = [FaultLog(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: logs[job % 4].add(faults[job % 7 : job % 7 + 33]), range(40)))
    members = [json.loads(line)["member"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(members) == sorted(fault.member for fault in faults[:39])
    assert FaultLog(tmp_path).count() == 39


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(loaders: Loaders, create_spoilt: Callable, num_workers: int) -> None:
    loader = loaders.create(create_spoilt(10), num_workers=num_workers)
    with pytest.raises(
        ValueError, match=r"11 of \d+ samples .*data\.max_bad_fraction \(0\.01\).*shard_00000\d\.tar 000"
    ):
        take(loader, 150)
    assert len(take(loaders.create(create_spoilt(10), max_bad_fraction=0.2), 150)) == 150


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_dataset_stops_at_once_and_its_faults_are_listed(
    loaders: Loaders, create_spoilt: Callable, tmp_path: Path, num_workers: int
) -> None:
    loader = loaders.create(create_spoilt(1), num_workers=num_workers)
    loader.keep_faults(FaultLog(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"9 samples in a row of .*shard_00000\d\.tar 000.*Not a gzipped") as caught:
        take(loader, 1)
    assert "\n" not in str(caught.value)
    assert len(read_faults(FaultLog(tmp_path / "run"))) >= 9


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shard_that_vanishes_is_one_line(loaders: Loaders, dataset: Path, num_workers: int) -> None:
    (dataset.parent / "shard_000004.tar").unlink()
    with pytest.raises(ValueError, match=r"^Shard .*shard_000004\.tar, which .* lists, is missing\.$") as caught:
        take(loaders.create(dataset, num_workers=num_workers), 50)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["records", "samples"])
def test_shard_that_is_cut_off_while_it_is_read_is_named_with_the_row(
    loaders: Loaders,
    tmp_path: Path,
    write_records: Callable,
    write_samples: Callable,
    json_tokens: Callable,
    *,
    kind: str,
    num_workers: int,
) -> None:
    if kind == "records":
        manifest = write_records(tmp_path / "d", [4000], 9)
    else:
        manifest = write_samples(tmp_path / "d", [[json_tokens(range(9))] * 600])
    stream = loaders.create(manifest, num_workers=num_workers).microbatches(0)
    next(stream)
    os.truncate(tmp_path / "d" / "shard_000000.tar", 2000)
    message = r"^\S*shard_000000\.tar: the file is cut off \(while reading (record \d+|[0-9a-f]{32})\)\.$"
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(stream, 2000))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shard_that_cannot_be_opened_is_named(loaders: Loaders, dataset: Path, num_workers: int) -> None:
    shard = dataset.parent / "shard_000004.tar"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(ValueError, match=rf"^Shard {shard}, which {dataset} lists, is not a regular file\.$"):
        take(loaders.create(dataset, num_workers=num_workers), 50)


@pytest.mark.parametrize("call", ["read", "pread"])
def test_read_error_of_the_disk_is_named_and_drops_nothing(
    loaders: Loaders, dataset: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    stream = loaders.create(dataset).microbatches(0)
    next(stream)

    def fail(*arguments: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if call == "pread":
        monkeypatch.setattr(os, "pread", fail)
    else:
        monkeypatch.setattr("vla_foundry.data.reader.load_index", fail)
    with pytest.raises(ValueError, match=r"shard_\d+\.tar: Input/output error( \(while reading record \d+\))?\.$"):
        list(itertools.islice(stream, 2000))


def test_manifest_with_wrong_counts_is_refused_before_training(
    loaders: Loaders, tmp_path: Path, write_samples: Callable, json_tokens: Callable
) -> None:
    manifest = write_samples(tmp_path / "d", [[json_tokens(range(9))] * 32], claimed=512)
    with pytest.raises(ValueError, match=r"holds 32 samples, but .* says 512.*vla-foundry manifest build"):
        loaders.create(manifest)


def workers_of(loader: DataLoader) -> list[Any]:
    return loader._iterator._workers


def test_killed_process_is_one_line(loaders: Loaders, dataset: Path) -> None:
    loader = loaders.create(dataset, num_workers=1)
    stream = loader.microbatches(0)
    next(stream)
    os.kill(workers_of(loader)[0].pid, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"loader process died with exit code -9 .*memory.*data\.num_workers \(1\)"):
        list(itertools.islice(stream, 2000))


def test_processes_survive_signals_that_are_meant_for_the_trainer(loaders: Loaders, dataset: Path) -> None:
    loader = loaders.create(dataset, num_workers=1)
    stream = loader.microbatches(0)
    next(stream)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(workers_of(loader)[0].pid, number)
    assert len(list(itertools.islice(stream, 400))) == 400


def test_close_ends_the_processes(loaders: Loaders, dataset: Path) -> None:
    loader = loaders.create(dataset, num_workers=2)
    take(loader, 3)
    processes = workers_of(loader)
    assert all(process.is_alive() for process in processes)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 5
    assert not any(process.is_alive() for process in processes)
    # these would leave semaphores behind in a process that exits at once
    assert "QueueFeederThread" not in {thread.name for thread in threading.enumerate()}
    loader.close()


def test_trainers_random_numbers_are_left_alone(loaders: Loaders, dataset: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        take(loaders.create(dataset, num_workers=num_workers), 3)
    assert torch.equal(torch.get_rng_state(), before)


def order_of(loader: DataLoader) -> str:
    """The description of a loader's order, without the paths of its manifests."""
    description = loader.describe()
    rows = [{**row, "manifest": ""} for row in description["datasets"]]
    return json.dumps({**description, "datasets": rows}, sort_keys=True)


def test_description_tells_the_order_and_nothing_else(loaders: Loaders, dataset: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in dataset.parent.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    order = order_of(loaders.create(dataset))
    same = [
        loaders.create(moved / "manifest.jsonl"),
        loaders.create(dataset, rank=1, world_size=2, per_gpu_batch_size=4),
        loaders.create(dataset, num_workers=1, dataset_weighting=[7.0]),
    ]
    assert {order_of(loader) for loader in same} == {order}
    other = [
        loaders.create(dataset, seed=6),
        loaders.create(dataset, shuffle=False),
        loaders.create(dataset, shuffle_buffer_size=33),
        loaders.create(dataset, global_batch_size=16),
        loaders.create(dataset, dataset),
    ]
    assert len({order, *(order_of(loader) for loader in other)}) == 6


def test_changed_plan_is_refused_with_what_changed(loaders: Loaders, dataset: Path) -> None:
    saved = loaders.create(dataset).describe()
    # where the dataset lies on one machine tells nothing to others, but whose it is
    assert saved["datasets"][0]["manifest"] == f"{dataset.parent.name}/manifest.jsonl"
    loaders.create(dataset, rank=1, world_size=4).check_plan(saved)
    with pytest.raises(ValueError, match=r"hparams\.global_batch_size was 8, is 16.*--data\.accept_changed_data"):
        loaders.create(dataset, global_batch_size=16).check_plan(saved)
    with pytest.raises(ValueError, match=r"data\.seed was 5, is 6; data\.shuffle was True, is False"):
        loaders.create(dataset, seed=6, shuffle=False).check_plan(saved)
    with pytest.raises(ValueError, match="had 1 datasets, has 2"):
        loaders.create(dataset, dataset).check_plan(saved)
    lines = dataset.read_text(encoding="utf-8").splitlines()
    dataset.write_text("\n".join([*lines[1:], lines[0]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"dataset 0 .*manifest.jsonl\): list of shards .* changed"):
        loaders.create(dataset).check_plan(saved)
    dataset.write_text("\n".join(lines[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"number of shards was 7, is 6; .*number of samples was 100, is 80"):
        loaders.create(dataset).check_plan(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 9}, r"global_batch_size \(9\) must be a multiple of num_ranks \(1\) x"),
        ({"seq_len": 16}, r"data\.seq_len \(16\) must be at most .* \(8\)"),
    ],
)
def test_what_does_not_fit_is_refused(loaders: Loaders, dataset: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaders.create(dataset, **changes)


@pytest.mark.parametrize("listed", ["", "shard_"])
def test_a_manifest_may_name_shards_without_their_prefix(loaders: Loaders, dataset: Path, listed: str) -> None:
    expected = records(take(loaders.create(dataset), 10))
    for file in [*dataset.parent.glob("shard_*.tar"), *dataset.parent.glob("shard_*.index.json")]:
        if listed:
            file.rename(file.with_name(file.name.removeprefix("shard_")))
    text = dataset.read_text(encoding="utf-8").replace('"shard_', f'"{listed}')
    dataset.write_text(text, encoding="utf-8")
    assert records(take(loaders.create(dataset), 10)) == expected
    (dataset.parent / ("000001.tar" if listed else "shard_000001.tar")).unlink()
    with pytest.raises(ValueError, match=r"000001\.tar, which \S*manifest\.jsonl lists, is missing"):
        take(loaders.create(dataset, shuffle=False), 20)


def test_missing_manifest_is_named(loaders: Loaders, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/manifest\.jsonl"):
        loaders.create(tmp_path / "nowhere" / "manifest.jsonl")
    with pytest.raises(ValueError, match=r"data\.dataset_manifest is empty"):
        loaders.create()


def test_two_modalities_in_one_run_are_refused(loaders: Loaders, dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.dataset_modality must be the same"):
        loaders.create(dataset, dataset, dataset_modality=["text", "text_untokenized"], tokenizer="none")


PLUGIN = '''
"""A modality from outside the package."""

from dataclasses import dataclass

from vla_foundry.data import register_pipeline
from vla_foundry.data.pipelines.text import DEFAULT_STAGES, TextPipeline
from vla_foundry.params import register_data_params
from vla_foundry.params.data.text import TextDataParams


@register_data_params("shifted_text")
@dataclass(frozen=True, kw_only=True)
class ShiftedTextParams(TextDataParams):
    """Text of other tokens."""

    modalities = ("shifted_text",)


def shift(sample):
    """Add 1,000 to each token."""
    return {**sample, "input_ids": sample["input_ids"] + 1000}


@register_pipeline("shifted_text")
def create_shifted(params):
    """Create the pipeline."""
    return TextPipeline(params, stages=(*DEFAULT_STAGES, shift))
'''


def test_modality_from_outside_the_package_works_in_other_processes(
    loaders: Loaders, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shifted_text_plugin.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin = __import__("shifted_text_plugin")
    loader = loaders.create(dataset, num_workers=1, params_class=plugin.ShiftedTextParams)
    batches = take(loader, 2)
    assert batches[0]["modality"] == "shifted_text"
    assert records(batches) == [n + 1000 for n in records(take(loaders.create(dataset), 2))]


@pytest.mark.parametrize("has_index", [True, False])
def test_remote_dataset_gives_the_same_samples(
    loaders: Loaders,
    dataset: Path,
    tmp_path: Path,
    s3_folder: str,
    put_folder: Callable,
    has_index: bool,
) -> None:
    expected = records(take(loaders.create(dataset), 50))
    if has_index:
        assert list(dataset.parent.glob("*.index.json"))
    else:
        for path in dataset.parent.glob("*.index.json"):
            path.unlink()
    put_folder(dataset.parent, s3_folder)
    cache = DatasetCacheParams(cache_dir=str(tmp_path / "cache"), cache_size_gb=1e-3)
    loader = loaders.create(f"{s3_folder}/manifest.jsonl", num_workers=2, dataset_cache=cache)
    assert records(take(loader, 50)) == expected
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 7
    assert len(list((tmp_path / "cache").glob("*.index.json"))) == 7


def test_remote_dataset_works_with_a_cache_that_holds_little_of_it(
    loaders: Loaders, tmp_path: Path, write_records: Callable, s3_folder: str, put_folder: Callable
) -> None:
    manifest = write_records(tmp_path / "d", [10] * 10, 9, with_checksums=True)
    put_folder(manifest.parent, s3_folder)
    size = os.path.getsize(manifest.parent / "shard_000000.tar")
    cache = DatasetCacheParams(cache_dir=str(tmp_path / "cache"), cache_size_gb=3.5 * size / 1e9)
    loader = loaders.create(f"{s3_folder}/manifest.jsonl", num_workers=1, dataset_cache=cache)
    assert sorted(records(take(loader, 50))) == list(range(100))
    assert len(list((tmp_path / "cache").glob("*.tar"))) <= 3
