"""Tokenizers are loaded from folders, saved, and measured without importing what is heavy."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vla_foundry.text.tokenizers import (
    Vocabulary,
    decode_continuation,
    load_tokenizer,
    pad_token_id_of,
    read_end_token_ids,
    read_vocabulary,
)


def create_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", **special)


def test_a_saved_tokenizer_loads_with_its_special_tokens(tmp_path: Path) -> None:
    create_tokenizer(eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert tokenizer("a b c")["input_ids"] == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<end>", 3)


def test_vocab_size_counts_added_tokens_and_imports_nothing_heavy(tmp_path: Path) -> None:
    create_tokenizer(eos_token="<end>").save_pretrained(tmp_path)
    assert read_vocabulary(tmp_path).size == 4
    code = (
        "import sys; from vla_foundry.text.tokenizers import read_vocabulary; "
        f"assert read_vocabulary({str(tmp_path)!r}).size == 4; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_vocab_size_of_a_unigram_model(tmp_path: Path) -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(tmp_path).size == 3


@pytest.mark.parametrize(
    ("special", "expected"),
    [({"pad_token": "<pad>", "eos_token": "<end>"}, "<pad>"), ({"eos_token": "<end>"}, "<end>")],
)
def test_rows_are_filled_with_padding_or_else_the_end(special: dict[str, str], expected: str) -> None:
    tokenizer = create_tokenizer(**special)
    assert pad_token_id_of(tokenizer) == tokenizer.convert_tokens_to_ids(expected)
    assert pad_token_id_of(create_tokenizer()) == 0


def test_a_continuation_keeps_its_first_space() -> None:
    backend = Tokenizer(models.WordLevel({"▁red": 0, "▁block": 1, "s": 2, "<end>": 3}, unk_token="s"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    assert tokenizer.decode([0, 1]) == "red block"
    assert decode_continuation(tokenizer, [0], [1, 2]) == " blocks"
    assert decode_continuation(tokenizer, [0], [2]) == "s"
    assert decode_continuation(tokenizer, [], [0]) == "red"
    assert decode_continuation(tokenizer, [0], []) == ""


@pytest.mark.parametrize(
    ("content", "ids"), [(None, []), ('{"eos_token_id": 3}', [3]), ('{"eos_token_id": [3, 7]}', [3, 7]), ("{}", [])]
)
def test_end_tokens_are_one_or_several(tmp_path: Path, content: str | None, ids: list[int]) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    assert read_end_token_ids(tmp_path) == ids


@pytest.mark.parametrize("content", ["", "\x00\x00", "[]", "{}", '{"model": 3}', '{"model": {"vocab": [1, 2]}}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/tokenizer\.json (is not|holds no) "):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"eos_token_id": "x"}'])
def test_damaged_end_tokens_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/generation_config\.json"):
        read_end_token_ids(tmp_path)


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        read_vocabulary(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_tokenizer("no-such-owner/no-such-tokenizer")
    assert "\n" not in str(caught.value)


WORDS = {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, None),
        ({"ids": WORDS | {"<image>": 3}, "special": frozenset({"a", "<image>"})}, None),
        ({"chat_template": "{{ x }}"}, None),
        ({"ids": {"a": 0, "c": 1, "b": 2}}, "token 1 is 'b' in the one and 'c' in the other"),
        ({"ids": {"a": 0, "b": 1, "c": 7}}, "'c' is token 2 in the one and token 7 in the other"),
        ({"rules": ("a b", "c b")}, "merge or score 1 is 'b c' in the one and 'c b' in the other"),
        ({"rules": ("a b",)}, "the one has 2 merges and the other 1"),
        ({"special": frozenset({"a", "b"})}, "'b' is a special token of one of them only"),
    ],
)
def test_two_vocabularies_differ_where_the_same_text_becomes_other_ids(
    changes: dict[str, Any], difference: str | None
) -> None:
    one = Vocabulary(ids=WORDS, rules=("a b", "b c"), special=frozenset({"a"}))
    other = replace(one, **changes)
    assert one.find_difference(other) == difference
    assert (other.find_difference(one) is None) == (difference is None)
    assert (one.to_record() == other.to_record()) == (not changes)
    # what a checkpoint keeps tells them apart too
    kept = Vocabulary.from_record(json.loads(json.dumps(one.to_record())))
    assert (kept.find_difference(other) is None) == (difference is None)
    assert (other.find_difference(kept) is None) == (difference is None)


def test_the_layout_of_a_tokenizer_file_does_not_change_its_vocabulary(tmp_path: Path) -> None:
    tokens = [{"id": 3, "content": "<eos>", "special": True}]
    for name, merges, added, config in (
        ("a", ["a b"], tokens, {"chat_template": "{{ x }}"}),
        ("b", [["a", "b"]], [], {"eos_token": {"content": "<eos>"}}),
    ):
        model = {"type": "BPE", "merges": merges, "vocab": WORDS | ({} if added else {"<eos>": 3})}
        (tmp_path / name).mkdir()
        content = json.dumps({"model": model, "added_tokens": added}, indent=None if added else 2)
        (tmp_path / name / "tokenizer.json").write_text(content, encoding="utf-8")
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ x }}", encoding="utf-8")
    assert read_vocabulary(tmp_path / "a") == read_vocabulary(tmp_path / "b")
    assert read_vocabulary(tmp_path / "a").to_record() == read_vocabulary(tmp_path / "b").to_record()
