"""What tests of the config front share: datasets of manifests only, and ways to write and parse configs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config.command_line import Parsed, parse
from vla_foundry.params import TrainExperimentParams


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """The manifest of a dataset of 1000 samples; its shards are never read here."""
    path = tmp_path / "dataset" / "manifest.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"shard": "shard_000000", "num_sequences": 1000}) + "\n")
    return str(path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a file below the test's folder and returns its path."""

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


@pytest.fixture
def parse_train() -> Callable[..., Parsed]:
    """Parses the words of `vla-foundry train`, with a type for model and data."""

    def parse_words(*words: str, cls: Any = TrainExperimentParams) -> Parsed:
        base = ["--model.type", "transformer", "--data.type", "text"] if cls is TrainExperimentParams else []
        return parse(cls, [*base, *words], prog="vla-foundry train")

    return parse_words
