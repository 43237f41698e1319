"""The parts of the quickstart's language stage."""

import json
from pathlib import Path

import numpy as np
import pytest

from vla_foundry.quickstart.docstrings import MIN_CHARACTERS, harvest_docstrings, read_docstrings
from vla_foundry.quickstart.llm import unigram_loss
from vla_foundry.quickstart.report import draw_loss_curve, sketch_curve


def test_docstrings_of_all_kinds_are_read_in_order(tmp_path: Path) -> None:
    long = "word " * MIN_CHARACTERS
    source = tmp_path / "module.py"
    source.write_text(
        f'"""Module {long}"""\nclass A:\n    """Class {long}"""\n    def f(self):\n        """Short."""\n'
    )
    assert [text.split()[0] for text in read_docstrings(source)] == ["Module", "Class"]


@pytest.mark.parametrize("content", [b"def broken(:\n", b"\xff\xfe", b""])
def test_what_is_not_python_has_no_docstrings(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "module.py"
    source.write_bytes(content)
    assert read_docstrings(source) == []


def test_harvest_holds_no_text_twice_and_splits_by_file(tmp_path: Path) -> None:
    counts = harvest_docstrings(tmp_path, packages=(), num_processes=2)
    splits = {
        split: [json.loads(line)["text"] for line in (tmp_path / split / "docstrings.jsonl").read_text().splitlines()]
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
        harvest_docstrings(tmp_path, packages=("no_such_package",), num_processes=1)


def test_unigram_loss_is_the_entropy_of_the_data_it_was_fitted_to() -> None:
    counts = np.array([4_000_000, 2_000_000, 1_000_000, 1_000_000])
    entropy = 1.75 * np.log(2)  # 1/2, 1/4, 1/8, 1/8
    assert unigram_loss(counts, counts) == pytest.approx(entropy, abs=1e-5)


def test_unigram_loss_of_an_unseen_token_is_finite() -> None:
    assert unigram_loss(np.array([98, 0]), np.array([0, 5])) == pytest.approx(np.log(100))


def test_sketch_goes_down_with_the_loss() -> None:
    lines = sketch_curve([(0, 9.0), (50, 5.0), (100, 4.0)], width=20, height=5)
    assert lines[0].strip().startswith("9.00 |*")
    assert lines[4].strip().startswith("4.00 |")
    assert lines[4].endswith("*")


def test_loss_curve_is_a_png(tmp_path: Path) -> None:
    draw_loss_curve([(0, 9.0), (10, 5.0)], [(10, 5.2)], 6.5, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
