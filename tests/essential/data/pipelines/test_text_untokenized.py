"""Raw text is tokenized and packed; each token is a target once."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.essential.text_rows import create_rows, lengths_by_row, read
from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.text import TextPipeline
from vla_foundry.data.pipelines.text_untokenized import (
    TextUntokenizedPipeline,
    decode_text,
    drop_empty,
    pack,
    split_document,
)
from vla_foundry.data.reader import Dropped
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.text.tokenizers import create_encoder, load_tokenizer


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


def raw_text(**params: Any) -> TextDataParams:
    """Params of a dataset of raw text."""
    return TextDataParams(dataset_manifest=["manifest.jsonl"], dataset_modality=["text_untokenized"], **params)


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
    params = raw_text(seq_len=128, tokenizer=tokenizer)
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
        params = raw_text(seq_len=64, tokenizer=tokenizer, mask_documents=mask_documents)
        batch = read(TextUntokenizedPipeline(params), create_rows([manifest], [0]))
        assert batch["input_ids"].shape == (16, 65)
        assert batch["target_mask"].sum() == 1000  # 1,001 tokens with the end; the first has no predecessor
        assert ("documents" in batch) == mask_documents


def test_no_token_is_a_target_twice_where_ends_of_texts_share_a_row(
    tmp_path: Path, write_samples: Callable, tokenizer: str
) -> None:
    manifest = write_samples(tmp_path / "d", [[text_members("a" * 80, "json")] * 2])
    for mask_documents in (True, False):
        params = raw_text(seq_len=64, tokenizer=tokenizer, mask_documents=mask_documents)
        batch = read(TextUntokenizedPipeline(params), create_rows([manifest], [0, 1]))
        assert batch["input_ids"].shape == (3, 65)  # 65, 65, and 17 + 17 tokens
        assert batch["target_mask"].sum() == 2 * 80


def test_part_of_a_document_has_no_end_token(tmp_path: Path, write_samples: Callable, tokenizer: str) -> None:
    parts = [{"text": "one", "is_last": False}, {"text": "two", "is_last": True}]
    manifest = write_samples(tmp_path / "d", [[{"json": json.dumps(part).encode()} for part in parts]])
    params = raw_text(seq_len=64, tokenizer=tokenizer)
    documents = documents_of(read(TextUntokenizedPipeline(params), create_rows([manifest], [0, 1])))
    assert sorted(document[-1] == EOS for document in documents) == [False, True]
    # blanks that end a long document are a part of it
    for part in ({"text": "\n", "is_last": False}, {"text": " \n", "part": 1, "is_last": True}):
        sample = decode_text({"json": json.dumps(part).encode()})
        assert drop_empty(sample) == sample
    assert drop_empty(decode_text({"json": b'{"text": " ", "part": 0, "is_last": true}'})) is None


@pytest.mark.parametrize("member", [{"json": b'{"text": 5}'}, {"json": b"{broken"}, {"json": b"  "}, {"png": b""}])
def test_bad_texts_are_replaced(
    tmp_path: Path, write_samples: Callable, tokenizer: str, member: dict[str, bytes]
) -> None:
    manifest = write_samples(tmp_path / "d", [[member, *[text_members("good", "json")] * 20]])
    rows = create_rows([manifest], [0])
    batch = read(
        TextUntokenizedPipeline(raw_text(seq_len=64, tokenizer=tokenizer)),
        rows,
    )
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
    for content, reason in ((rb'{"text": "red \ud800"}', "not Unicode"), (b'{"text": ' + b"[" * 100_000, "bad JSON")):
        with pytest.raises(Dropped) as dropped:
            decode_text({"json": content})
        assert dropped.value.reason == reason


def test_words_of_control_tokens_stay_words(tmp_path: Path, write_samples: Callable, tokenizer: str) -> None:
    text = "a <|endoftext|> b"
    assert load_tokenizer(tokenizer).eos_token == "<|endoftext|>"
    manifest = write_samples(tmp_path / "d", [[text_members(text, "json")]])
    params = raw_text(seq_len=64, tokenizer=tokenizer)
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
    read(
        TextUntokenizedPipeline(raw_text(seq_len=64, tokenizer=tokenizer)),
        rows,
    )
    assert "preprocess text_untokenized" in rows.drops.last


def test_rows_depend_on_the_samples_of_the_microbatch_alone(
    tmp_path: Path, write_samples: Callable, tokenizer: str
) -> None:
    texts = [text_members("word " * n, "json") for n in range(1, 30)]
    manifest = write_samples(tmp_path / "d", [texts])
    pipeline = TextUntokenizedPipeline(raw_text(seq_len=128, tokenizer=tokenizer))
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
    params = raw_text(seq_len=32, tokenizer=tokenizer, mask_documents=mask_documents)
    for pipeline in (TextPipeline(params), TextUntokenizedPipeline(params)):
        batch = pipeline.create_empty_batch()
        assert batch["input_ids"].shape == batch["target_mask"].shape == (1, 33)
        assert not batch["target_mask"].any()
        assert not mask_documents or lengths_by_row(batch["documents"]) == [[-33]]


def test_raw_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer is missing"):
        TextUntokenizedPipeline(raw_text(seq_len=32))
