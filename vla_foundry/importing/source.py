"""Read a run folder of the earlier implementation, without interpreting it.

config.yaml                 the whole config; config_model.yaml is its model section
vlm_config_model.yaml       published policies: model config of the vision-language model they started from
checkpoints/checkpoint_N.pt {state_dict, global_step, ...}; ema_N.pt {ema_state_dict, ...} beside it
stats.json, config_normalizer.yaml, config_processor.yaml, preprocessing_config.yaml   robot data
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vla_foundry.params.migrations import vlm_config_places
from vla_foundry.parsing import parse_yaml
from vla_foundry.run_folder import CHECKPOINTS_FOLDER, CONFIG_NAME, MODEL_CONFIG_NAME
from vla_foundry.storage.uri import join_uri, list_files, name_of, read_text

_WEIGHTS = re.compile(r"(checkpoint|ema)_(\d+)\.pt")


@dataclass(frozen=True, kw_only=True)
class Source:
    """An earlier run."""

    folder: str
    # file that the configs come from, for messages
    config_location: str
    # the whole config; None if only the model config exists
    config: dict[str, Any] | None
    model_config: dict[str, Any]
    # checkpoint_N.pt
    weights: str
    # ema_N.pt; None if absent
    ema: str | None

    @property
    def precision(self) -> str | None:
        """Return the training precision, if known."""
        hparams = (self.config or {}).get("hparams") or {}
        return hparams.get("precision")


def read_source(folder: str, checkpoint: int | None) -> Source:
    """Read the configs and find the weights.

    Args:
        checkpoint: the N of checkpoint_N.pt; None: the highest.

    Raises:
        FileNotFoundError: the folder, a config or the checkpoint does not exist.
        ValueError: a config is not a mapping.
    """
    config = _read_mapping(join_uri(folder, CONFIG_NAME))
    model_config = _read_mapping(join_uri(folder, MODEL_CONFIG_NAME))
    if config is not None and not isinstance(config.get("model"), dict):
        raise ValueError(f"{join_uri(folder, CONFIG_NAME)} has no section model. Is it the config of a run?")
    if config is None and model_config is None:
        raise FileNotFoundError(
            f"source {folder} is not a run of the earlier implementation: it has neither {CONFIG_NAME} nor "
            f"{MODEL_CONFIG_NAME}."
        )
    weights, ema = _find_weights(folder, checkpoint)
    return Source(
        folder=folder,
        config_location=join_uri(folder, MODEL_CONFIG_NAME if config is None else CONFIG_NAME),
        config=config,
        model_config=(config or {}).get("model") or model_config or {},
        weights=weights,
        ema=ema,
    )


def read_yaml(source: Source, *names: str) -> dict[Any, Any] | None:
    """Read the first of these files that the run has; None if it has none.

    Raises:
        ValueError: the file is not a mapping.
    """
    found = (_read_mapping(join_uri(source.folder, name)) for name in names)
    return next((values for values in found if values is not None), None)


def read_vlm_config(source: Source, given: str | None) -> dict[str, Any] | None:
    """Read the model config of the vision-language model that a policy started from; None if it has none.

    Args:
        given: location given by the user; None: take it from the policy's config.

    Raises:
        FileNotFoundError: it is in none of the possible places.
        ValueError: it is not a mapping.
    """
    backbone = source.model_config.get("vision_language_backbone")
    if not isinstance(backbone, dict) or backbone.get("type") != "vlm_foundry_backbone":
        return None
    places = list(_vlm_places(source, backbone, given))
    for place in places:
        found = _read_mapping(place)
        if found is not None:
            return found
    raise FileNotFoundError(
        f"{source.config_location}: the vision-language model that the policy started from is in none of "
        f"{', '.join(places)}. Say where it is with --vlm_source FOLDER."
    )


def _vlm_places(source: Source, backbone: dict[str, Any], given: str | None) -> Iterator[str]:
    if given is None:
        names = (backbone.get(key) for key in ("vlm_experiment_dir", "resume_from_checkpoint"))
        yield from vlm_config_places(source.folder, *names)
    else:
        yield given if given.endswith((".yaml", ".yml")) else join_uri(given, MODEL_CONFIG_NAME)


def _find_weights(folder: str, checkpoint: int | None) -> tuple[str, str | None]:
    location = join_uri(folder, CHECKPOINTS_FOLDER)
    found: dict[tuple[str, int], str] = {}
    for file in list_files(location):
        match = _WEIGHTS.fullmatch(name_of(file))
        if match is not None:
            found[match[1], int(match[2])] = file
    numbers = sorted(number for kind, number in found if kind == "checkpoint")
    if not numbers:
        raise FileNotFoundError(f"{location} has no checkpoint_N.pt.")
    number = numbers[-1] if checkpoint is None else checkpoint
    if number not in numbers:
        raise FileNotFoundError(
            f"{location} has no checkpoint_{checkpoint}.pt. There are {', '.join(map(str, numbers))} (--checkpoint)."
        )
    return found["checkpoint", number], found.get(("ema", number))


def _read_mapping(location: str) -> dict[str, Any] | None:
    try:
        values = parse_yaml(read_text(location), location)
    except FileNotFoundError:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{location} does not hold a mapping of keys. Is it a config file?")
    return values
