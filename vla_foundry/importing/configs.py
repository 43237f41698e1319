"""Translate the config of an earlier run, with one line for each thing that changed.

Where a policy's original numerics differ from ours, the translation sets parity switches; docs/importing.md lists them
with the reasons, and names the differences that remain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_foundry.config.decode import Decoding, decode
from vla_foundry.config.loading import dump_inline, dump_value
from vla_foundry.config.yaml_source import parse_inline
from vla_foundry.importing.source import Source, read_vlm_config, read_yaml
from vla_foundry.params.commands.runs import ImportParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.migrations import BF16_PRECISIONS, list_rounded_transformers
from vla_foundry.params.models.roles import ModelParams

_POLICY = "diffusion_policy"
_STARTS = ("resume_from_checkpoint", "resume_weights_only")
# the processor `simple_vlm` and the tokenizer it used
_SIMPLE_VLM, _SIMPLE_VLM_TOKENIZER = "simple_vlm", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
# processors without a counterpart here
_OTHER_PROCESSORS = ("stable_diffusion", "debug", "none")
# prompt by data type: one turn, images first
_PROMPTS = {"robotics": "<image>{instruction}", "image_caption": "<image>"}


@dataclass(frozen=True, kw_only=True)
class ImportedConfig:
    """The translated config of a run."""

    model: ModelParams
    # None: the source has no config.yaml, so its training data is unknown
    experiment: TrainExperimentParams | None
    # one line for each key that is renamed, left out or set
    lines: tuple[str, ...]


def translate(source: Source, params: ImportParams, *, has_bf16_tables: bool) -> ImportedConfig:
    """Translate the config.

    Args:
        has_bf16_tables: True if the checkpoint stores rotary frequencies in bf16.

    Raises:
        ValueError: a key or value is not understood; one line with its config path.
        FileNotFoundError: the config of the model that a policy started from is missing.
    """
    try:
        model, lines = _translate_model(source, params, has_bf16_tables)
        if source.config is None:
            decoded, notices = _decode(ModelParams, model, "model")
            return ImportedConfig(model=decoded, experiment=None, lines=(*lines, *notices))
        data, data_lines = _translate_data(source, source.config.get("data") or {}, params)
        root, root_lines = _translate_root(source.config, Path(params.output))
        experiment, notices = _decode(TrainExperimentParams, {**root, "model": model, "data": data}, "")
    except ValueError as error:
        raise ValueError(f"{source.config_location}: {error}") from None
    return ImportedConfig(
        model=experiment.model, experiment=experiment, lines=(*lines, *data_lines, *root_lines, *notices)
    )


def _decode(cls: Any, values: dict[str, Any], path: str) -> tuple[Any, list[str]]:
    decoding = Decoding(root=cls)
    decoded = decode(cls, parse_inline(dump_value(values)), decoding, path)
    renamed = [f"{old} is called {new} now." for old, new in decoding.renamed.items()]
    ignored = [f"{key} is left out: {reason}." for key, reason in decoding.ignored.items()]
    implied = [f"parity: {key} is {value}" for key, value in decoding.implied.items()]
    return decoded, [*decoding.notices, *renamed, *sorted(ignored), *implied]


def _translate_model(source: Source, params: ImportParams, has_bf16_tables: bool) -> tuple[dict[str, Any], list[str]]:
    model, lines = source.model_config, []
    vlm = read_vlm_config(source, params.vlm_source)
    if model.get("type") == _POLICY:
        if model.get("freeze"):
            lines.append("model.freeze is left out: nothing is trained in a run that is complete.")
        model = {key: value for key, value in model.items() if key != "freeze"}
        if vlm is not None:
            backbone = {**model["vision_language_backbone"], "vlm": vlm}
            backbone.pop("vlm_experiment_dir", None)
            model["vision_language_backbone"] = backbone
    model = _without_starts(model, "model", lines)
    if has_bf16_tables or source.precision in BF16_PRECISIONS:
        for path in list_rounded_transformers(parse_inline(dump_value(model)), "model", source.precision):
            lines.append(f"parity: {path}.rope_bf16_frequencies is true (trained in bf16)")
            section = model
            for key in path.split(".")[1:]:
                section = section[key]
            section["rope_bf16_frequencies"] = True
    return model, lines


def _without_starts(section: Any, path: str, lines: list[str]) -> Any:
    """Return a model section without the keys that name initial weights: the checkpoint holds the weights."""
    if not isinstance(section, dict):
        return section
    start = section.get(_STARTS[0])
    if start is not None:
        lines.append(f"{path}.{_STARTS[0]} ({start}) is left out: the weights are in the checkpoint.")
    return {key: _without_starts(value, f"{path}.{key}", lines) for key, value in section.items() if key not in _STARTS}


def _translate_data(source: Source, old: dict[str, Any], params: ImportParams) -> tuple[dict[str, Any], list[str]]:
    data, lines = {}, []
    for key, value in old.items():
        if isinstance(value, list) and None in value:
            lines.append(f"data.{key}: empty entries are left out.")
            value = [item for item in value if item is not None]
        data[key] = value
    if old.get("type") in _PROMPTS:
        data["prompts"] = [_PROMPTS[old["type"]]]
    if old.get("type") == "robotics":
        lines += _compare_files(source, data)
        lines += _match_field_configs(data)
    if "processor" not in old:
        return data | ({} if params.tokenizer is None else {"tokenizer": params.tokenizer}), lines
    processor = old["processor"]
    if params.processor is not None:
        data |= {"processor": params.processor, "tokenizer": None}
    elif processor == _SIMPLE_VLM or (params.tokenizer is not None):
        data |= {"processor": None, "tokenizer": params.tokenizer or _SIMPLE_VLM_TOKENIZER}
        # captions were written into the user's turn, without an answer
        layout = "chat_template" if old.get("type") == "robotics" else "caption"
        data |= {"image_resizing_method": "resize_no_crop", "prompt_layout": layout}
    elif processor in _OTHER_PROCESSORS:
        raise ValueError(
            f"data.processor '{processor}' was part of the earlier implementation. Name another with --processor, or a "
            "tokenizer for our own with --tokenizer."
        )
    if data["processor"] != processor:
        lines.append(f"data.processor ({processor}) is {data['processor'] or 'our own, with ' + data['tokenizer']}.")
    return data, lines


def _compare_files(source: Source, data: dict[str, Any]) -> list[str]:
    """Use the normalization saved with the policy; report where its files and its config differ."""
    lines = []
    normalization = read_yaml(source, "config_normalizer.yaml")
    if normalization is not None and normalization != data.get("normalization"):
        lines.append("data.normalization is that of config_normalizer.yaml, which differs from config.yaml's.")
        data["normalization"] = normalization
    processor = read_yaml(source, "config_processor.yaml") or {}
    return lines + [
        f"data.{key} is {dump_inline(data[key])}, although config_processor.yaml has {dump_inline(value)}."
        for key, value in processor.items()
        if key in data and value != data[key] and not isinstance(value, dict)
    ]


def _match_field_configs(data: dict[str, Any]) -> list[str]:
    """Give each field its own entry in normalization.field_configs; entries used to match part of a field's name."""
    normalization = data.get("normalization") or {}
    configs = normalization.get("field_configs") or {}
    names = [*(data.get("proprioception_fields") or []), *(data.get("action_fields") or [])]
    exact = {name: found for name in names if (found := match_field_config(name, configs)) is not None}
    data["normalization"] = normalization | {"field_configs": exact}
    return [
        f"data.normalization.field_configs.{key} is left out: each field has an entry of its own."
        for key in configs
        if key not in exact
    ]


def match_field_config(name: str, configs: Mapping[str, Any]) -> Any:
    """Return a field's entry as the earlier implementation found it: an exact match, or the first substring match.

    Fields whose names contain certain words were not normalized at all.
    """
    if any(word in name for word in ("text", "language", "instruction", "mask", "valid")):
        return {"enabled": False}
    return configs.get(name) or next((value for key, value in configs.items() if key in name), None)


def _translate_root(config: dict[str, Any], output: Path) -> tuple[dict[str, Any], list[str]]:
    root = dict(config)
    lines = []
    root |= {"name": output.name, "save_path": str(output.parent), "resolve_configs": False}
    root["resolve_configs_path"] = None
    if root.get("remote_sync") is not None:
        lines.append(f"remote_sync ({root['remote_sync']}) is left out: the imported run is a copy.")
    root["remote_sync"] = None
    return root, lines
