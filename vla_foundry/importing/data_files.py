"""Write the data section of an imported run, its tokenizer or processor, and its robot files."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from vla_foundry.importing.configs import ImportedConfig
from vla_foundry.importing.robot_files import complete_params, read_robot_data, write_robot_files
from vla_foundry.importing.source import Source
from vla_foundry.params.commands.runs import ImportParams
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.models.roles import LanguageModelParams
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.text.chat_tokenizer import CHAT_TEMPLATE
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
        found = read_robot_data(source, fps=params.fps)
        data = replace(data, use_language=config.model.image_inputs().takes_text)
        data = complete_params(data, found, source.folder)
        write_robot_files(found, data, folder)
        if params.fps is None:
            lines.append("fps is not known: the earlier files do not say. Give --fps if it matters.")
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
        return None, ["The source has no config.yaml: the run has weights and a model config, and knows no data."]
    _copy(data, folder)
    output = Path(params.output)
    experiment = TrainExperimentParams(name=output.name, save_path=str(output.parent), data=data, model=config.model)
    return experiment, [f"The source has no config.yaml: all of it but the model and {name} is at its default."]


def _fit_processor(data: Data, config: ImportedConfig) -> Data:
    """Fit our own processor to the model's images and the tokenizer's prompt layout."""
    inputs = config.model.image_inputs()
    if data.processor is not None:
        return data
    if data.prompt_layout == CHAT_TEMPLATE and data.tokenizer is not None:
        # without a chat template, images and text were simply concatenated
        has_template = load_tokenizer(data.tokenizer).chat_template is not None
        data = replace(data, prompt_layout=CHAT_TEMPLATE if has_template else "caption")
    return replace(data, image_size=inputs.image_size, img_num_tokens=inputs.img_num_tokens)


def _copy(data: DataParams, folder: Path) -> None:
    try:
        copy_tokenizer(data, folder)
    except ValueError as error:
        raise ValueError(
            f"{error} Give a folder that has it, with --processor or --tokenizer, or run this where it can be loaded."
        ) from None
