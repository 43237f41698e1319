"""The language stage: docstrings -> tokenizer -> shards -> language model -> report and generated text."""

import dataclasses
import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from vla_foundry.batch import Batch
from vla_foundry.data import create_dataloader
from vla_foundry.params import load_experiment_params_from_yaml
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.parsing import parse_object
from vla_foundry.quickstart.docstrings import harvest_docstrings
from vla_foundry.quickstart.steps import Sizes, Stage, Step, count_trainers, training_step, words_of
from vla_foundry.run_folder import CONFIG_NAME, METRICS_NAME
from vla_foundry.world import World

PACKAGES = ("numpy", "scipy")
VOCAB_SIZE = 4096
SEQ_LEN = 256
PRESET = "config_presets/training_jobs/llm_quickstart.yaml"
PROMPTS = ("Return the", "Compute the eigenvalues of")
INSTRUCTION = "open the drawer"
# in the stage's folder: the loss on held-out documents and that of a unigram model; and the text that it generates
LOSSES_NAME, GENERATED_NAME = "losses.json", "generated.txt"


def create_llm_stage(output_dir: Path, sizes: Sizes) -> Stage:
    """Build the language stage, which writes below `<output_dir>/llm`."""
    folder = output_dir / "llm"
    text, tokenizer, shards, run = folder / "text", folder / "tokenizer", folder / "shards", folder / "runs" / "llm"
    summary, losses = folder / "summary.txt", folder / LOSSES_NAME

    steps = (
        Step(
            name="harvest",
            what="Collect real English: docstrings of the standard library, numpy and scipy",
            seconds=5,
            function=lambda: _harvest(text),
            outputs=(text / "train" / "docstrings.jsonl", text / "validation" / "docstrings.jsonl"),
        ),
        Step(
            name="tokenizer",
            what=f"Train a byte-level BPE tokenizer with {VOCAB_SIZE:,} tokens",
            seconds=3,
            words=words_of("preprocess tokenizer", source=text / "train", output=tokenizer, vocab_size=VOCAB_SIZE),
            outputs=(tokenizer / "tokenizer.json",),
            folder=tokenizer,
        ),
        Step(
            name="show_tokens",
            what="Cut an instruction for the robot into tokens",
            function=lambda: _show_tokens(tokenizer),
        ),
        *(_preprocess(split, text, shards, tokenizer) for split in ("train", "validation")),
        training_step(
            "train_llm",
            "Train the language model",
            seconds=40,
            preset=PRESET,
            run=run,
            shards=shards,
            num_processes=count_trainers(),
            flags=sizes.training_flags(sizes.llm_samples),
        ),
        Step(
            name="generate",
            what="Continue two prompts",
            seconds=5,
            words=(
                *words_of("generate", checkpoint=run),
                *(word for prompt in PROMPTS for word in ("--prompt", prompt)),
                *words_of("", max_new_tokens=40, temperature=0.7, seed=0),
            ),
            output=folder / GENERATED_NAME,
            outputs=(folder / GENERATED_NAME,),
        ),
        Step(
            name="llm_report",
            what="Compare with a model that ignores context",
            seconds=4,
            function=lambda: write_llm_report(run, summary=summary, losses=losses),
            outputs=(summary, losses),
        ),
    )
    return Stage(steps=steps, summary=summary)


def _preprocess(split: str, text: Path, shards: Path, tokenizer: Path) -> Step:
    return Step(
        name=f"preprocess_{split}",
        what=f"Tokenize and pack the {split} text into shards",
        seconds=4,
        words=words_of(
            "preprocess text",
            source=text / split,
            output=shards / split,
            tokenizer=tokenizer,
            seq_len=SEQ_LEN,
            # in this process: Ray would take longer to start
            num_workers=0,
        ),
        outputs=(shards / split / "manifest.jsonl",),
        folder=shards / split,
    )


def _harvest(text: Path) -> None:
    counts = harvest_docstrings(text, packages=PACKAGES)
    for split in ("train", "validation"):
        megabytes = counts[f"{split}_characters"] / 1e6
        print(f"  {split}: {counts[f'{split}_documents']:,} docstrings, {megabytes:.1f} MB")  # noqa: T201
    with (text / "train" / "docstrings.jsonl").open(encoding="utf-8") as file:
        first = parse_object(file.readline(), file.name)["text"]
    print(f"  the first: {' '.join(first.split())[:100]}...")  # noqa: T201


def _show_tokens(tokenizer: Path) -> None:
    from vla_foundry.text.tokenizers import load_tokenizer

    loaded = load_tokenizer(str(tokenizer))
    ids = loaded.encode(INSTRUCTION, add_special_tokens=False)
    pieces = "|".join(str(loaded.decode([number])) for number in ids)
    print(f"  {INSTRUCTION!r} -> {pieces}\n  which a model sees as {ids}")  # noqa: T201


def write_llm_report(run: Path, *, summary: Path, losses: Path) -> str:
    """Compare the run's held-out loss with that of a unigram model of the same data.

    Args:
        run: folder of the language run.
        summary: text file to write.
        losses: JSON file to write.

    Returns:
        The summary.

    Raises:
        ValueError: the run has no validation loss.
    """
    params = load_experiment_params_from_yaml(str(run / CONFIG_NAME))
    baseline = measure_unigram(params)
    lines = [parse_object(line, METRICS_NAME) for line in (run / METRICS_NAME).read_text(encoding="utf-8").splitlines()]
    training = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    validation = [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"]
    if not validation:
        raise ValueError(f"{run} has no validation loss. Train it with --total_val_samples.")
    held_out = validation[-1][1]
    text = "\n".join(
        (
            "Language stage",
            f"  loss in training            {training[0][1]:.3f} -> {training[-1][1]:.3f} nats per token",
            f"  loss on held-out documents  {held_out:.3f} nats per token",
            f"  a unigram model there       {baseline:.3f} nats per token",
            f"  the model is better by      {baseline - held_out:.3f} nats per token (goal: at least 1)",
            "",
            *sketch_curve(training),
        )
    )
    losses.write_text(json.dumps({"held_out": held_out, "unigram": baseline}) + "\n", encoding="utf-8")
    summary.write_text(text + "\n", encoding="utf-8")
    return text


def measure_unigram(params: TrainExperimentParams) -> float:
    """Fit a unigram model to a run's training data; return its loss on the run's validation targets."""
    options: dict[str, Any] = {
        "global_batch_size": params.hparams.global_batch_size,
        "per_gpu_batch_size": params.hparams.per_gpu_batch_size,
        "seed": params.hparams.seed,
    }
    # a validation split is read once and in order; read the training data as one
    train = dataclasses.replace(
        params.data,
        val_dataset_manifest=params.data.dataset_manifest,
        val_dataset_modality=params.data.dataset_modality,
        val_dataset_weighting=params.data.dataset_weighting,
    )
    with closing(create_dataloader(train, World(), **options, split="validation")) as loader:
        train_counts = count_targets(loader.microbatches(0))
    held_out = create_dataloader(
        params.data, World(), **options, split="validation", total_samples=params.total_val_samples
    )
    with closing(held_out) as loader:
        held_out_counts = count_targets(loader.microbatches(0))
    return unigram_loss(train_counts, held_out_counts)


def unigram_loss(train_counts: np.ndarray, held_out_counts: np.ndarray) -> float:
    """Return the loss, in nats per token, of the best model that ignores context.

    Args:
        train_counts: occurrences of each token in the training data, (V,); one is added to each.
        held_out_counts: the same for the held-out targets, (V,).
    """
    probabilities = (train_counts + 1.0) / (train_counts + 1.0).sum()
    return float(-(held_out_counts * np.log(probabilities)).sum() / held_out_counts.sum())


def count_targets(batches: Iterable[Batch]) -> np.ndarray:
    """Count how often each token is a supervised target, int64 (V,)."""
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for batch in batches:
        targets = batch["input_ids"][batch["target_mask"]].numpy()
        counts += np.bincount(targets, minlength=VOCAB_SIZE)
    return counts


def sketch_curve(points: list[tuple[int, float]], *, width: int = 64, height: int = 10) -> list[str]:
    """Plot losses over steps as text; return the lines, top first."""
    steps = np.array([step for step, _ in points], dtype=np.float64)
    losses = np.array([loss for _, loss in points], dtype=np.float64)
    columns = np.interp(np.linspace(steps[0], steps[-1], width), steps, losses)
    low, high = losses.min(), losses.max()
    rows = np.round((high - columns) / max(high - low, 1e-9) * (height - 1)).astype(int)
    labels = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
    lines = [
        f"  {labels.get(row, ''):>6} |" + "".join("*" if at == row else " " for at in rows).rstrip()
        for row in range(height)
    ]
    return [*lines, f"  {'':>6} +{'-' * width}", f"  {'':>7} step {steps[0]:.0f} to {steps[-1]:.0f}"]
