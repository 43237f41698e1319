"""What a run keeps of its robot data, so that the run folder alone is enough to use the model on a robot.

normalizer.json             how each field is normalized: all that `RoboticsNormalizer.from_state` needs
stats.json                  statistics of these fields over all training datasets
robotics.json               the spec of the model: its cameras in order, its fields and what they mean
preprocessing_config.yaml   how images and windows were made; of several datasets {0: ..., 1: ...}
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from vla_foundry.data.robotics.datasets import complete_params, read_specs
from vla_foundry.data.robotics.normalizer import create_normalization
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.robotics.fit import find_camera
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.robotics.spec import (
    SPEC_NAME,
    CameraDescription,
    DatasetSpec,
    FieldDescription,
    NamedSpec,
    format_spec,
    parse_spec,
)
from vla_foundry.robotics.statistics_format import format_statistics
from vla_foundry.run_folder import NORMALIZER_NAME, PREPROCESSING_CONFIG_NAME, STATISTICS_NAME
from vla_foundry.storage.uri import join_uri, parent_uri, read_text, write_text


def save_robotics_files(params: RoboticsDataParams, folder: Path) -> None:
    """Write the files above to a run folder.

    Raises:
        FileNotFoundError: a dataset or its statistics are gone.
        ValueError: they are not what they should be, or the run was begun with another normalizer.
    """
    params = complete_params(params)
    datasets = read_specs(params.dataset_manifest)
    normalization = create_normalization(params, datasets)
    state = json.dumps(normalization.normalizer.state(), indent=1) + "\n"
    kept_state = folder / NORMALIZER_NAME
    if kept_state.exists() and kept_state.read_text() != state and not params.accept_changed_data:
        raise ValueError(
            f"data.dataset_statistics or data.normalization are not those that {kept_state} was made from, so the "
            "model's numbers would mean something else. Restore them, start another run, or go on with "
            "--data.accept_changed_data true."
        )
    write_text(str(kept_state), state)
    write_text(str(folder / STATISTICS_NAME), format_statistics(normalization.statistics))
    write_text(str(folder / SPEC_NAME), format_spec(describe_inputs(params, datasets)))
    configs = [_read_config(manifest) for manifest in params.dataset_manifest]
    if any(configs):
        kept: Any = configs[0] if len(configs) == 1 else dict(enumerate(configs))
        write_text(str(folder / PREPROCESSING_CONFIG_NAME), yaml.safe_dump(kept, sort_keys=False))


def load_normalizer(folder: str | Path) -> RoboticsNormalizer:
    """Read the normalizer of a run.

    Raises:
        FileNotFoundError: the run has none.
        ValueError: it is broken.
    """
    location = join_uri(str(folder), NORMALIZER_NAME)
    return RoboticsNormalizer.from_state(json.loads(read_text(location)), origin=location)


def load_spec(folder: str | Path) -> DatasetSpec:
    """Read the spec of a run: what its model takes and gives.

    Raises:
        FileNotFoundError: the run has none.
        ValueError: it is broken.
    """
    location = join_uri(str(folder), SPEC_NAME)
    return parse_spec(read_text(location), location)


def describe_inputs(params: RoboticsDataParams, datasets: Sequence[NamedSpec]) -> DatasetSpec:
    """Return the spec of a model that is trained with these params: cameras in its order, the fields it uses."""
    fields: dict[str, FieldDescription] = {}
    for name, spec in datasets:
        # a robot gives absolute poses, so that relative ones are computed as of whole episodes
        live = replace(spec, layout="episodes")
        for list_name in ("action_fields", "proprioception_fields"):
            try:
                plan = params.plan_fields(list_name, NamedSpec(name, live))
            except ValueError:  # the dataset holds relative poses alone
                plan = params.plan_fields(list_name, NamedSpec(name, spec))
            stored = {field: spec.fields[field] for field in plan.stored}
            # those that a config names first, then what relative poses refer to
            fields = fields | {field: value for field, value in plan.descriptions.items() if field not in fields}
            fields = fields | {field: value for field, value in stored.items() if field not in fields}
    first = datasets[0].spec
    rates = {spec.fps for _, spec in datasets if spec.fps is not None}
    groups = params.parse_groups() or ()
    return DatasetSpec(
        layout="episodes",
        fps=min(rates, default=None),
        past_lowdim_steps=params.window.past,
        future_lowdim_steps=params.window.future,
        image_indices=tuple(params.image_indices or []),
        padding_strategy=first.padding_strategy,
        cameras={name: _describe_camera(name, datasets) for name in params.camera_names or []},
        fields=fields,
        pose_groups=tuple(
            group for group in groups if group.position_key in fields or group.relative_keys[0] in fields
        ),
        language_types=tuple(params.language_instruction_types) if params.use_language else (),
    )


def _describe_camera(name: str, datasets: Sequence[NamedSpec]) -> CameraDescription:
    for origin, spec in datasets:
        camera = find_camera(name, spec, origin)
        if camera is not None:
            return spec.cameras[camera]
    raise ValueError(f"data.camera_names: no dataset has '{name}'. Leave it out.")


def _read_config(manifest: str) -> Any:
    try:
        return yaml.safe_load(read_text(join_uri(parent_uri(manifest), PREPROCESSING_CONFIG_NAME)))
    except FileNotFoundError:
        return None
