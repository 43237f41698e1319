"""One Ray cluster a session, a small tokenizer, and documents to preprocess."""

import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.params.commands.preprocessing import TrainTokenizerParams


@pytest.fixture(scope="session")
def texts_not_utf8() -> Any:
    """An Arrow array of two texts, the second of which holds half of a surrogate pair, as Java writes it."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"cut \xed\xa0\xbd"]).buffers())


@pytest.fixture(scope="module")
def ray_cluster(s3_environment: dict[str, str]) -> Iterator[str]:
    """The address of a Ray cluster of two workers, which jobs of this process use; it finds the object store."""
    # the workers import the converter of the tests, robotics/rig_converter.py
    paths = filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).with_name("robotics"))))
    names = {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    os.environ.update(names | s3_environment)
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 << 20,
    )
    for name in s3_environment:  # the workers have them; RAY_AUTH_MODE, which Ray has set, stays for the tests
        del os.environ[name]
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


TEXT = "the model reads a long table of größere numbers 12 345 and 日本語 writes_code(x) = y; then stops ."


def create_documents(num_documents: int, *, seed: int = 0, longest: int = 200) -> list[str]:
    """Documents of random words and lengths, all different."""
    chosen = random.Random(seed)
    return [
        f"{number}: "
        + " ".join(chosen.choices(TEXT.split(), k=chosen.randint(1, longest)))
        + "\n" * chosen.randint(0, 2)
        for number in range(num_documents)
    ]


def _write_jsonl(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[str]], Path]:
    """A function that writes one document a row, and returns the path."""
    return _write_jsonl


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """1,500 documents, about 1.5 MB."""
    return create_documents(1500, longest=300)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A folder with the documents in three files."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(3):
        _write_jsonl(folder / f"part{number}.jsonl", documents[number::3])
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """A folder with a byte-level BPE tokenizer of 400 tokens."""
    from vla_foundry.preprocessing.text.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TrainTokenizerParams(source=[str(source)], output=str(folder), vocab_size=400))
    return folder
