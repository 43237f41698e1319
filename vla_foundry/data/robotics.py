"""Read the specs and statistics of robot datasets, and save what a run needs to be used without its datasets.

normalizer.json             how each field is normalized: the input of `RoboticsNormalizer.from_state`
stats.json                  statistics of these fields over all training datasets
robotics.json               the model's spec: its cameras in order, its fields and what they mean
preprocessing_config.yaml   how images and windows were made; {0: ..., 1: ...} for several datasets
datasets/NAME/              the same of the other robots of a mixture
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vla_foundry.config.loading import dump_value
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.facts import DatasetFacts
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.fit import find_camera, width_of
from vla_foundry.robotics.normalization import FieldScale, NormalizationRule, RoboticsNormalizer
from vla_foundry.robotics.spec import (
    SPEC_NAME,
    CameraDescription,
    DatasetSpec,
    FieldDescription,
    NamedSpec,
    format_spec,
    parse_spec,
    read_spec,
)
from vla_foundry.robotics.statistics import FieldStatistics, merge_statistics
from vla_foundry.robotics.statistics_format import format_statistics, parse_statistics
from vla_foundry.run_folder import (
    DATASETS_FOLDER,
    NORMALIZER_NAME,
    PREPROCESSING_CONFIG_NAME,
    STATISTICS_NAME,
    read_side_file,
)
from vla_foundry.storage.uri import is_remote, join_uri, parent_uri, read_object, read_text, read_yaml, write_text


def read_specs(manifests: Sequence[str]) -> list[NamedSpec]:
    """Read the spec of each dataset.

    Raises:
        FileNotFoundError: a manifest does not belong to a robotics dataset.
        ValueError: a spec is malformed.
    """
    return [NamedSpec(manifest, read_spec(manifest)) for manifest in manifests]


def complete_params(params: RoboticsDataParams) -> RoboticsDataParams:
    """Fill in what `resolve` would take from the training datasets, for params used without a model.

    Raises:
        FileNotFoundError: a manifest does not belong to a robotics dataset.
        ValueError: the datasets disagree on a value that the params leave open.
    """
    datasets = [
        DatasetFacts(manifest=name, num_samples=0, provenance={}, robotics=spec)
        for name, spec in read_specs(params.dataset_manifest)
    ]
    values = {name: derived.value for name, derived in params.derive_from_data(datasets).items()}
    if params.use_language is None:
        values["use_language"] = params.tokenizer_name() is not None
    if not params.dataset_statistics:
        values["dataset_statistics"] = [
            join_uri(parent_uri(manifest), STATISTICS_NAME) for manifest in params.dataset_manifest
        ]
    return replace(params, **values) if values else params


@dataclass(frozen=True, eq=False)
class Normalization:
    """A run's normalizer, and the statistics it was made from."""

    normalizer: RoboticsNormalizer
    # {normalized field: its statistics over all datasets}
    statistics: dict[str, FieldStatistics]


@dataclass(frozen=True, kw_only=True)
class _StatisticsFile:
    """One dataset's statistics file, and which fields of it are used."""

    path: str
    # changes when the file does; remote files are assumed not to change
    version: int
    # index of the anchor step, for files that do not state it
    anchor_index: int
    fields: tuple[str, ...]


def create_normalization(params: RoboticsDataParams, datasets: Sequence[NamedSpec]) -> Normalization:
    """Create the normalizer of actions and proprioception.

    Args:
        params: resolved data params.
        datasets: the training datasets, in the order of `params.dataset_manifest`. Validation uses their statistics
            too, because the model was trained on numbers normalized with them.

    Raises:
        FileNotFoundError: a dataset has no statistics.
        ValueError: statistics lack a field, a step or percentiles.
    """
    paths, weighting = params.dataset_statistics, params.dataset_weighting or [1.0] * len(datasets)
    if params.merged_statistics:
        datasets = read_specs(list(params.merged_statistics))
        paths, weighting = list(params.merged_statistics.values()), list(params.merged_weighting.values())
    widths: dict[str, int] = {}
    fields_of: list[set[str]] = [set() for _ in datasets]
    for name in ("action_fields", "proprioception_fields"):
        sources = [params.find_fields(name, dataset) for dataset in datasets]
        widths |= {field: width_of(field, sources, f"data.{name}") for field in getattr(params, name)}
        for known, source in zip(fields_of, sources, strict=True):
            known.update(source.fields)
    known_fields = {field for _, spec in datasets for field in spec.fields} | widths.keys()
    rules = params.normalization.rules(widths, known_fields)
    used = tuple((name, rule) for name, rule in rules.items() if rule.enabled)
    passing = {name: _pass(rules[name], width) for name, width in widths.items() if not rules[name].enabled}
    if not used:
        return Normalization(RoboticsNormalizer(passing), {})
    assert len(paths) == len(datasets), "resolve derives data.dataset_statistics"
    files = []
    for path, (_, spec), has in zip(paths, datasets, fields_of, strict=True):
        fields = tuple(name for name, _ in used if name in has)
        version = 0 if is_remote(path) or not os.path.exists(path) else os.stat(path).st_mtime_ns
        anchor_index = spec.past_lowdim_steps
        files.append(_StatisticsFile(path=path, version=version, anchor_index=anchor_index, fields=fields))
    shares = tuple(weighting) if params.statistics_weighting == "mixture" else None
    columns = {name: field.names for _, spec in datasets for name, field in spec.fields.items() if field.names}
    created = _create(tuple(files), used, shares, params.normalization_window, tuple(columns.items()))
    normalizer = created.normalizer
    whole = RoboticsNormalizer({**normalizer.scales, **passing}, normalizer.near_constant)
    return Normalization(whole, created.statistics)


@lru_cache(maxsize=1)  # the training and validation loaders need the same result, and files may be large
def _create(
    files: tuple[_StatisticsFile, ...],
    rules: tuple[tuple[str, NormalizationRule], ...],
    shares: tuple[float, ...] | None,
    window: Window,
    columns: tuple[tuple[str, tuple[str, ...]], ...],
) -> Normalization:
    merged = merge_statistics([_read(file) for file in files], shares=shares)
    try:
        normalizer = RoboticsNormalizer.create(merged, dict(rules), window=window, names=dict(columns))
    except ValueError as error:
        raise ValueError(f"data.normalization: {error}") from None
    return Normalization(normalizer, merged)


def _read(file: _StatisticsFile) -> dict[str, FieldStatistics]:
    if not file.fields:
        return {}
    try:
        text = read_text(file.path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.dataset_statistics: there is no {file.path}. Make it with `vla-foundry stats FOLDER`, or set "
            "--data.normalization.enabled false."
        ) from None
    return parse_statistics(text, file.path, anchor_index=file.anchor_index, fields=file.fields)


def _pass(rule: NormalizationRule, width: int) -> FieldScale:
    return FieldScale(rule=rule, anchor_index=None, center=np.zeros((1, width)), scale=np.ones((1, width)))


def save_robotics_files(params: RoboticsDataParams, folder: Path) -> None:
    """Write the files listed above to a run folder.

    Raises:
        FileNotFoundError: a dataset or its statistics no longer exist.
        ValueError: a file is malformed, or the run was started with a different normalizer.
    """
    params = complete_params(params)
    datasets = read_specs(params.dataset_manifest)
    normalization = create_normalization(params, datasets)
    state = json.dumps(normalization.normalizer.state(), indent=1) + "\n"
    kept_state = folder / NORMALIZER_NAME
    before = read_side_file(kept_state)
    if before is not None and json.dumps(before, indent=1) + "\n" != state and not params.accept_changed_data:
        raise ValueError(
            f"data.dataset_statistics or data.normalization are not those that {kept_state} was made from, so the "
            "model's numbers would mean something else. Restore them, start another run, or continue with "
            "--data.accept_changed_data true."
        )
    write_text(str(kept_state), state)
    write_text(str(folder / STATISTICS_NAME), format_statistics(normalization.statistics))
    write_text(str(folder / SPEC_NAME), format_spec(describe_inputs(params, datasets)))
    configs = [_read_config(manifest) for manifest in params.dataset_manifest]
    if any(configs):
        kept: Any = configs[0] if len(configs) == 1 else dict(enumerate(configs))
        write_text(str(folder / PREPROCESSING_CONFIG_NAME), dump_value(kept))


def find_dataset_folder(params: MixtureDataParams, run_folder: str, name: str) -> str:
    """Return where a run keeps the files of one dataset of its mixture: the main one's lie in the run folder itself."""
    return run_folder if name == params.main_dataset() else join_uri(run_folder, f"{DATASETS_FOLDER}/{name}")


def load_normalizer(folder: str | Path) -> RoboticsNormalizer:
    """Read a run's normalizer.

    Raises:
        FileNotFoundError: the run has no normalizer.
        ValueError: the normalizer is malformed.
    """
    location = join_uri(str(folder), NORMALIZER_NAME)
    return RoboticsNormalizer.from_state(read_object(location), origin=location)


def load_spec(folder: str | Path) -> DatasetSpec:
    """Read a run's spec: the inputs and outputs of its model.

    Raises:
        FileNotFoundError: the run has no spec.
        ValueError: the spec is malformed.
    """
    location = join_uri(str(folder), SPEC_NAME)
    return parse_spec(read_text(location), location)


def describe_inputs(params: RoboticsDataParams, datasets: Sequence[NamedSpec]) -> DatasetSpec:
    """Return the spec of a model trained with these params: its cameras in order, and the fields it uses."""
    fields: dict[str, FieldDescription] = {}
    for name, spec in datasets:
        # a robot reports absolute poses, so relative ones are computed as for whole episodes
        live = replace(spec, layout="episodes")
        for list_name in ("action_fields", "proprioception_fields"):
            try:
                source = params.find_fields(list_name, NamedSpec(name, live))
            except ValueError:  # the dataset holds only relative poses
                source = params.find_fields(list_name, NamedSpec(name, spec))
            # first the fields that the config names, then the reference poses
            for field, description in (*source.fields.items(), *source.stored.items()):
                fields.setdefault(field, description)
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
        return read_yaml(join_uri(parent_uri(manifest), PREPROCESSING_CONFIG_NAME))
    except FileNotFoundError:
        return None
