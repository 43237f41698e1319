"""Docstrings are found, each once, and split by source file."""

import json
from pathlib import Path

import pytest

from vla_foundry.quickstart.docstrings import MIN_CHARACTERS, harvest_docstrings, read_docstrings


def test_docstrings_of_all_kinds_are_read_in_order(tmp_path: Path) -> None:
    long = "word " * MIN_CHARACTERS
    source = tmp_path / "module.py"
    source.write_text(
        f'"""Module {long}"""\nclass A:\n    """Class {long}"""\n    def f(self):\n        """Short."""\n',
        encoding="utf-8",
    )
    assert [text.split()[0] for text in read_docstrings(source)] == ["Module", "Class"]


@pytest.mark.parametrize("content", [b"def broken(:\n", b"\xff\xfe", b""])
def test_what_is_not_python_has_no_docstrings(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "module.py"
    source.write_bytes(content)
    assert read_docstrings(source) == []


def test_harvest_holds_no_text_twice_and_splits_by_file(tmp_path: Path) -> None:
    counts = harvest_docstrings(tmp_path, packages=())
    splits = {
        split: [
            json.loads(line)["text"]
            for line in (tmp_path / split / "docstrings.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for split in ("train", "validation")
    }
    assert {split: len(texts) for split, texts in splits.items()} == {
        "train": counts["train_documents"],
        "validation": counts["validation_documents"],
    }
    texts = splits["train"] + splits["validation"]
    assert len(set(texts)) == len(texts) > 1000
    assert 0.01 < len(splits["validation"]) / len(texts) < 0.15


def test_harvest_names_a_missing_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'no_such_package' is not installed"):
        harvest_docstrings(tmp_path, packages=("no_such_package",))
