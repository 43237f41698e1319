"""Write the data section of an imported run, its tokenizer or processor, and its robot files."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vla_foundry.config.loading import dump_value
from vla_foundry.data.robotics import create_normalization, describe_inputs
from vla_foundry.importing.configs import ImportedConfig
from vla_foundry.importing.source import Source, read_yaml
from vla_foundry.params.commands.runs import ImportParams
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.facts import DatasetFacts
from vla_foundry.params.models.roles import LanguageModelParams
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.parsing import parse_object
from vla_foundry.robotics.spec import (
    PUBLISHED_LANGUAGE_TYPES,
    SPEC_NAME,
    CameraDescription,
    DatasetSpec,
    NamedSpec,
    describe_published_field,
    find_published_pose_groups,
    format_spec,
    parse_padding,
)
from vla_foundry.robotics.statistics_format import format_statistics
from vla_foundry.run_folder import NORMALIZER_NAME, PREPROCESSING_CONFIG_NAME, STATISTICS_NAME
from vla_foundry.storage.uri import join_uri, read_text
from vla_foundry.text.chat import CHAT_TEMPLATE
from vla_foundry.text.tokenizers import load_tokenizer
from vla_foundry.training.start import copy_tokenizer

Data = TypeVar("Data", bound=ImageProcessorParams)


def write_data_files(
    source: Source, config: ImportedConfig, params: ImportParams, folder: Path
) -> tuple[TrainExperimentParams | None, list[str]]:
    """Write the data files that inference needs.

    Returns:
        The whole config, with its data completed as `resolve` would (None if the data is unknown), and lines to report.

    Raises:
        FileNotFoundError: a robot data file is missing.
        ValueError: a file is invalid, or a tokenizer or processor cannot be loaded.
    """
    if config.experiment is None:
        return _start_config(config, params, folder)
    data: DataParams = config.experiment.data
    lines: list[str] = []
    if isinstance(data, RoboticsDataParams):
        found = _read_robot_data(source, params.fps)
        data = replace(data, use_language=config.model.image_inputs().takes_text)
        data = _complete_params(data, found, source.folder)
        _write_robot_files(found, data, folder)
        if params.fps is None:
            lines.append("fps is unknown: the earlier files do not store it. Give --fps if it matters.")
    if isinstance(data, ImageProcessorParams):
        data = _fit_processor(data, config)
    elif data.tokenizer_name() is None:
        return replace(config.experiment, data=data), [*lines, "No tokenizer is kept: none is named. Give --tokenizer."]
    _copy(data, folder)
    return replace(config.experiment, data=data), lines


def _start_config(
    config: ImportedConfig, params: ImportParams, folder: Path
) -> tuple[TrainExperimentParams | None, list[str]]:
    """Build what is known about a language or vision-language model's data without a config.yaml."""
    name = params.tokenizer or params.processor
    data: DataParams | None = None
    if isinstance(config.model, LanguageModelParams) and name is not None:
        data = TextDataParams(tokenizer=name)
    elif isinstance(config.model, VLMParams) and name is not None:
        data = _fit_processor(ImageCaptionDataParams(tokenizer=params.tokenizer, processor=params.processor), config)
    if data is None:
        return None, ["The source has no config.yaml: the run has weights and a model config, but no data config."]
    _copy(data, folder)
    output = Path(params.output)
    experiment = TrainExperimentParams(name=output.name, save_path=str(output.parent), data=data, model=config.model)
    return experiment, [f"The source has no config.yaml: everything but the model and {name} is at its default."]


def _fit_processor(data: Data, config: ImportedConfig) -> Data:
    """Fit our own processor to the model's images and the tokenizer's prompt layout."""
    if data.processor is not None:
        return data
    if data.prompt_layout == CHAT_TEMPLATE and data.tokenizer is not None:
        # without a chat template, images and text were simply concatenated
        has_template = load_tokenizer(data.tokenizer).chat_template is not None
        data = replace(data, prompt_layout=CHAT_TEMPLATE if has_template else "caption")
    inputs = config.model.image_inputs()
    return replace(data, image_size=inputs.image_size, img_num_tokens=inputs.img_num_tokens)


def _copy(data: DataParams, folder: Path) -> None:
    try:
        copy_tokenizer(data, folder)
    except ValueError as error:
        raise ValueError(
            f"{error} Give a folder that has it, with --processor or --tokenizer, or run this where it can be loaded."
        ) from None


@dataclass(frozen=True, kw_only=True)
class _RobotData:
    """The data description in an earlier policy's files."""

    # text of stats.json
    statistics: str
    # its location, for messages
    location: str
    # contents of each dataset's preprocessing_config.yaml, in order
    preprocessing: Sequence[dict[str, Any]]
    # all fields that have statistics
    spec: DatasetSpec


def _read_robot_data(source: Source, fps: float | None) -> _RobotData:
    location = join_uri(source.folder, STATISTICS_NAME)
    try:
        text = read_text(location)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{source.folder} has no {STATISTICS_NAME}. Without it, the meaning of the policy's numbers is unknown."
        ) from None
    try:
        widths = {name: len(value["mean"]) for name, value in parse_object(text, location).items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{location} holds no statistics by field ({type(error).__name__}: {error}).") from None
    preprocessing = _read_preprocessing(source)
    spec = _describe_data(widths, preprocessing, fps)
    return _RobotData(statistics=text, location=location, preprocessing=preprocessing, spec=spec)


def _read_preprocessing(source: Source) -> list[dict[str, Any]]:
    # older runs use the second name
    values = read_yaml(source, PREPROCESSING_CONFIG_NAME, "preprocessing_configs.yaml")
    if values is None:
        raise FileNotFoundError(
            f"{source.folder} has no {PREPROCESSING_CONFIG_NAME}, which describes the cameras and steps of its data."
        )
    found = [values[key] for key in sorted(values)] if all(isinstance(key, int) for key in values) else [values]
    for part in found:
        missing = {"camera_names", "image_indices", "past_lowdim_steps", "future_lowdim_steps"} - set(part)
        if missing:
            raise ValueError(f"{source.folder}: {PREPROCESSING_CONFIG_NAME} lacks the key '{min(missing)}'.")
        if part.get("image_resizing_method") is not None:
            # it was stored as the name of a constant
            part["image_resizing_method"] = str(part["image_resizing_method"]).lower()
    return found


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
        padding_strategy=parse_padding(first.get("padding_strategy", "copy")),
        cameras={name: CameraDescription(size=stored, original_size=None) for name in first["camera_names"]},
        fields=fields,
        pose_groups=find_published_pose_groups(fields),
        language_types=PUBLISHED_LANGUAGE_TYPES,
    )


def _complete_params(params: RoboticsDataParams, data: _RobotData, folder: str) -> RoboticsDataParams:
    """Fill in what a policy's config takes from its data: cameras, images, steps, pose groups and widths."""
    # an empty list meant "take it from the data"
    lists = {name: getattr(params, name) or None for name in ("camera_names", "image_indices", "pose_groups")}
    params = replace(params, **lists, dataset_statistics=[])
    facts = DatasetFacts(manifest=folder, num_samples=0, provenance={}, robotics=data.spec)
    return replace(params, **{name: found.value for name, found in params.derive_from_data([facts]).items()})


def _write_robot_files(data: _RobotData, params: RoboticsDataParams, folder: Path) -> None:
    """Write normalizer.json, stats.json, robotics.json and preprocessing_config.yaml to a run folder."""
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
    kept: Any = data.preprocessing[0] if len(data.preprocessing) == 1 else dict(enumerate(data.preprocessing))
    contents = {
        NORMALIZER_NAME: json.dumps(normalization.normalizer.state(), indent=1) + "\n",
        STATISTICS_NAME: format_statistics(normalization.statistics),
        SPEC_NAME: format_spec(describe_inputs(alone, [dataset])),
        PREPROCESSING_CONFIG_NAME: dump_value(kept),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
