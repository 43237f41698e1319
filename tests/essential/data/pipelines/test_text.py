"""Tokenized text: records and lists of tokens become rows with masks and documents."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from tests.essential.text_rows import create_rows, lengths_by_row, read
from vla_foundry.data.pipelines import WebDatasetStage
from vla_foundry.data.pipelines.text import DEFAULT_STAGES, TextPipeline, create_text_batch, decode_json_tokens
from vla_foundry.data.reader import ShardReader
from vla_foundry.params.data.text import TextDataParams


def test_records_become_rows_with_masks_and_documents(tmp_path: Path, write_records: Callable) -> None:
    manifest = write_records(tmp_path / "d", [2, 2], 9, documents=[[9], [2, 5, 9], [4, 7], [3]])
    batch = read(TextPipeline(TextDataParams(seq_len=8)), create_rows([manifest], [2, 0, 3, 1]))
    assert batch["input_ids"].dtype == np.int32
    assert batch["input_ids"].tolist() == [list(range(n, n + 9)) for n in (2, 0, 3, 1)]
    assert lengths_by_row(batch["documents"]) == [[4, 3, -2], [9], [3, -6], [2, 3, 4]]
    targets = [np.flatnonzero(row).tolist() for row in batch["target_mask"]]
    assert targets == [[1, 2, 3, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2], [1, 3, 4, 6, 7, 8]]


def test_without_document_masks_only_padding_and_place_zero_are_no_targets(
    tmp_path: Path, write_records: Callable
) -> None:
    manifest = write_records(tmp_path / "d", [2], 9, documents=[[2, 5, 9], [4, 7]])
    batch = read(TextPipeline(TextDataParams(seq_len=8, mask_documents=False)), create_rows([manifest], [0, 1]))
    assert "documents" not in batch
    assert [np.flatnonzero(row).tolist() for row in batch["target_mask"]] == [list(range(1, 9)), list(range(1, 7))]


def test_a_batch_of_many_shards_opens_few_files_at_a_time(
    tmp_path: Path, write_records: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may open only so many files: macOS gives 256."""
    rows = create_rows([write_records(tmp_path / "d", [1] * 60, 9)], range(60))
    num_open = [len(os.listdir("/proc/self/fd"))]
    real_open = ShardReader.open

    def count(reader: ShardReader, dataset: int, shard: int) -> Any:
        num_open.append(len(os.listdir("/proc/self/fd")))
        return real_open(reader, dataset, shard)

    monkeypatch.setattr("resource.getrlimit", lambda kind: (20, 20))
    monkeypatch.setattr(ShardReader, "open", count)
    batch = TextPipeline(TextDataParams(seq_len=8)).create_batch(rows)
    assert batch["input_ids"][:, 0].tolist() == list(range(60))
    assert max(num_open) <= num_open[0] + 12


def test_token_ids_beyond_the_vocabulary_are_dropped_and_named(tmp_path: Path, write_records: Callable) -> None:
    manifest = write_records(tmp_path / "d", [8], 9)  # record n holds n ... n + 8
    rows = create_rows([manifest], [0, 1, 2])
    batch = read(TextPipeline(TextDataParams(seq_len=8, vocab_size=10)), rows)
    assert batch["input_ids"].max() < 10
    assert batch["input_ids"][:2, 0].tolist() == [0, 1]
    assert set(rows.drops.counts) == {"unknown token"}
    assert "is not one of the model's 10" in rows.drops.last
    assert str(manifest.with_name("shard_000000.tar")) in rows.drops.last


def test_ids_of_32_bits_do_not_wrap(tmp_path: Path, write_records: Callable) -> None:
    rows = create_rows([write_records(tmp_path / "d", [1], 9, dtype="uint32", first_token=2**31)], [0])
    with pytest.raises(ValueError, match=r"9 samples in a row .*unknown token: token 2147483656 is not"):
        read(TextPipeline(TextDataParams(seq_len=8)), rows)


def test_samples_of_a_damaged_shard_are_replaced_and_counted(tmp_path: Path, write_records: Callable) -> None:
    manifest = write_records(tmp_path / "d", [4, 4], 9, with_checksums=True)
    tar = tmp_path / "d" / "shard_000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"num_sequences", b"num_sequencez"))
    rows = create_rows([manifest], range(8))
    batch = read(TextPipeline(TextDataParams(seq_len=8)), rows)
    assert batch["input_ids"][4:, 0].tolist() == [4, 5, 6, 7]
    assert (batch["input_ids"][:4, 0] >= 4).all()
    assert set(rows.drops.counts) == {"damaged shard"}
    assert rows.drops.last.startswith(str(tar))


@pytest.mark.parametrize("seed", range(5))
def test_masks_equal_a_plain_computation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_rows, length = 6, 20
    ends = [np.unique(rng.integers(1, length + 1, rng.integers(1, 6))).astype(np.uint32) for _ in range(num_rows)]
    batch = create_text_batch(np.zeros((num_rows, length), dtype=np.int32), ends, mask_documents=True)
    for row, row_ends in enumerate(ends):
        document_of_token = [int((row_ends <= place).sum()) for place in range(length)]
        for place in range(length):
            is_target = 0 < place < row_ends[-1] and document_of_token[place] == document_of_token[place - 1]
            assert batch["target_mask"][row, place] == is_target
    documents = batch["documents"]
    assert all(sum(abs(n) for n in row) == length for row in lengths_by_row(documents))
    assert (documents.lengths > 0).all()


def test_json_lists_become_rows(tmp_path: Path, write_samples: Callable, json_tokens: Callable) -> None:
    manifest = write_samples(tmp_path / "d", [[json_tokens(range(n, n + 9)) for n in range(3)]])
    batch = read(TextPipeline(TextDataParams(seq_len=8)), create_rows([manifest], [2, 0]))
    assert batch["input_ids"].tolist() == [list(range(2, 11)), list(range(9))]
    assert "documents" not in batch  # boundaries are not known
    assert batch["target_mask"][:, 1:].all()
    assert not batch["target_mask"][:, 0].any()


def test_records_and_json_lists_mix(
    tmp_path: Path, write_records: Callable, write_samples: Callable, json_tokens: Callable
) -> None:
    records = write_records(tmp_path / "r", [4], 9, documents=[[4, 9]] * 4)
    lists = write_samples(tmp_path / "j", [[json_tokens([7] * 9)] * 4])
    batch = read(TextPipeline(TextDataParams(seq_len=8)), create_rows([records, lists], range(4)))
    is_list = (batch["input_ids"] == 7).all(axis=1)
    assert is_list.sum() == 2
    assert [row == [9] for row in lengths_by_row(batch["documents"])] == is_list.tolist()


@pytest.mark.parametrize("kind", ["records", "lists"])
def test_longer_seq_len_is_refused_at_the_start(
    tmp_path: Path, write_records: Callable, write_samples: Callable, json_tokens: Callable, kind: str
) -> None:
    if kind == "records":
        manifest = write_records(tmp_path / "d", [1], 9)
    else:
        manifest = write_samples(tmp_path / "d", [[json_tokens(range(9))]])
    rows = create_rows([manifest], [0])
    with pytest.raises(ValueError, match=r"data\.seq_len \(9\) must be at most that of .* \(8\)"):
        TextPipeline(TextDataParams(seq_len=9)).pieces_per_row(rows.reader)


def test_longer_records_are_cut_into_pieces(tmp_path: Path, write_records: Callable) -> None:
    manifest = write_records(tmp_path / "d", [2], 9, documents=[[2, 5, 9], [3]])
    pipeline = TextPipeline(TextDataParams(seq_len=3))
    rows = create_rows([manifest], range(6), pieces=[3])
    assert pipeline.pieces_per_row(rows.reader) == [3]
    batch = pipeline.create_batch(rows)
    # the last two of 8 targets are a piece with padding
    assert batch["input_ids"].tolist()[:3] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 0]]
    assert lengths_by_row(batch["documents"]) == [[2, 2], [2, 2], [3, -1], [3, -1], [-4], [-4]]
    targets = [np.flatnonzero(row).tolist() for row in batch["target_mask"]]
    assert targets == [[1, 3], [1, 3], [1, 2], [1, 2], [], []]
    unmasked = TextPipeline(TextDataParams(seq_len=3, mask_documents=False))
    targets = [np.flatnonzero(row).tolist() for row in read(unmasked, rows)["target_mask"]]
    assert targets == [[1, 2, 3], [1, 2, 3], [1, 2], [1, 2], [], []]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("seq_len", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("kind", ["records", "lists", "stages"])
def test_pieces_have_each_target_of_a_record_once(
    tmp_path: Path, write_records: Callable, write_samples: Callable, json_tokens: Callable,
    kind: str, seq_len: int, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    ends = [np.unique(rng.integers(1, 10, rng.integers(1, 5))).tolist() for _ in range(4)]
    if kind == "lists":
        manifest = write_samples(tmp_path / "d", [[json_tokens(range(n, n + 9)) for n in range(4)]])
        ends = [[9]] * 4
    else:
        manifest = write_records(tmp_path / "d", [4], 9, documents=ends)
    stages = (*DEFAULT_STAGES, lambda sample: sample) if kind == "stages" else DEFAULT_STAGES
    pipeline = TextPipeline(TextDataParams(seq_len=seq_len), stages)
    count = -(-8 // seq_len)
    batch = read(pipeline, create_rows([manifest], range(4 * count), pieces=[count]))
    assert batch["input_ids"].shape == (4 * count, seq_len + 1)
    found = []
    for piece, (ids, mask) in enumerate(zip(batch["input_ids"], batch["target_mask"], strict=True)):
        found += [(piece // count, int(token)) for token in ids[mask]]
    expected = [
        (record, record + place)
        for record in range(4)
        for place in range(1, ends[record][-1])
        if place not in ends[record]
    ]
    assert found == expected
    if "documents" in batch:
        assert (batch["documents"].lengths > 0).all()
        assert all(sum(abs(n) for n in row) == seq_len + 1 for row in lengths_by_row(batch["documents"]))


BROKEN = {
    "not gzip": {"json.gz": b"[1, 2, 3]"},
    "cut off": {"json.gz": gzip.compress(json.dumps(list(range(9))).encode())[:15]},
    "not json": {"json.gz": gzip.compress(b"{")},
    "not tokens": {"json.gz": gzip.compress(b'["a", 1, 2, 3, 4, 5, 6, 7, 8]')},
    "negative": {"json.gz": gzip.compress(b"[-1, 1, 2, 3, 4, 5, 6, 7, 8]")},
    "too large": {"json.gz": gzip.compress(b"[4294967296, 1, 2, 3, 4, 5, 6, 7, 8]")},
    "fractions": {"json.gz": gzip.compress(b"[0.5, 1, 2, 3, 4, 5, 6, 7, 8]")},
    "nested": {"json.gz": gzip.compress(b"[[0, 1, 2, 3, 4, 5, 6, 7, 8]]")},
    "ragged": {"json.gz": gzip.compress(b"[[0], 1, 2, 3, 4, 5, 6, 7, 8]")},
    "empty": {"json.gz": gzip.compress(b"[]")},
    "too short": {"json.gz": gzip.compress(b"[1, 2, 3]")},
    "no member": {"txt": b"text"},
}


@pytest.mark.parametrize("fault", list(BROKEN))
def test_broken_sample_is_replaced_and_counted(
    tmp_path: Path, write_samples: Callable, json_tokens: Callable, fault: str
) -> None:
    good = [json_tokens(range(n, n + 9)) for n in range(20)]
    manifest = write_samples(tmp_path / "d", [[*good[:10], BROKEN[fault], *good[11:]]])
    batches = []
    for positions in ([9, 10, 11], [10]):
        rows = create_rows([manifest], positions)
        batches.append(read(TextPipeline(TextDataParams(seq_len=8)), rows)["input_ids"])
        assert rows.drops.counts.total() == 1
        assert "shard_000000.tar" in rows.drops.last
        assert f"0000{10:028x}" in rows.drops.last
    assert batches[0][[0, 2], 0].tolist() == [9, 11]
    assert batches[0][1].tolist() == batches[1][0].tolist()  # the same stand-in, in whatever company
    assert batches[1][0, 0] in range(20)


def test_a_small_member_that_inflates_without_end_is_named() -> None:
    member = gzip.compress(b"[" + b" " * (1 << 27) + b"1]", compresslevel=1)
    with pytest.raises(ValueError, match=r"its json\.gz has 67,108,865 bytes of JSON; at most 67,108,864 are read"):
        decode_json_tokens({"json.gz": member})


def test_unreadable_dataset_stops_at_once_with_shard_and_member(tmp_path: Path, write_samples: Callable) -> None:
    manifest = write_samples(tmp_path / "d", [[BROKEN["not gzip"]] * 50] * 3)
    with pytest.raises(ValueError, match=r"9 samples in a row of .*manifest\.jsonl .*shard_00000\d\.tar 000"):
        read(TextPipeline(TextDataParams(seq_len=8)), create_rows([manifest], [0]))


def keep_even(sample: dict[str, Any]) -> dict[str, Any] | None:
    """Drop samples that begin with an odd token."""
    return sample if sample["input_ids"][0] % 2 == 0 else None


@pytest.mark.parametrize("kind", ["records", "lists"])
def test_users_stage_may_drop_samples(
    tmp_path: Path, write_records: Callable, write_samples: Callable, json_tokens: Callable, kind: str
) -> None:
    if kind == "records":
        manifest = write_records(tmp_path / "d", [40], 9, documents=[[4, 9]] * 40)
    else:
        manifest = write_samples(tmp_path / "d", [[json_tokens(range(n, n + 9)) for n in range(40)]])
    rows = create_rows([manifest], range(8), global_batch_size=8)
    batch = read(TextPipeline(TextDataParams(seq_len=8), stages=(*DEFAULT_STAGES, keep_even)), rows)
    assert (batch["input_ids"][:, 0] % 2 == 0).all()
    assert batch["input_ids"][::2, 0].tolist() == [0, 2, 4, 6]
    assert rows.drops.counts["keep_even: dropped"] >= 4
    assert ("documents" in batch) == (kind == "records")


def test_webdataset_stage_fits_in(tmp_path: Path, write_samples: Callable, json_tokens: Callable) -> None:
    manifest = write_samples(tmp_path / "d", [[json_tokens(range(n, n + 9)) for n in range(3)]])
    decode = WebDatasetStage(wds.decode())  # pyright: ignore[reportAttributeAccessIssue]

    def rename(sample: dict[str, Any]) -> dict[str, Any]:
        return {"__key__": sample["__key__"], "input_ids": np.asarray(sample["json.gz"], dtype=np.int32)}

    batch = read(TextPipeline(TextDataParams(seq_len=8), stages=(decode, rename)), create_rows([manifest], [1]))
    assert batch["input_ids"].tolist() == [list(range(1, 10))]
