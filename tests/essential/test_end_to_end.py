"""The main job on real input, by the public command line: text -> shards -> training -> generated text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla_foundry.quickstart.docstrings import read_docstrings
from vla_foundry.run_folder import find_checkpoint

PROMPT = "Return the"


def run(*words: str, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "WANDB_MODE": "disabled"}
    finished = subprocess.run(
        [sys.executable, "-m", "vla_foundry.cli", *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, f"{words}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, shards and a trained run, all made by commands."""
    folder = tmp_path_factory.mktemp("end_to_end")
    library = Path(os.__file__).parent
    texts = [text for path in sorted(library.glob("*.py")) for text in read_docstrings(path)]
    assert len(texts) > 500
    (folder / "text").mkdir()
    (folder / "text" / "docs.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    run("preprocess", "tokenizer", "--source", "text", "--output", "tokenizer", "--vocab_size", "512", cwd=folder)
    words = ["--source", "text", "--output", "shards", "--tokenizer", "tokenizer", "--seq_len", "64"]
    run("preprocess", "text", *words, "--num_workers", "2", cwd=folder)
    run(
        *("train", "--config_path", "config_presets/training_jobs/llm_tiny.yaml"),
        *("--data.dataset_manifest", "shards/manifest.jsonl", "--data.val_dataset_manifest", "shards/manifest.jsonl"),
        *("--data.seq_len", "64", "--model.vocab_size", "512", "--total_train_samples", "960"),
        *("--total_val_samples", "64", "--num_checkpoints", "2", "--save_path", "runs", "--name", "tiny"),
        cwd=folder,
    )
    return folder


def test_shards_verify(trained: Path) -> None:
    assert "shards" in run("manifest", "verify", "shards", cwd=trained)


def test_training_lowers_the_loss(trained: Path) -> None:
    lines = [
        json.loads(line)
        for line in (trained / "runs" / "tiny" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    validation = [line["loss"] for line in lines if line["kind"] == "validation"]
    assert losses[-1] < losses[0] - 1
    assert validation[-1] < losses[0] - 1


def test_the_run_folder_has_all_that_generation_needs(trained: Path) -> None:
    run_folder = trained / "runs" / "tiny"
    assert find_checkpoint(run_folder).name == "step_00000060"
    assert (run_folder / "tokenizer" / "tokenizer.json").is_file()
    (trained / "shards").rename(trained / "moved")
    try:
        words = (
            "generate",
            "--checkpoint",
            str(run_folder),
            "--prompt",
            PROMPT,
            "--max_new_tokens",
            "8",
            "--seed",
            "1",
        )
        first, second = run(*words, cwd=trained), run(*words, cwd=trained)
    finally:
        (trained / "moved").rename(trained / "shards")
    assert first == second
    assert PROMPT in first
    assert len(first.strip()) > len(PROMPT)


def test_a_finished_run_goes_no_further_when_resumed(trained: Path) -> None:
    metrics = trained / "runs" / "tiny" / "metrics.jsonl"
    before = metrics.read_text(encoding="utf-8")
    run("train", "--config_path", "runs/tiny/config.yaml", "--resume", "auto", cwd=trained)
    assert metrics.read_text(encoding="utf-8") == before
