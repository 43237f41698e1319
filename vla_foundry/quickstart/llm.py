"""The language stage: docstrings -> tokenizer -> shards -> a trained language model -> generated text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vla_foundry.quickstart.docstrings import harvest_docstrings
from vla_foundry.quickstart.stages import Step, training_step, words_of

PACKAGES = ("numpy", "scipy")
VOCAB_SIZE = 4096
SEQ_LEN = 256
PRESET = "config_presets/training_jobs/llm_quickstart.yaml"
PROMPTS = ("Return the", "Compute the eigenvalues of")


def llm_steps(output_dir: Path, *, num_processes: int, num_trainers: int) -> list[Step]:
    """Return the steps of the language stage; everything is written below `output_dir`.

    Args:
        num_processes: processes that collect text.
        num_trainers: processes that train.
    """
    text, tokenizer = output_dir / "text", output_dir / "tokenizer"
    shards, run = output_dir / "shards", output_dir / "runs" / "llm"

    def harvest() -> None:
        counts = harvest_docstrings(text, packages=PACKAGES, num_processes=num_processes)
        for split in ("train", "validation"):
            megabytes = counts[f"{split}_characters"] / 1e6
            print(f"  {split}: {counts[f'{split}_documents']:,} docstrings, {megabytes:.1f} MB")  # noqa: T201

    def preprocess(split: str) -> Step:
        folder = shards / split
        return Step(
            name=f"preprocess_{split}",
            what=f"Tokenize and pack the {split} text into shards",
            words=words_of("preprocess text", source=text / split, output=folder, tokenizer=tokenizer, seq_len=SEQ_LEN),
            outputs=(folder / "manifest.jsonl",),
            folder=folder,
        )

    return [
        Step(
            name="harvest",
            what="Collect real English: docstrings of the standard library, numpy and scipy",
            function=harvest,
            outputs=(text / "train" / "docstrings.jsonl", text / "validation" / "docstrings.jsonl"),
        ),
        Step(
            name="tokenizer",
            what=f"Train a byte-level BPE tokenizer of {VOCAB_SIZE:,} tokens",
            words=words_of("preprocess tokenizer", source=text / "train", output=tokenizer, vocab_size=VOCAB_SIZE),
            outputs=(tokenizer / "tokenizer.json",),
            folder=tokenizer,
        ),
        preprocess("train"),
        preprocess("validation"),
        training_step(
            "train_llm",
            "Train the language model",
            preset=PRESET,
            run=run,
            shards=shards,
            num_processes=num_trainers,
        ),
    ]


def generate_step(output_dir: Path) -> Step:
    """Return the step that continues two prompts with the trained model."""
    words = words_of("generate", checkpoint=output_dir / "runs" / "llm")
    words += tuple(word for prompt in PROMPTS for word in ("--prompt", prompt))
    words += words_of("", max_new_tokens=40, temperature=0.7, seed=0)
    return Step(name="generate", what="Continue two prompts", words=words)


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)


def unigram_loss(train_counts: np.ndarray, held_out_counts: np.ndarray) -> float:
    """Return the loss, in nats per token, of the best model that ignores context.

    Args:
        train_counts: how often each token stands in the training data, [V]; one is added to each.
        held_out_counts: the same for the held-out targets, [V].
    """
    probabilities = (train_counts + 1.0) / (train_counts + 1.0).sum()
    return float(-(held_out_counts * np.log(probabilities)).sum() / held_out_counts.sum())
