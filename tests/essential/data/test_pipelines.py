"""Pipelines: what a microbatch of text is made of."""

import gzip
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from vla_foundry.batch import Batch, Documents
from vla_foundry.data.cache import ShardCache
from vla_foundry.data.pipelines.stages import Pipeline, Rows, WebDatasetStage
from vla_foundry.data.pipelines.text import DEFAULT_STAGES, TextPipeline, create_text_batch
from vla_foundry.data.pipelines.text_untokenized import TextUntokenizedPipeline, decode_text, pack, split_document
from vla_foundry.data.plan import SamplePlan
from vla_foundry.data.reader import Dataset, ShardReader
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.shards import parse_manifest
from vla_foundry.text.tokenizers import create_encoder, load_tokenizer


def create_rows(manifests: Sequence[Path], positions: Sequence[int], *, global_batch_size: int = 4) -> Rows:
    datasets = [
        Dataset(manifest=str(m), modality="text", entries=tuple(parse_manifest(m.read_text(encoding="utf-8"), str(m))))
        for m in manifests
    ]
    sizes = [[entry.num_sequences for entry in dataset.entries] for dataset in datasets]
    plan = SamplePlan(
        sizes, [1.0] * len(sizes), seed=0, global_batch_size=global_batch_size, block_size=100, shuffle=False
    )
    at = np.asarray(positions)
    reader = ShardReader(datasets, ShardCache(str(manifests[0].parent / "cache"), 10**9))
    return Rows(at, plan.locate(at), plan, reader)


def read(pipeline: Pipeline, rows: Rows) -> Batch:
    pipeline.check(rows.reader)
    return pipeline.create_batch(rows)


def lengths_by_row(documents: Documents) -> list[list[int]]:
    """Lengths of each row's segments; those of padding are negative."""
    signed = np.where(documents.is_padding, -documents.lengths, documents.lengths)
    return [part.tolist() for part in np.split(signed, np.cumsum(documents.num_per_row)[:-1])]


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


@pytest.mark.parametrize("seq_len", [7, 9])
@pytest.mark.parametrize("kind", ["records", "lists"])
def test_other_seq_len_is_refused_at_the_start(
    tmp_path: Path, write_records: Callable, write_samples: Callable, json_tokens: Callable, kind: str, seq_len: int
) -> None:
    if kind == "records":
        manifest = write_records(tmp_path / "d", [1], 9)
    else:
        manifest = write_samples(tmp_path / "d", [[json_tokens(range(9))]])
    rows = create_rows([manifest], [0])
    with pytest.raises(ValueError, match=rf"data\.seq_len \({seq_len}\) must equal that of .* \(8\)"):
        TextPipeline(TextDataParams(seq_len=seq_len)).check(rows.reader)


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of one token per byte, with an end-of-sequence token 256."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(str(folder))
    return str(folder)


EOS = 256


def documents_of(batch: Batch) -> list[list[int]]:
    """The token lists of all documents in a batch, in order of rows."""
    found = []
    for row, lengths in zip(batch["input_ids"], lengths_by_row(batch["documents"]), strict=True):
        place = 0
        for length in lengths:
            if length > 0:
                found.append(row[place : place + length].tolist())
            place += abs(length)
    return found


def text_members(text: str, kind: str) -> dict[str, bytes]:
    contents = {"json": json.dumps({"text": text}).encode(), "plain": text.encode(), "txt": text.encode()}
    return {"txt" if kind == "txt" else "json": contents[kind]}


@pytest.mark.parametrize("kind", ["json", "plain", "txt"])
def test_texts_are_tokenized_packed_and_ended(
    tmp_path: Path, write_samples: Callable, tokenizer: str, kind: str
) -> None:
    texts = ["ab" * 20, "é", "the end. " * 9, "x"]
    manifest = write_samples(tmp_path / "d", [[text_members(text, kind) for text in texts]])
    params = TextDataParams(seq_len=128, tokenizer=tokenizer)
    batch = read(TextUntokenizedPipeline(params), create_rows([manifest], range(4)))
    assert batch["input_ids"].shape == (1, 129)
    documents = documents_of(batch)
    assert sorted(len(document) for document in documents) == sorted(len(text.encode()) + 1 for text in texts)
    assert all(document[-1] == EOS and EOS not in document[:-1] for document in documents)
    # all but each document's first token are targets
    assert batch["target_mask"].sum() == sum(len(document) - 1 for document in documents)


def test_every_token_of_a_long_text_is_a_target_once(tmp_path: Path, write_samples: Callable, tokenizer: str) -> None:
    text = "".join(chr(97 + n % 26) for n in range(1000))
    manifest = write_samples(tmp_path / "d", [[text_members(text, "json"), text_members("short", "json")]])
    for mask_documents in (True, False):
        params = TextDataParams(seq_len=64, tokenizer=tokenizer, mask_documents=mask_documents)
        batch = read(TextUntokenizedPipeline(params), create_rows([manifest], [0]))
        assert batch["input_ids"].shape == (16, 65)
        assert batch["target_mask"].sum() == 1000  # 1,001 tokens with the end; the first has no predecessor
        assert ("documents" in batch) == mask_documents


def test_no_token_is_a_target_twice_where_ends_of_texts_share_a_row(
    tmp_path: Path, write_samples: Callable, tokenizer: str
) -> None:
    manifest = write_samples(tmp_path / "d", [[text_members("a" * 80, "json")] * 2])
    for mask_documents in (True, False):
        params = TextDataParams(seq_len=64, tokenizer=tokenizer, mask_documents=mask_documents)
        batch = read(TextUntokenizedPipeline(params), create_rows([manifest], [0, 1]))
        assert batch["input_ids"].shape == (3, 65)  # 65, 65, and 17 + 17 tokens
        assert batch["target_mask"].sum() == 2 * 80


def test_part_of_a_document_has_no_end_token(tmp_path: Path, write_samples: Callable, tokenizer: str) -> None:
    parts = [{"text": "one", "is_last": False}, {"text": "two", "is_last": True}]
    manifest = write_samples(tmp_path / "d", [[{"json": json.dumps(part).encode()} for part in parts]])
    params = TextDataParams(seq_len=64, tokenizer=tokenizer)
    documents = documents_of(read(TextUntokenizedPipeline(params), create_rows([manifest], [0, 1])))
    assert sorted(document[-1] == EOS for document in documents) == [False, True]


@pytest.mark.parametrize("member", [{"json": b'{"text": 5}'}, {"json": b"{broken"}, {"json": b"  "}, {"png": b""}])
def test_bad_texts_are_replaced(
    tmp_path: Path, write_samples: Callable, tokenizer: str, member: dict[str, bytes]
) -> None:
    manifest = write_samples(tmp_path / "d", [[member, *[text_members("good", "json")] * 20]])
    rows = create_rows([manifest], [0])
    batch = read(TextUntokenizedPipeline(TextDataParams(seq_len=64, tokenizer=tokenizer)), rows)
    assert len(documents_of(batch)[0]) == 5
    assert rows.drops.counts.total() == 1


@pytest.mark.parametrize("before", ["", "\ufeff", "\n", " "])
def test_json_is_read_as_json_whatever_stands_before_it(before: str) -> None:
    assert decode_text({"json": f'{before}{{"text": "red block"}}'.encode()})["text"] == "red block"
    assert decode_text({"json": f'{before}"red block"'.encode()})["text"] == "red block"
    for other in ('["red block"]', '{"txt": "red block"}'):
        with pytest.raises(ValueError, match="its JSON has no key 'text' with a string"):
            decode_text({"json": (before + other).encode()})
    for plain in ('"Stop!" it said', "[1] is cited", "12"):
        assert decode_text({"json": plain.encode()})["text"] == plain
    assert decode_text({"txt": "\ufeffred {block}".encode()})["text"] == "red {block}"


def test_words_of_control_tokens_stay_words(tmp_path: Path, write_samples: Callable, tokenizer: str) -> None:
    text = "a <|endoftext|> b"
    assert load_tokenizer(tokenizer).eos_token == "<|endoftext|>"
    manifest = write_samples(tmp_path / "d", [[text_members(text, "json")]])
    params = TextDataParams(seq_len=64, tokenizer=tokenizer)
    (document,) = documents_of(read(TextUntokenizedPipeline(params), create_rows([manifest], [0])))
    encoder = create_encoder(
        (Path(tokenizer) / "tokenizer.json").read_text(encoding="utf-8")
    )  # that of `preprocess text`
    assert document == [*encoder.encode(text, add_special_tokens=False).ids, EOS]
    assert document.count(EOS) == 1


def test_text_that_would_fill_the_memory_is_refused_with_the_fix(
    tmp_path: Path, write_samples: Callable, tokenizer: str
) -> None:
    manifest = write_samples(tmp_path / "d", [[text_members("a" * 40_000, "json"), text_members("b", "json")]])
    rows = create_rows([manifest], [0])
    read(TextUntokenizedPipeline(TextDataParams(seq_len=64, tokenizer=tokenizer)), rows)
    assert "preprocess text_untokenized" in rows.drops.last


def test_rows_depend_on_the_samples_of_the_microbatch_alone(
    tmp_path: Path, write_samples: Callable, tokenizer: str
) -> None:
    texts = [text_members("word " * n, "json") for n in range(1, 30)]
    manifest = write_samples(tmp_path / "d", [texts])
    pipeline = TextUntokenizedPipeline(TextDataParams(seq_len=128, tokenizer=tokenizer))
    first = read(pipeline, create_rows([manifest], range(4, 8)))
    read(pipeline, create_rows([manifest], range(8)))
    copy = pickle.loads(pickle.dumps(pipeline))
    again = read(copy, create_rows([manifest], range(4, 8)))
    assert np.array_equal(first["input_ids"], again["input_ids"])


@pytest.mark.parametrize("seq_len", [64, 100, 2048])
@pytest.mark.parametrize("seed", range(4))
def test_packing_places_each_piece_once_within_its_row(seed: int, seq_len: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, seq_len + 2, rng.integers(1, 40)).tolist()
    length, rows = pack(lengths, seq_len)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= length for row in rows)
    assert length == seq_len + 1 or (length - 1) % 64 == 0
    assert length <= seq_len + 1
    # one row per piece, as long as the longest, is never better
    longest = min(-(-(max(lengths) - 1) // 64) * 64, seq_len) + 1 if max(lengths) > 1 else min(64, seq_len) + 1
    assert length * len(rows) <= longest * len(lengths)


def test_packing_wastes_little() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 700, 64).tolist()
    length, rows = pack(lengths, 2048)
    assert sum(lengths) / (length * len(rows)) > 0.95


@pytest.mark.parametrize("num_tokens", [1, 2, 64, 65, 66, 129, 130, 500])
def test_pieces_of_a_document_overlap_by_one_token(num_tokens: int) -> None:
    pieces = split_document(np.arange(num_tokens), 64)
    assert all(len(piece.tokens) <= 65 for piece in pieces)
    assert [piece.is_continued for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    rest = [token for piece in pieces for token in piece.tokens[piece.is_continued :].tolist()]
    assert rest == list(range(num_tokens))


@pytest.mark.parametrize("mask_documents", [True, False])
def test_empty_microbatch_has_nothing_to_learn(tokenizer: str, mask_documents: bool) -> None:
    params = TextDataParams(seq_len=32, tokenizer=tokenizer, mask_documents=mask_documents)
    for pipeline in (TextPipeline(params), TextUntokenizedPipeline(params)):
        batch = pipeline.create_empty_batch()
        assert batch["input_ids"].shape == batch["target_mask"].shape == (1, 33)
        assert not batch["target_mask"].any()
        assert not mask_documents or lengths_by_row(batch["documents"]) == [[-33]]


def test_raw_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer is missing"):
        TextUntokenizedPipeline(TextDataParams(seq_len=32))
