"""What the doctor finds in samples that are drawn as training and validation draw them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from vla_foundry.config.command_line import describe_error
from vla_foundry.data.pipelines.stages import RECORDING, Sample
from vla_foundry.data.robotics import Normalization
from vla_foundry.images.codec import decode_image
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.storage.uri import parent_uri
from vla_foundry.viz.data_report import Measured, longest_text, read_batches

Severity = Literal["error", "warning", "info"]
# a commanded and a measured column that belong together: spread and correlation
_SPREADS, _SAME, _OPPOSITE = (1 / 3, 3.0), 0.7, -0.5
# shares: predicted steps beyond the end; bad samples
_MOST_BEYOND, _BAD_SHARE = 0.3, 0.001
# validation samples to draw at most
_MOST_VALIDATION = 64
# cameras are compared by mean pictures of this side, of so many samples at least; those that may be swapped are this
# much nearer to each other than each is to its namesake
_THUMBNAIL, _LEAST_PICTURES, _NEARER = 16, 4, 0.5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    severity: Severity
    # what is wrong, or what was found to be as it should
    text: str
    # flag or command that mends it; "": nothing to mend
    fix: str = ""
    # the part of a mixture; "": the config
    dataset: str = ""


@dataclass
class _Drawn:
    """What was drawn of one robot dataset."""

    measured: Measured = field(default_factory=Measured)
    # (A,) and (P,) at the anchor
    actions: list[np.ndarray] = field(default_factory=list)
    proprioception: list[np.ndarray] = field(default_factory=list)
    # predicted steps, and those of them within the episode
    num_steps: int = 0
    num_inside: int = 0
    # {dataset: {camera: small pictures at the anchor}}
    pictures: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)


def check_samples(
    params: TrainExperimentParams,
    num_samples: int,
    parts: Mapping[str, DataParams],
    normalizations: Mapping[str, Normalization],
) -> Iterator[Finding]:
    """Draw samples as training does."""
    drawn = {name: _Drawn() for name in parts}
    num_datasets = sum(len(data.dataset_manifest) for data in parts.values() if isinstance(data, RoboticsDataParams))
    try:
        for dataset, batch in read_batches(params, num_samples):
            name = dataset if dataset in drawn else ""
            one, data = drawn[name], parts[name]
            one.measured.add(batch)
            if isinstance(data, RoboticsDataParams):
                _add_robots(one, batch)
                # a single dataset has no other to be compared with
                for shard, sample in zip(batch["shards"], RECORDING.samples if num_datasets > 1 else (), strict=False):
                    _add_pictures(one.pictures.setdefault(parent_uri(shard), {}), sample, data)
    except (ValueError, OSError) as error:
        yield Finding(severity="error", text=describe_error(error))
    for name, one in drawn.items():
        if not one.measured.num_samples:
            continue
        data = parts[name]
        flag = f"--data.datasets.{name}" if name else "--data"
        found = list(_check_drawn(one, data, flag))
        if isinstance(data, RoboticsDataParams) and one.actions and name in normalizations:
            found += _check_pairs(one, data, normalizations[name])
        yield from (replace(finding, dataset=name) for finding in found)
    yield from _check_cameras({folder: seen for one in drawn.values() for folder, seen in one.pictures.items()})
    yield from _check_validation(params, num_samples)


def _check_validation(params: TrainExperimentParams, num_samples: int) -> Iterator[Finding]:
    """Draw a few validation samples, whose faults would show only after hours of training."""
    if params.total_val_samples is None:
        return
    most = min(num_samples, _MOST_VALIDATION, params.total_val_samples)
    measured = Measured()
    try:
        for _, batch in read_batches(params, most, split="validation"):
            measured.add(batch)
    except (ValueError, OSError) as error:
        yield Finding(severity="error", text=f"validation: {describe_error(error)}")
        return
    bad = ", ".join(f"{reason} {count}" for reason, count in measured.bad.items())
    text = f"{measured.num_samples} validation samples drawn, {measured.bad.total()} of them left out"
    yield Finding(severity="warning" if bad else "info", text=f"{text}{f': {bad}' if bad else ''}")


def _add_pictures(seen: dict[str, list[np.ndarray]], sample: Sample, data: RoboticsDataParams) -> None:
    """Add a small picture of each camera at the last time of a window."""
    cameras, window = data.camera_names or [], sample.get("window")
    if window is None:
        return
    for camera, stored in zip(cameras, window.images[-len(cameras) :], strict=False):
        if stored is not None and camera not in (data.depth_cameras or {}):
            pixels = decode_image(stored)
            rows, columns = (np.linspace(0, size - 1, _THUMBNAIL).astype(int) for size in pixels.shape[1:])
            seen.setdefault(camera, []).append(np.asarray(pixels)[:, rows][:, :, columns].astype(np.float32))


def _check_cameras(seen: Mapping[str, Mapping[str, list[np.ndarray]]]) -> Iterator[Finding]:
    """Compare what cameras of the same names see in two datasets."""
    means = {
        folder: {
            name: np.mean(pictures, axis=0) for name, pictures in cameras.items() if len(pictures) >= _LEAST_PICTURES
        }
        for folder, cameras in seen.items()
    }
    for first, second in combinations(means, 2):
        for one, other in combinations(sorted(means[first].keys() & means[second].keys()), 2):
            a, b, c, d = means[first][one], means[first][other], means[second][one], means[second][other]
            as_named = np.abs(a - c).mean() + np.abs(b - d).mean()
            swapped = np.abs(a - d).mean() + np.abs(b - c).mean()
            if swapped < _NEARER * as_named:
                yield Finding(
                    severity="warning",
                    text=f"what camera {one} sees in {first} looks like {other} in {second}, and the reverse: are they "
                    "swapped?",
                    fix="look at both with vla-foundry data inspect, and rename cameras in the field map of one",
                )


def _add_robots(one: _Drawn, batch: Mapping[str, Any]) -> None:
    past, future = batch["past_mask"].numpy(), batch["future_mask"].numpy()
    anchor = batch["actions"].shape[1] - 1 if not future.any() else int(np.argmax(future.any(axis=0)))
    one.actions += list(batch["actions"][:, anchor].numpy())
    one.num_steps += future[:, anchor:].size
    one.num_inside += int((future | past)[:, anchor:].sum())
    if batch.get("proprioception") is not None and batch["proprioception"].shape[-1]:
        one.proprioception += list(batch["proprioception"][:, -1].numpy())


def _check_drawn(one: _Drawn, data: DataParams, flag: str) -> Iterator[Finding]:
    summary = one.measured.summarize(longest_text(data))
    num_bad, num_good = sum(one.measured.bad.values()), one.measured.num_samples
    share = num_bad / max(num_bad + num_good, 1)
    reasons = ", ".join(f"{reason} {count}" for reason, count in one.measured.bad.items())
    if share > data.max_bad_fraction:
        yield Finding(
            severity="error",
            text=f"{share:.1%} of {num_bad + num_good} samples cannot be used ({reasons}): training would stop.",
            fix=f"mend the data, or {flag}.max_bad_fraction {min(1.0, round(2 * share, 3))}",
        )
    elif share > _BAD_SHARE:
        yield Finding(severity="warning", text=f"{num_bad} of {num_bad + num_good} samples are left out: {reasons}")
    else:
        yield Finding(severity="info", text=f"{num_good} samples drawn, {num_bad} of them left out")
    tokens = summary["tokens"]
    if tokens is not None and tokens["truncated_share"]:
        yield Finding(
            severity="warning",
            text=f"{tokens['truncated_share']:.1%} of the samples are longer than {tokens['seq_len']} tokens (up to "
            f"{tokens['max']}) and are cut.",
            fix=f"{flag}.seq_len {tokens['max']}",
        )
    elif tokens is not None:
        yield Finding(
            severity="info",
            text=f"tokens of a sample: median {tokens['p50']}, at most {tokens['max']}, of {tokens['seq_len']}",
        )
    beyond = 1 - one.num_inside / one.num_steps if one.num_steps else 0.0
    if beyond > _MOST_BEYOND:
        yield Finding(
            severity="warning",
            text=f"{beyond:.0%} of the predicted steps lie beyond the end of their episode: the window is long for "
            "these episodes.",
            fix=f"smaller {flag}.lowdim_future_timesteps",
        )


def _check_pairs(one: _Drawn, data: RoboticsDataParams, normalization: Normalization) -> Iterator[Finding]:
    """Compare what is commanded with what is measured, column by column, where they have the same columns.

    Normalization changes neither the sign of a correlation nor, undone by the scale, the spread.
    """
    if not one.proprioception:
        return
    actions, measured = np.stack(one.actions), np.stack(one.proprioception)
    offsets = {}
    for fields, values in ((data.action_fields, actions), (data.proprioception_fields, measured)):
        start = 0
        for name in fields:
            scale = normalization.normalizer.scales[name]
            offsets[name] = values[:, start : start + scale.width] * scale.scale[-1]
            start += scale.width
    for action in data.action_fields:
        for name in data.proprioception_fields:
            first, second = offsets[action], offsets[name]
            if first.shape != second.shape:
                continue
            spreads = first.std(axis=0), second.std(axis=0)
            moves = (spreads[0] > 1e-9) & (spreads[1] > 1e-9)
            together = np.array(
                [np.corrcoef(first[:, c], second[:, c])[0, 1] if moves[c] else 0.0 for c in range(len(moves))]
            )
            # positions that follow positions, and not changes or other quantities
            if moves.sum() < 2 or np.median(np.abs(together[moves])) < _SAME:
                continue
            yield from _compare_pair(action, name, together, spreads)


def _compare_pair(
    action: str, name: str, together: np.ndarray, spreads: tuple[np.ndarray, np.ndarray]
) -> Iterator[Finding]:
    for column, value in enumerate(together.tolist()):
        if value < _OPPOSITE:
            yield Finding(
                severity="warning",
                text=f"column {column} of {action} moves against column {column} of {name} (correlation {value:.2f}), "
                "while others move together: is a sign wrong?",
            )
        elif value > _SAME and not _SPREADS[0] < spreads[0][column] / spreads[1][column] < _SPREADS[1]:
            ratio = spreads[0][column] / spreads[1][column]
            yield Finding(
                severity="warning",
                text=f"column {column} of {action} follows column {column} of {name}, but is {ratio:.3g} times as "
                "large: different units?",
            )
