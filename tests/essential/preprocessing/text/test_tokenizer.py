"""`preprocess tokenizer`: the same text gives the same tokenizer, and every text comes back from it."""

from dataclasses import replace
from pathlib import Path

import pytest

from vla_foundry.params.commands.preprocessing import TrainTokenizerParams
from vla_foundry.preprocessing.text.tokenizer import train_tokenizer


@pytest.fixture
def params(source: Path, tmp_path: Path) -> TrainTokenizerParams:
    return TrainTokenizerParams(
        source=[str(source)], output=str(tmp_path / "a"), vocab_size=300, special_tokens=["<image>", "<action>"]
    )


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "provenance.json"}


def test_training_is_repeatable(params: TrainTokenizerParams):
    train_tokenizer(params)
    other = replace(params, output=params.output + "_again")
    train_tokenizer(other)
    assert contents(params.output) == contents(other.output)
    assert set(contents(params.output)) == {"tokenizer.json", "tokenizer_config.json"}


def test_folder_loads_as_a_fast_tokenizer(params: TrainTokenizerParams):
    from transformers import AutoTokenizer

    train_tokenizer(params)
    tokenizer = AutoTokenizer.from_pretrained(params.output)
    assert tokenizer.is_fast
    assert len(tokenizer) == 300
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    assert tokenizer("<image>", add_special_tokens=False).input_ids == [2]
    for text in ("größere 日本語 🙂\n\n  x = 1234;", "\x00\x7f", " leading", "trailing "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("12 345") == ["1", "2", "Ġ", "3", "4", "5"]


def test_max_bytes_bounds_the_text(params: TrainTokenizerParams, capsys: pytest.CaptureFixture[str]):
    train_tokenizer(replace(params, max_bytes=10_000))
    assert "0.0 MB (--max_bytes 10,000)" in capsys.readouterr().out


def test_same_configuration_is_not_trained_again(params: TrainTokenizerParams):
    train_tokenizer(params)
    path = Path(params.output) / "tokenizer.json"
    before = path.stat().st_mtime_ns
    train_tokenizer(params)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"was trained with params\.vocab_size 300 \(now 310\)"):
        train_tokenizer(replace(params, vocab_size=310))
    train_tokenizer(replace(params, vocab_size=310, overwrite=True))
    assert path.stat().st_mtime_ns != before


def test_foreign_folder_is_not_touched(params: TrainTokenizerParams):
    folder = Path(params.output)
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds other files"):
        train_tokenizer(params)
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == "{}"


def test_unfinished_folder_is_finished(params: TrainTokenizerParams):
    train_tokenizer(params)
    path = Path(params.output) / "tokenizer.json"
    content = path.read_bytes()
    path.unlink()  # the last file a run writes
    train_tokenizer(params)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 200}, r"vocab_size \(200\) must be at least 260: 256 bytes and 4 special tokens"),
        ({"special_tokens": ["<|pad|>"]}, "special tokens must differ"),
        ({"eos_token": ""}, "a special token is empty"),
    ],
)
def test_params_say_what_is_wrong(params: TrainTokenizerParams, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(params, **changes)
