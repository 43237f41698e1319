"""The last page of the quickstart: what was learned, against what one gets without learning."""

import dataclasses
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from vla_foundry.batch import Batch
from vla_foundry.data import create_dataloader
from vla_foundry.params import load_experiment_params_from_yaml
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.quickstart.llm import VOCAB_SIZE, read_metrics, unigram_loss
from vla_foundry.run_folder import CONFIG_NAME
from vla_foundry.world import World


def write_llm_report(run: Path, *, summary: Path, figure: Path) -> str:
    """Compare the run's held-out loss with a unigram model of the same data, and draw its loss curve.

    Args:
        run: folder of the language run.
        summary: text file to write.
        figure: PNG to write.

    Returns:
        The summary.

    Raises:
        ValueError: the run holds no validation.
    """
    params = load_experiment_params_from_yaml(str(run / CONFIG_NAME))
    baseline = measure_unigram(params)
    lines = list(read_metrics(run))
    training = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    validation = [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"]
    if not validation:
        raise ValueError(f"{run} has no validation loss. Give --total_val_samples when it is trained.")
    held_out = validation[-1][1]
    text = "\n".join(
        (
            "Language stage",
            f"  loss in training            {training[0][1]:.3f} -> {training[-1][1]:.3f} nats per token",
            f"  loss on held-out documents  {held_out:.3f} nats per token",
            f"  a unigram model there       {baseline:.3f} nats per token",
            f"  the model is better by      {baseline - held_out:.3f} nats per token (goal: at least 1)",
            f"  loss curve                  {figure}",
            "",
            *sketch_curve(training),
        )
    )
    draw_loss_curve(training, validation, baseline, figure)
    summary.write_text(text + "\n", encoding="utf-8")
    return text


def measure_unigram(params: TrainExperimentParams) -> float:
    """Return the held-out loss of a unigram model of a run's training data, on the targets the run validates on."""
    options: dict[str, Any] = {
        "global_batch_size": params.hparams.global_batch_size,
        "per_gpu_batch_size": params.hparams.per_gpu_batch_size,
        "seed": params.hparams.seed,
    }
    # the training data once, in order: as a validation split of its own
    train = _as_validation(params)
    with closing(create_dataloader(train, World(), **options, split="validation")) as loader:
        train_counts = count_targets(loader.microbatches(0))
    held_out = create_dataloader(
        params.data, World(), **options, split="validation", total_samples=params.total_val_samples
    )
    with closing(held_out) as loader:
        held_out_counts = count_targets(loader.microbatches(0))
    return unigram_loss(train_counts, held_out_counts)


def count_targets(batches: Iterable[Batch]) -> np.ndarray:
    """Count how often each token is a supervised target, int64 [V]."""
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for batch in batches:
        targets = batch["input_ids"][batch["target_mask"]].numpy()
        counts += np.bincount(targets, minlength=VOCAB_SIZE)
    return counts


def sketch_curve(points: list[tuple[int, float]], *, width: int = 64, height: int = 10) -> list[str]:
    """Draw losses over steps in characters, lines from the top down."""
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


def draw_loss_curve(
    training: list[tuple[int, float]], validation: list[tuple[int, float]], baseline: float, path: Path
) -> None:
    """Draw the loss over steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    axes.plot(*zip(*training, strict=True), color="#4878a8", linewidth=1.4, label="training")
    axes.plot(*zip(*validation, strict=True), "o", color="#c44e52", label="held-out documents")
    axes.axhline(baseline, color="#777777", linestyle="--", linewidth=1, label="unigram model, held-out")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title="Language model")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _as_validation(params: TrainExperimentParams) -> DataParams:
    return dataclasses.replace(
        params.data,
        val_dataset_manifest=params.data.dataset_manifest,
        val_dataset_modality=params.data.dataset_modality,
        val_dataset_weighting=params.data.dataset_weighting,
    )
