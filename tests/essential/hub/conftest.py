"""A small run of a language model, trained with its tokenizer, to publish."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.essential.training.conftest import write_counting
from vla_foundry.config.command_line import parse
from vla_foundry.main import run as run_training
from vla_foundry.params import TrainExperimentParams

WORDS = ("the", "cat", "sat", "on", "mat", "a", "dog", "ran")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 64 records of 17 tokens, in two shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("home") / "corpus"
    folder.mkdir()
    write_counting(folder, record_length=17, num_documents=60, lengths=(8, 20), num_records=32)
    (folder / "tokenizer").mkdir()
    vocabulary = {word: number for number, word in enumerate([*WORDS, *(f"w{n}" for n in range(56))])}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"},
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [],
    }
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "the", "name_or_path": str(folder / "made")}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder, trained by the command line: six steps of 8 samples, logged each; it is not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "job.yaml").write_text(
        "hparams: {global_batch_size: 8, per_gpu_batch_size: 4, precision: fp32, lr: 0.01, warmup: 0}\n"
        "model: {type: transformer, hidden_dim: 32, n_layers: 2, n_heads: 2, vocab_size: 64, max_seq_len: 64}\n"
        "ema: {enabled: true, type: vanilla, alpha: 0.5}\n",
        encoding="utf-8",
    )
    words = ["--config_path", str(folder / "job.yaml"), "--data.type", "text", "--name", "tiny", "--save_path"]
    words += [str(folder), "--data.dataset_manifest", str(dataset / "manifest.jsonl"), "--data.seq_len", "16"]
    words += ["--data.num_workers", "0", "--wandb", "false", "--log_every_n_steps", "1", "--num_checkpoints", "2"]
    words += ["--total_train_samples", "48", "--data.tokenizer", str(dataset / "tokenizer")]
    run_training(parse(TrainExperimentParams, words, prog="vla-foundry train"))
    return folder / "tiny"


@pytest.fixture
def copy_run(trained: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copies the run to a folder of the test."""
    return lambda: Path(shutil.copytree(trained, tmp_path / "tiny"))
