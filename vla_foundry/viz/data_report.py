"""`vla-foundry data inspect --config_path FILE`: measure the data of a training config before it is trained on."""

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vla_foundry.batch import Batch
from vla_foundry.data.loader import Split
from vla_foundry.data.mixture import MixtureLoader, create_dataloader
from vla_foundry.data.pipelines.image_caption import find_images
from vla_foundry.data.pipelines.stages import RECORDING, Sample
from vla_foundry.images.codec import decode_image
from vla_foundry.params.commands.runs import InspectConfigParams
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.storage.local import replace_file
from vla_foundry.text.chat import IMAGE_MARKER
from vla_foundry.world import World

# contact sheet: tiles in all and in a row; side of a picture and height of its text, pixels; lines of text
_MOST_TILES, _NUM_COLUMNS, _SIDE, _TEXT, _NUM_LINES, _LINE_LENGTH = 24, 6, 224, 80, 5, 36
_LINE_HEIGHT = 15
# a sample's pictures in its tile, in rows, in the model's order
_MOST_IN_TILE = 16


@dataclass
class Measured:
    """What was measured of one dataset's microbatches, while `read_batches` yields them."""

    num_samples: int = 0
    # tokens of each sample, before one that is too long is cut; of a document that is cut: seq_len + 2
    lengths: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_padding: int = 0
    # {reason: count}
    bad: Counter[str] = field(default_factory=Counter)
    # {step: milliseconds per sample}
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, batch: Batch) -> None:
        """Add a microbatch, and what was recorded while it was made."""
        self.num_samples += len(batch["positions"])
        self.bad.update(batch["dropped"])
        for step, laps in RECORDING.times.items():
            self.times[step] += [milliseconds for milliseconds, _ in laps]
        whole = self.times.pop("whole")
        steps = sum(each * count for step, laps in RECORDING.times.items() if step != "whole" for each, count in laps)
        self.times["batch"].append(whole[0] - steps / max(len(batch["positions"]), 1))
        if "input_ids" not in batch:
            return
        padding = _find_padding(batch)
        self.num_tokens += padding.size
        self.num_padding += int(padding.sum())
        lengths = [_count_tokens(sample) for sample in RECORDING.samples]
        self.lengths += lengths if len(lengths) == len(batch["positions"]) else (~padding).sum(axis=1).tolist()

    def summarize(self, seq_len: int) -> dict[str, Any]:
        """Return the numbers in plain JSON types."""
        tokens = None
        if self.lengths:
            quantiles = np.percentile(self.lengths, [0, 50, 95, 100], method="nearest").tolist()
            tokens = {name: int(value) for name, value in zip(("min", "p50", "p95", "max"), quantiles, strict=True)}
            too_long = sum(length > seq_len + 1 for length in self.lengths) / len(self.lengths)
            tokens |= {"seq_len": seq_len, "truncated_share": too_long}
        return {
            "tokens": tokens,
            "padding_share": self.num_padding / self.num_tokens if self.num_tokens else None,
            "ms_per_sample": {step: float(np.median(laps)) for step, laps in self.times.items()},
            "bad_samples": dict(self.bad),
        }


def _find_padding(batch: Batch) -> np.ndarray:
    """Return which tokens are padding, bool (B, T)."""
    if "documents" in batch:
        return batch["documents"].padding_mask()
    targets = batch["target_mask"].numpy()
    # without documents, padding is what follows a row's last target
    return (np.cumsum(targets[:, ::-1], axis=1) == 0)[:, ::-1]


def _count_tokens(sample: Sample) -> int:
    return sample.get("num_tokens") or len(
        sample["input_ids"] if "input_ids" in sample else sample["inputs"]["input_ids"]
    )


def measure(params: InspectConfigParams) -> dict[str, Any]:
    """Run the training data of a resolved config through its own loader, in this process, and measure it.

    Returns:
        {"samples": count, "mix": {dataset: {"weight", "share", "samples"}}, "datasets": {dataset: see
        Measured.summarize}, "contact_sheet": the PNG that was written, or None}

    Raises:
        ValueError: the data cannot be read.
    """
    data = params.data
    parts = data.datasets if isinstance(data, MixtureDataParams) else {data.type: data}
    measured = {name: Measured() for name in parts}
    tiles: list[tuple[str, list[np.ndarray], str]] = []
    mix: dict[str, dict[str, tuple[float, int]]] = {}
    for name, batch in read_batches(params, params.num_samples, mix):
        measured[name].add(batch)
        room = (_MOST_TILES // len(parts) or 1) - sum(of == name for of, _, _ in tiles)
        for images, text in map(read_pictures, RECORDING.samples[:room]):
            if pictures := list(islice(images, _MOST_IN_TILE)):
                tiles.append((name, pictures, text))
    if tiles:
        _draw_sheet(tiles, params.output)
    return {
        "samples": sum(each.num_samples for each in measured.values()),
        "mix": _describe_mix(mix, data.shares() if isinstance(data, MixtureDataParams) else {data.type: 1.0}),
        "datasets": {name: measured[name].summarize(longest_text(part)) for name, part in parts.items()},
        "contact_sheet": params.output if tiles else None,
    }


def read_batches(
    params: TrainExperimentParams,
    num_samples: int,
    mix: dict[str, dict[str, tuple[float, int]]] | None = None,
    *,
    split: Split = "train",
    first_global_batch: int = 0,
) -> Iterator[tuple[str, Batch]]:
    """Yield the name of the dataset (its type, unless it is part of a mixture) and each microbatch, in training order.

    RECORDING holds what was recorded of the samples of this microbatch.

    Args:
        params: a resolved config; everything is loaded in this process, and no share of bad samples is too much.
        num_samples: stop after the microbatch with which there are as many.
        mix: is filled, at the end, with {dataset: {manifest: (weight, samples)}}.
        split: "train", or "validation" for the validation data.
        first_global_batch: global batches before it are not read.

    Raises:
        ValueError: the data cannot be read.
    """
    data, hparams = _in_this_process(params.data), params.hparams
    loader = create_dataloader(
        data,
        World(),
        global_batch_size=hparams.global_batch_size,
        per_gpu_batch_size=hparams.per_gpu_batch_size,
        seed=hparams.seed if data.seed is None else data.seed,
        split=split,
        total_samples=params.total_val_samples if split == "validation" else None,
    )
    counts: Counter[str] = Counter()
    with closing(loader), RECORDING.on():
        for batch in loader.microbatches(first_global_batch):
            name = batch.get("dataset", data.type)
            counts[name] += len(batch["positions"])
            yield name, batch
            RECORDING.clear()
            if counts.total() >= num_samples:
                break
        loaders = loader.loaders if isinstance(loader, MixtureLoader) else {data.type: loader}
        if mix is not None:
            mix |= {name: each.mix(counts[name]) for name, each in loaders.items()}


def _in_this_process(data: DataParams) -> DataParams:
    """Return the params with all loading in this process, without a limit of bad samples or epochs."""
    alone: dict[str, Any] = {"num_workers": 0, "max_bad_fraction": 1.0, "allow_multiple_epochs": True}
    if isinstance(data, MixtureDataParams):
        alone["datasets"] = {name: _in_this_process(part) for name, part in data.datasets.items()}
    return replace(data, **alone)


def longest_text(data: DataParams) -> int:
    """Return how many tokens a sample may have."""
    limit = data.max_text_seq_len if isinstance(data, RoboticsDataParams) else None
    return data.seq_len if limit is None else limit


def _describe_mix(
    mix: dict[str, dict[str, tuple[float, int]]], shares: dict[str, float]
) -> dict[str, dict[str, float | int]]:
    """Return each manifest's weight in the run and what it really was; a part of one manifest goes by its own name."""
    total = sum(count for parts in mix.values() for _, count in parts.values())
    return {
        (name if len(parts) == 1 else manifest): {
            "weight": shares[name] * weight,
            "share": count / total,
            "samples": count,
        }
        for name, parts in mix.items()
        for manifest, (weight, count) in parts.items()
    }


def format_report(report: dict[str, Any]) -> list[str]:
    """Return the report as lines of text."""
    lines = [f"{report['samples']} samples, in training order", "", "mix:"]
    for name, mix in report["mix"].items():
        lines.append(f"  {name}: {mix['samples']} samples, {mix['share']:.1%} (its weight: {mix['weight']:.1%})")
    for name, dataset in report["datasets"].items():
        lines += ["", f"{name}:"]
        if (tokens := dataset["tokens"]) is not None:
            lines.append(
                f"  tokens per sample: min {tokens['min']}, median {tokens['p50']}, 95% {tokens['p95']}, max "
                f"{tokens['max']}; {tokens['truncated_share']:.1%} exceed seq_len + 1 = {tokens['seq_len'] + 1} and "
                "are cut"
            )
        if dataset["padding_share"] is not None:
            lines.append(f"  padding: {dataset['padding_share']:.1%} of all tokens")
        times = ", ".join(f"{step} {time:.3g}" for step, time in dataset["ms_per_sample"].items())
        lines.append(f"  median ms per sample: {times}")
        bad = ", ".join(f"{reason} {count}" for reason, count in dataset["bad_samples"].items())
        lines.append(f"  bad samples, replaced: {bad or 'none'}")
    sheet = report["contact_sheet"]
    return [*lines, "", f"{sheet}: pictures with their texts" if sheet else "no pictures"]


def read_pictures(sample: Sample) -> tuple[Iterator[np.ndarray], str]:
    """Return a recorded sample's pictures as the model gets them, each (H, W, 3), and its text."""
    pixels = sample.get("inputs", {}).get("pixel_values", ())
    window = sample.get("window")
    stored = [sample[name] for name in find_images(sample)] if window is None else window.images
    if len(pixels) and pixels[0].ndim == 3 and pixels[0].shape[0] == 3:
        images = iter(pixels)
    else:  # the model gets patches: show what is stored
        images = (decode_image(image) for image in stored if image is not None)
    turns = " / ".join(turn.content for turn in sample.get("turns", ()))
    document = "".join(IMAGE_MARKER if part is None else part for part in sample.get("parts", ()))
    return (np.asarray(image.permute(1, 2, 0)) for image in images), sample.get("instruction") or turns or document


def _draw_sheet(tiles: list[tuple[str, list[np.ndarray], str]], path: str) -> None:
    num_rows = -(-len(tiles) // _NUM_COLUMNS)
    sheet = Image.new("RGB", (_NUM_COLUMNS * _SIDE, num_rows * (_SIDE + _TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, pictures, text) in enumerate(tiles):
        row, column = divmod(number, _NUM_COLUMNS)
        left, top = column * _SIDE, row * (_SIDE + _TEXT)
        per_row = math.ceil(math.sqrt(len(pictures)))
        cell = _SIDE // per_row
        for place, picture in enumerate(map(Image.fromarray, pictures)):
            scale = (cell - 4) / max(picture.size)
            size = [max(1, round(side * scale)) for side in picture.size]
            below, right = divmod(place, per_row)
            sheet.paste(picture.resize((size[0], size[1])), (left + right * cell + 2, top + below * cell + 2))
        lines = textwrap.wrap(f"{name}: {text}", _LINE_LENGTH, max_lines=_NUM_LINES, placeholder=" ...")
        for line_number, line in enumerate(lines):
            # the built-in font has Latin characters only
            shown = line.encode("latin-1", "replace").decode("latin-1")
            draw.text((left + 2, top + _SIDE + line_number * _LINE_HEIGHT), shown, fill="black")
    with replace_file(path) as temporary:
        sheet.save(temporary, "PNG")
