"""Read what a robot dataset, or the run that a model starts from, says about itself: its spec.

Datasets that others published have no `robotics.json`. What it would hold is then taken from their
preprocessing_config.yaml and the first sample of their first shard.
"""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import yaml

from vla_foundry.config.derivation import DatasetFacts, Facts, Unavailable
from vla_foundry.robotics.fields import PoseGroup, absolute_field, is_relative_field
from vla_foundry.robotics.spec import (
    SPEC_NAME,
    CameraDescription,
    DatasetSpec,
    FieldDescription,
    NamedSpec,
    parse_spec,
)
from vla_foundry.run_folder import PREPROCESSING_CONFIG_NAME
from vla_foundry.shards import parse_manifest
from vla_foundry.storage.npz import NpzFile
from vla_foundry.storage.uri import (
    absolute_uri,
    exists,
    is_remote,
    join_uri,
    open_input,
    parent_uri,
    read_range,
    read_text,
)

# kinds of instructions that published datasets may have
PUBLISHED_LANGUAGE_TYPES = ("original", "randomized", "verbose", "alternative")
# of a remote shard, read to find its first sample
_FIRST_BYTES = 16 << 20
# a checkpoint lies at most this deep in its run (run/checkpoints/step_N/model.safetensors)
_RUN_DEPTH = 4
_POSITION, _ROTATION = "__xyz", "__rot_6d"


def add_robotics(facts: Facts, checkpoints: Sequence[str], *, offline: bool = False) -> Facts:
    """Add the spec of each dataset, and that of the run that the model starts from.

    Args:
        facts: what else is known.
        checkpoints: what the model and its parts start from.
        offline: do not reach for anything that is remote; such specs are then Unavailable.

    Raises:
        FileNotFoundError: a dataset is not one of robots.
        ValueError: a spec is not what it should be.
    """

    def read(dataset: DatasetFacts) -> DatasetFacts:
        if isinstance(dataset.num_samples, Unavailable):
            return replace(dataset, robotics=Unavailable(join_uri(parent_uri(dataset.manifest), SPEC_NAME)))
        return replace(dataset, robotics=read_spec(dataset.manifest))

    return replace(
        facts,
        datasets=tuple(read(dataset) for dataset in facts.datasets),
        val_datasets=tuple(read(dataset) for dataset in facts.val_datasets),
        started_from_robotics=next(
            (found for name in checkpoints if (found := _find_run_spec(name, offline)) is not None), None
        ),
    )


def _find_run_spec(checkpoint: str, offline: bool) -> NamedSpec | None:
    if is_remote(checkpoint) and offline:
        return None
    folder = absolute_uri(checkpoint)
    for _ in range(_RUN_DEPTH):
        location = join_uri(folder, SPEC_NAME)
        if exists(location):
            return NamedSpec(folder, parse_spec(read_text(location), location))
        folder = parent_uri(folder)
    return None


def read_spec(manifest: str) -> DatasetSpec:
    """Return the spec of a dataset, by its manifest.

    Raises:
        FileNotFoundError: it has neither a spec nor a published preprocessing_config.yaml.
        ValueError: one of them is not what it should be.
    """
    folder = parent_uri(manifest)
    location = join_uri(folder, SPEC_NAME)
    try:
        text = read_text(location)
    except FileNotFoundError:
        return _describe_published(folder, manifest)
    return parse_spec(text, location)


@lru_cache(maxsize=64)  # it is asked for when params are resolved, and again by each loader
def _describe_published(folder: str, manifest: str) -> DatasetSpec:
    location = join_uri(folder, PREPROCESSING_CONFIG_NAME)
    try:
        values = yaml.safe_load(read_text(location))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{manifest} is of no robotics dataset: neither {SPEC_NAME} nor {PREPROCESSING_CONFIG_NAME} lies "
            "beside it. Make it with `vla-foundry preprocess robotics`."
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{location} is not YAML ({' '.join(str(error).split())}).") from None
    try:
        past, future = int(values["past_lowdim_steps"]), int(values["future_lowdim_steps"])
        image_indices = tuple(int(index) for index in values["image_indices"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{location} is no published preprocessing config ({type(error).__name__}: {error})."
        ) from None
    first = parse_manifest(read_text(manifest), manifest)[0].shard + ".tar"
    members = _read_first_sample(join_uri(folder, first))
    metadata = json.loads(members["metadata.json"])
    arrays = NpzFile.from_bytes(members["lowdim.npz"])
    widths = {name: arrays.shape(name)[1] for name in arrays.names if len(arrays.shape(name)) == 2}
    fields = {name: describe_published_field(name, width) for name, width in widths.items()}
    return DatasetSpec(
        layout="samples",
        fps=None,
        past_lowdim_steps=past,
        future_lowdim_steps=future,
        image_indices=image_indices,
        padding_strategy=str(values.get("padding_strategy", "copy")),
        cameras=_describe_cameras(metadata, values.get("resize_images_size")),
        fields=fields,
        pose_groups=find_published_pose_groups(fields),
        language_types=PUBLISHED_LANGUAGE_TYPES,
    )


def describe_published_field(name: str, width: int) -> FieldDescription:
    """What a field of published data means, by its name alone."""
    return FieldDescription(
        shape=(width,),
        representation="relative" if is_relative_field(name) else "absolute",
        rotation="rot_6d_rows" if absolute_field(name).endswith(_ROTATION) else None,
        role="action" if name.startswith(("robot__action__", "action")) else "observation",
    )


def _describe_cameras(metadata: Mapping[str, Any], size: list[int] | None) -> dict[str, CameraDescription]:
    originals = metadata.get("original_image_sizes") or {}
    cameras = {}
    for name in metadata.get("camera_names") or originals:
        original = (int(originals[name][0]), int(originals[name][1])) if name in originals else None
        stored = (int(size[0]), int(size[1])) if size else original or (0, 0)
        cameras[name] = CameraDescription(size=stored, original_size=original, is_depth="depth" in name)
    return cameras


def find_published_pose_groups(fields: Mapping[str, FieldDescription]) -> tuple[PoseGroup, ...]:
    """The poses that published fields make together, by their names."""
    stems = [name.removesuffix(_POSITION) for name in fields if name.endswith(_POSITION)]
    return tuple(
        PoseGroup(name=stem, position_key=stem + _POSITION, rotation_key=stem + _ROTATION)
        for stem in stems
        if stem + _ROTATION in fields
    )


def _read_first_sample(shard: str) -> dict[str, bytes]:
    """Return the members of a shard's first sample that are no images, by their suffixes."""
    wanted = ("metadata.json", "lowdim.npz")
    found: dict[str, bytes] = {}
    source = io.BytesIO(read_range(shard, 0, _FIRST_BYTES)) if is_remote(shard) else open_input(shard)
    try:
        with source, tarfile.open(fileobj=source, mode="r:") as tar:
            for member in tar:
                suffix = member.name.partition(".")[2]
                content = tar.extractfile(member) if suffix in wanted else None
                if content is not None:
                    found[suffix] = content.read()
                if len(found) == len(wanted):
                    return found
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a readable tar ({error}).") from None
    raise ValueError(f"{shard} holds no robot samples: its first sample lacks {' or '.join(wanted)}.")
