"""Convert an earlier policy's robot data files to the normalizer, statistics and dataset spec of a run."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vla_foundry.data.robotics import create_normalization, describe_inputs
from vla_foundry.importing.source import Source, read_yaml
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.facts import DatasetFacts
from vla_foundry.robotics.spec import (
    PUBLISHED_LANGUAGE_TYPES,
    SPEC_NAME,
    CameraDescription,
    DatasetSpec,
    NamedSpec,
    describe_published_field,
    find_published_pose_groups,
    format_spec,
)
from vla_foundry.robotics.statistics_format import format_statistics
from vla_foundry.run_folder import NORMALIZER_NAME, PREPROCESSING_CONFIG_NAME, STATISTICS_NAME
from vla_foundry.storage.uri import join_uri, read_text

# older runs use the second name
_PREPROCESSING_NAMES = (PREPROCESSING_CONFIG_NAME, "preprocessing_configs.yaml")


@dataclass(frozen=True, kw_only=True)
class RobotData:
    """The data description in an earlier policy's files."""

    # text of stats.json
    statistics: str
    # its location, for messages
    location: str
    # contents of each dataset's preprocessing_config.yaml, in order
    preprocessing: tuple[dict[str, Any], ...]
    # all fields that have statistics
    spec: DatasetSpec


def read_robot_data(source: Source, *, fps: float | None) -> RobotData:
    """Read statistics and preprocessing.

    Args:
        fps: control rate of the policy, frames per second; None: unknown.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is invalid.
    """
    location = join_uri(source.folder, STATISTICS_NAME)
    try:
        text = read_text(location)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{source.folder} has no {STATISTICS_NAME}, without which nothing tells what the policy's numbers mean."
        ) from None
    preprocessing = _read_preprocessing(source)
    spec = _describe_data(_read_widths(text, location), preprocessing, fps)
    return RobotData(statistics=text, location=location, preprocessing=preprocessing, spec=spec)


def complete_params(params: RoboticsDataParams, data: RobotData, folder: str) -> RoboticsDataParams:
    """Fill in what a policy's config takes from its data: cameras, images, steps, pose groups and widths.

    Raises:
        ValueError: a field has no statistics.
    """
    # an empty list meant "take it from the data"
    lists = {name: getattr(params, name) or None for name in ("camera_names", "image_indices", "pose_groups")}
    params = replace(params, **lists, dataset_statistics=[])
    facts = DatasetFacts(manifest=folder, num_samples=0, provenance={}, robotics=data.spec)
    return replace(params, **{name: found.value for name, found in params.derive_from_data([facts]).items()})


def write_robot_files(data: RobotData, params: RoboticsDataParams, folder: Path) -> None:
    """Write normalizer.json, stats.json, robotics.json and preprocessing_config.yaml to a run folder.

    Args:
        params: completed params of the data.

    Raises:
        ValueError: the statistics lack values that the normalization needs.
    """
    dataset = NamedSpec(data.location, data.spec)
    with tempfile.TemporaryDirectory(prefix="vla_foundry_import_") as scratch:
        local = Path(scratch) / STATISTICS_NAME
        local.write_text(data.statistics, encoding="utf-8")
        of_one = {"dataset_manifest": [data.location], "dataset_weighting": [], "dataset_modality": []}
        alone = replace(params, **of_one, dataset_statistics=[str(local)])
        try:
            normalization = create_normalization(alone, [dataset])
        except ValueError as error:
            raise ValueError(str(error).replace(str(local), data.location)) from None
    (folder / NORMALIZER_NAME).write_text(
        json.dumps(normalization.normalizer.state(), indent=1) + "\n", encoding="utf-8"
    )
    (folder / STATISTICS_NAME).write_text(format_statistics(normalization.statistics), encoding="utf-8")
    (folder / SPEC_NAME).write_text(format_spec(describe_inputs(alone, [dataset])), encoding="utf-8")
    kept: Any = data.preprocessing[0] if len(data.preprocessing) == 1 else dict(enumerate(data.preprocessing))
    (folder / PREPROCESSING_CONFIG_NAME).write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")


def _read_preprocessing(source: Source) -> tuple[dict[str, Any], ...]:
    values = read_yaml(source, *_PREPROCESSING_NAMES)
    if values is None:
        raise FileNotFoundError(
            f"{source.folder} has no {PREPROCESSING_CONFIG_NAME}, which tells the cameras and steps of its data."
        )
    found = [values[key] for key in sorted(values)] if all(isinstance(key, int) for key in values) else [values]
    return tuple(_check_preprocessing(part, source.folder) for part in found)


def _check_preprocessing(values: dict[str, Any], folder: str) -> dict[str, Any]:
    missing = {"camera_names", "image_indices", "past_lowdim_steps", "future_lowdim_steps"} - set(values)
    if missing:
        raise ValueError(f"{folder}: {PREPROCESSING_CONFIG_NAME} lacks the key '{min(missing)}'.")
    method = values.get("image_resizing_method")
    # it was stored as the name of a constant
    return values if method is None else {**values, "image_resizing_method": str(method).lower()}


def _read_widths(text: str, location: str) -> dict[str, int]:
    try:
        values = json.loads(text)
        return {name: len(value["mean"]) for name, value in values.items()}
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{location} holds no statistics by field ({type(error).__name__}: {error}).") from None


def _describe_data(
    widths: Mapping[str, int], preprocessing: Sequence[dict[str, Any]], fps: float | None
) -> DatasetSpec:
    first = preprocessing[0]
    size = first.get("resize_images_size")
    # (0, 0) if images kept their sizes
    stored = (int(size[0]), int(size[1])) if size else (0, 0)
    fields = {name: describe_published_field(name, width) for name, width in widths.items()}
    return DatasetSpec(
        layout="samples",
        fps=fps,
        past_lowdim_steps=min(int(part["past_lowdim_steps"]) for part in preprocessing),
        future_lowdim_steps=min(int(part["future_lowdim_steps"]) for part in preprocessing),
        image_indices=tuple(int(index) for index in first["image_indices"]),
        padding_strategy=str(first.get("padding_strategy", "copy")),
        cameras={name: CameraDescription(size=stored, original_size=None) for name in first["camera_names"]},
        fields=fields,
        pose_groups=find_published_pose_groups(fields),
        language_types=PUBLISHED_LANGUAGE_TYPES,
    )
