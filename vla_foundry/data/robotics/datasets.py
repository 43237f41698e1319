"""The datasets of robot params: their specs, and what follows from these for params that are not resolved."""

from collections.abc import Sequence
from dataclasses import replace

from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.facts import DatasetFacts
from vla_foundry.robotics.spec import NamedSpec, read_spec
from vla_foundry.run_folder import STATISTICS_NAME
from vla_foundry.storage.uri import join_uri, parent_uri


def read_specs(manifests: Sequence[str]) -> list[NamedSpec]:
    """Read the spec of each dataset.

    Raises:
        FileNotFoundError: a manifest is of no robotics dataset.
        ValueError: a spec is not what it should be.
    """
    return [NamedSpec(manifest, read_spec(manifest)) for manifest in manifests]


def complete_params(params: RoboticsDataParams) -> RoboticsDataParams:
    """Fill what `resolve` would take from the training datasets, for params that are used without a model.

    Raises:
        FileNotFoundError: a manifest is of no robotics dataset.
        ValueError: the datasets disagree on what is not given.
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
