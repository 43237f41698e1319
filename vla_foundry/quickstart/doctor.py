"""`vla-foundry doctor --config_path FILE`: look for faults in a config and its data before anything is trained."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np

from vla_foundry.config.command_line import describe_error, parse_command
from vla_foundry.config.resolve import resolve
from vla_foundry.data.facts import read_facts
from vla_foundry.data.robotics import Normalization, create_normalization, read_specs
from vla_foundry.params.commands.runs import DoctorParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.quickstart.samples import Finding, Severity, check_samples
from vla_foundry.robotics.fit import find_camera
from vla_foundry.robotics.normalization import FieldScale
from vla_foundry.robotics.spec import FieldDescription, NamedSpec
from vla_foundry.robotics.statistics import FieldStatistics
from vla_foundry.robotics.statistics_format import parse_statistics
from vla_foundry.shards import parse_manifest
from vla_foundry.storage.uri import file_test, parent_uri, read_text

# exit code after the worst finding
_EXIT_CODES: dict[Severity, int] = {"error": 2, "warning": 3, "info": 0}
# a normalized value beyond this is an outlier
_OUTLIER = 10.0
# the middle 98% of the values fill less than this share of a min_max range
_USED_SHARE = 0.2
# angles in radians stay below two turns
_MOST_RADIANS = 4 * np.pi
# positions of a robot on a table, metres
_MOST_METRES = 10.0
# seconds of a chunk
_SHORT_CHUNK, _LONG_CHUNK = 0.1, 5.0
# shares: pixels that a crop cuts off; stored sides over the model's
_MOST_CROPPED, _MOST_LARGER = 0.25, 3.0
# columns whose values are printed
_SHOWN_COLUMNS = 8


def main(argv: list[str]) -> None:
    """Run `vla-foundry doctor`.

    Raises:
        SystemExit: 2 if there is an error, 3 if there is a warning.
        ValueError: an argument is wrong.
    """
    params = parse_command(DoctorParams, argv, prog="vla-foundry doctor")
    findings = examine(params)
    if params.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in format_findings(findings)))
    code = max((_EXIT_CODES[finding.severity] for finding in findings), key=lambda code: (code == 2, code), default=0)
    if code:
        sys.stdout.flush()
        raise SystemExit(code)


def format_findings(findings: Sequence[Finding]) -> list[str]:
    """Return the findings as text, the worst first."""
    lines = []
    for severity in _EXIT_CODES:
        for finding in findings:
            if finding.severity == severity:
                where = f"{finding.dataset}: " if finding.dataset else ""
                lines.append(f"{severity:<8}{where}{finding.text}")
                lines += [f"        fix: {finding.fix}"] if finding.fix else []
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in _EXIT_CODES}
    return [*lines, f"{counts['error']} errors, {counts['warning']} warnings"]


def examine(params: DoctorParams) -> list[Finding]:
    """Examine a config and its data; what fails is a finding too."""
    try:
        resolved = resolve(params, read_facts(params, 1))
    except (ValueError, OSError) as error:
        return [Finding(severity="error", text=describe_error(error))]
    findings: list[Finding] = []
    is_mixture = isinstance(resolved.data, MixtureDataParams)
    parts = resolved.data.datasets if isinstance(resolved.data, MixtureDataParams) else {"": resolved.data}
    normalizations: dict[str, Normalization] = {}
    for name, data in parts.items():
        flag = f"--data.datasets.{name}" if is_mixture else "--data"
        if not isinstance(data, RoboticsDataParams):
            continue
        found: list[Finding] = []
        try:
            specs = read_specs(data.dataset_manifest)
            found += _check_window(data, specs, flag)
            found += _check_images(data, specs, flag)
            normalizations[name] = create_normalization(data, specs)
            found += _check_statistics(data, specs)
            found += _check_fields(data, specs, normalizations[name], flag)
        except (ValueError, OSError) as error:
            found.append(Finding(severity="error", text=describe_error(error)))
        findings += [replace(finding, dataset=name) for finding in found]
    findings += check_samples(resolved, params.num_samples, parts, normalizations)
    return findings + list(_check_machine(resolved))


def _check_statistics(data: RoboticsDataParams, specs: Sequence[NamedSpec]) -> Iterator[Finding]:
    """Compare the number of samples in each statistics file with the manifest's."""
    for dataset, path in zip(specs, data.dataset_statistics, strict=False):
        name = dataset.name
        statistics = parse_statistics(read_text(path), path, anchor_index=dataset.spec.past_lowdim_steps)
        count = max((int(each.count.max()) for each in statistics.values()), default=0)
        entries = parse_manifest(read_text(name), name, file_test(parent_uri(name)))
        total = sum(entry.num_sequences for entry in entries)
        if count != total:
            yield Finding(
                severity="warning",
                text=f"{path} is of {count:,} samples, but {name} has {total:,}: the shards have changed since.",
                fix=f"vla-foundry stats {parent_uri(name)} --overwrite true",
            )


def _check_fields(
    data: RoboticsDataParams, specs: Sequence[NamedSpec], normalization: Normalization, flag: str
) -> Iterator[Finding]:
    described = {name: field for dataset in specs for name, field in data.describe_fields(dataset).items()}
    for dimension in normalization.normalizer.near_constant:
        name = dimension.partition("[")[0]
        yield Finding(
            severity="warning",
            text=f"{dimension} hardly varies: its noise is scaled up as if it were motion.",
            fix=f"{flag}.normalization.field_configs '{{{name}: {{range_floor: 0.01}}}}' (in the field's unit), or "
            "leave the field out",
        )
    for name in dict.fromkeys([*data.action_fields, *data.proprioception_fields]):
        scale, statistics = normalization.normalizer.scales[name], normalization.statistics.get(name)
        description = described[name]
        if name in data.action_fields:
            yield _describe_zero(name, scale, description)
        if statistics is not None:
            yield from _check_outliers(name, scale, statistics, description, flag)
            yield from _check_unit(name, statistics, description)


def _describe_zero(name: str, scale: FieldScale, description: FieldDescription) -> Finding:
    center = scale.center[0]
    shown = [
        f"{description.label(column)} {value:.4g}" for column, value in enumerate(center[:_SHOWN_COLUMNS].tolist())
    ]
    more = ", ..." if len(center) > _SHOWN_COLUMNS else ""
    unit = f" {description.unit}" if description.unit else ""
    return Finding(severity="info", text=f"{name}: the model's zero is [{', '.join(shown)}{more}]{unit}")


def _check_outliers(
    name: str, scale: FieldScale, statistics: FieldStatistics, description: FieldDescription, flag: str
) -> Iterator[Finding]:
    low, high = statistics.min, statistics.max
    fix = f"{flag}.normalization.method percentile_1_99 {flag}.normalization.clip 2"
    if scale.rule.enabled and scale.rule.method == "min_max":
        inner = statistics.percentiles[99] - statistics.percentiles[1]
        for column in np.flatnonzero((high > low) & (inner < _USED_SHARE * (high - low))).tolist():
            yield Finding(
                severity="warning",
                text=f"{name}[{description.label(column)}]: 98% of its values fill "
                f"{inner[column] / (high - low)[column]:.0%} of the range that min_max maps; outliers set it.",
                fix=fix,
            )
    elif scale.rule.enabled and scale.rule.clip is None:
        farthest = np.maximum(high - scale.center, scale.center - low) / scale.scale
        for column in np.flatnonzero(farthest.max(axis=0) > _OUTLIER).tolist():
            yield Finding(
                severity="warning",
                text=f"{name}[{description.label(column)}] has values up to {farthest[:, column].max():.0f} after "
                "normalization: few samples dominate the loss.",
                fix=fix,
            )


def _check_unit(name: str, statistics: FieldStatistics, description: FieldDescription) -> Iterator[Finding]:
    largest = np.maximum(np.abs(statistics.min), np.abs(statistics.max))
    for unit, most, other in (("rad", _MOST_RADIANS, "degrees"), ("m", _MOST_METRES, "millimetres")):
        if description.unit == unit and largest.max() > most:
            column = int(largest.argmax())
            yield Finding(
                severity="warning",
                text=f"{name}[{description.label(column)}] reaches {largest[column]:.4g}, and its unit is {unit}: "
                f"is it in {other}?",
                fix="correct the unit in the field map, and preprocess again",
            )
    if description.gripper is None:
        if any("gripper" in label for label in [name, *description.names]) and name.count("relative") == 0:
            yield Finding(
                severity="info",
                text=f"{name}: the values of an open and a closed gripper are not described, so that no other dataset "
                "can contradict them",
                fix="a field map with gripper: {open: ..., closed: ...}",
            )
        return
    low, high = sorted((description.gripper.open, description.gripper.closed))
    if statistics.min.min() < low - 0.1 * (high - low) or statistics.max.max() > high + 0.1 * (high - low):
        yield Finding(
            severity="warning",
            text=f"{name} goes from {statistics.min.min():.4g} to {statistics.max.max():.4g}, but its gripper is open "
            f"at {description.gripper.open:g} and closed at {description.gripper.closed:g}.",
            fix="correct gripper in the field map, and preprocess again",
        )


def _check_window(data: RoboticsDataParams, specs: Sequence[NamedSpec], flag: str) -> Iterator[Finding]:
    rates = {spec.fps for _, spec in specs if spec.fps is not None}
    if not rates:
        yield Finding(severity="info", text="the data does not say how many frames a second it has")
        return
    num_actions, rate = data.window.future + 1, max(rates)
    seconds = num_actions / rate
    severity: Severity = "info" if _SHORT_CHUNK <= seconds <= _LONG_CHUNK else "warning"
    text = f"a chunk of {num_actions} actions lasts {seconds:.2g} s at {rate:g} frames a second"
    fix = f"{flag}.lowdim_future_timesteps {max(1, round(rate)) - 1} for a second" if severity == "warning" else ""
    yield Finding(severity=severity, text=text, fix=fix)


def _check_images(data: RoboticsDataParams, specs: Sequence[NamedSpec], flag: str) -> Iterator[Finding]:
    if data.image_size is None:
        return
    side = data.image_size
    for origin, spec in specs:
        for name in data.camera_names or []:
            camera = find_camera(name, spec, origin)
            if camera is None:
                continue
            width, height = spec.cameras[camera].size
            shorter, longer = sorted((width, height))
            what = f"{name} is stored with {width} x {height} pixels in {origin}, and the model takes {side} x {side}"
            if shorter < side:
                yield Finding(
                    severity="warning",
                    text=f"{what}: images are enlarged, which costs time and adds nothing.",
                    fix="a smaller image encoder, or preprocess again with larger --resize_images_size",
                )
            elif shorter > _MOST_LARGER * side:
                yield Finding(
                    severity="warning",
                    text=f"{what}: most of the time of decoding is wasted.",
                    fix=f"preprocess with --resize_images_size {round(width * side / shorter)} "
                    f"{round(height * side / shorter)} --image_resizing_method resize_no_crop",
                )
            if data.image_resizing_method == "center_crop" and 1 - shorter / longer > _MOST_CROPPED:
                yield Finding(
                    severity="warning",
                    text=f"{what}: the centre crop cuts off {1 - shorter / longer:.0%} of them.",
                    fix=f"{flag}.image_resizing_method resize_fit",
                )


# what memory is, beside half of the machine's
GPU = "GPU"


def read_memory() -> tuple[int, float, str]:
    """Return (ranks, GiB of each, what it is) of this machine: its GPUs, or half of its memory for one process."""
    import torch

    if count := torch.cuda.device_count():
        sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(count)]
        return count, min(sizes) / 2**30, GPU
    return 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**31, "half of this machine's memory"


def _check_machine(params: TrainExperimentParams) -> Iterator[Finding]:
    """Say whether this machine has the memory for a step, and its disk room for the checkpoints."""
    from vla_foundry.hub.plan import advise, count_held, create_meta_model, plan

    gpus, gib, what = read_memory()
    try:
        found = plan(params, gpus=gpus, gpu_memory=gib, headroom=0.1)
        held = count_held(create_meta_model(params), params, 1)
    except ValueError as error:
        yield Finding(severity="info", text=f"memory is not predicted: {describe_error(error)}")
        return
    text = f"a rank needs about {found['settings'][0]['bytes'] / 2**30:.2g} GiB of {gib:.3g} ({what}). {advise(found)}"
    yield Finding(severity="info" if found["settings"][0]["fits"] else "warning", text=text)
    if "://" in params.save_path:
        return
    folder = os.path.abspath(params.save_path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    count = min(params.num_checkpoints, params.max_checkpoint_limit or params.num_checkpoints)
    needed, free = count * (held.weights + held.moments + held.average), shutil.disk_usage(folder).free
    text = f"{count} checkpoints take about {needed / 2**30:.2g} GiB; {folder} has {free / 2**30:.3g} GiB left"
    if needed > free:
        yield Finding(
            severity="error", text=text, fix="--max_checkpoint_limit 1, fewer --num_checkpoints, or another disk"
        )
    else:
        yield Finding(severity="info", text=text)
