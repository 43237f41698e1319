"""Tokenizers are loaded from folders, saved, and measured without importing what is heavy."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vla_foundry.text.tokenizers import load_tokenizer, pad_token_id_of, save_tokenizer, vocab_size_of


def create_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", **special)


def test_a_saved_tokenizer_loads_with_its_special_tokens(tmp_path: Path) -> None:
    save_tokenizer(create_tokenizer(eos_token="<end>"), tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert tokenizer("a b c")["input_ids"] == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<end>", 3)


def test_vocab_size_counts_added_tokens_and_imports_nothing_heavy(tmp_path: Path) -> None:
    save_tokenizer(create_tokenizer(eos_token="<end>"), tmp_path)
    assert vocab_size_of(tmp_path) == 4
    code = (
        "import sys; from vla_foundry.text.tokenizers import vocab_size_of; "
        f"assert vocab_size_of({str(tmp_path)!r}) == 4; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_vocab_size_of_a_unigram_model(tmp_path: Path) -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert vocab_size_of(tmp_path) == 3


@pytest.mark.parametrize(
    ("special", "expected"),
    [({"pad_token": "<pad>", "eos_token": "<end>"}, "<pad>"), ({"eos_token": "<end>"}, "<end>")],
)
def test_rows_are_filled_with_padding_or_else_the_end(special: dict[str, str], expected: str) -> None:
    tokenizer = create_tokenizer(**special)
    assert pad_token_id_of(tokenizer) == tokenizer.convert_tokens_to_ids(expected)
    assert pad_token_id_of(create_tokenizer()) == 0


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        vocab_size_of(tmp_path)
    with pytest.raises(ValueError, match="neither a tokenizer's folder nor a name that is known") as caught:
        load_tokenizer("no-such-owner/no-such-tokenizer")
    assert "\n" not in str(caught.value)
