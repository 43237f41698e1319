"""The tiny model, loader and scenarios, and a way to run them on two ranks."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from vla_foundry.params import HyperParams, TrainExperimentParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.preprocessing.text.packing import RecordPacker, write_records
from vla_foundry.shards import format_manifest

_SCRIPT = Path(__file__).with_name("tiny_run.py")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The work here is too small for several threads, which on a busy machine wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny_run.py."""
    spec = importlib.util.spec_from_file_location("tiny_run", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a Python script or module on `num_ranks` gloo processes, each with one thread."""

    def run(num_ranks: int, *words: str, timeout: float = 280.0, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
        return subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture(scope="session")
def run_on_two_ranks(launch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], list[Any]]:
    """Train scenarios of tiny_run.py on two ranks in one launch; returns {name: result} of each rank."""

    def run(scenarios: dict[str, Any]) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "scenarios.json").write_text(json.dumps(scenarios), encoding="utf-8")
        done = launch(2, str(_SCRIPT), str(folder / "scenarios.json"), str(folder / "result"))
        assert done.returncode == 0, done.stdout + done.stderr
        return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(2)]

    return run


def write_counting(
    folder: Path, *, record_length: int, num_documents: int, lengths: tuple[int, int], num_records: int
) -> Path:
    """Write two shards of records whose documents count up modulo 64, and their manifest; returns it.

    Args:
        num_documents: documents drawn for each shard, of lengths in a range.
        num_records: records of a shard.
    """
    draw, entries = np.random.default_rng(5), []
    for number in range(2):
        packer = RecordPacker(record_length, "uint16")
        for _ in range(num_documents):
            tokens = (int(draw.integers(64)) + np.arange(int(draw.integers(*lengths)))) % 64
            packer.add(tokens.astype(np.uint16), np.asarray([len(tokens)]))
        entries.append(write_records(str(folder), f"shard_{number:06d}", packer.take(num_records)))
    (folder / "manifest.jsonl").write_text(format_manifest(entries), encoding="utf-8")
    return folder / "manifest.jsonl"


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 96 records of 33 tokens below 64, in two shards; each token follows from the one before."""
    folder = tmp_path_factory.mktemp("dataset")
    return write_counting(folder, record_length=33, num_documents=120, lengths=(5, 24), num_records=48)


@pytest.fixture(scope="session")
def create_params(manifest: Path) -> Callable[[str, Path], TrainExperimentParams]:
    """Params of a run of tokenized text by name and save_path: six steps of 8 samples, three checkpoints."""

    def create(name: str, save_path: Path) -> TrainExperimentParams:
        return TrainExperimentParams(
            name=name,
            save_path=str(save_path),
            wandb=False,
            log_every_n_steps=1,
            num_checkpoints=3,
            total_train_samples=48,
            data=TextDataParams(
                dataset_manifest=[str(manifest)],
                dataset_modality=["text"],
                dataset_weighting=[1.0],
                seq_len=32,
                num_workers=0,
                seed=3,
            ),
            model=TransformerParams(hidden_dim=32, n_layers=2, n_heads=2, vocab_size=64),
            hparams=HyperParams(precision="fp32", global_batch_size=8, per_gpu_batch_size=4, lr=0.003, warmup=1.0),
        )

    return create
