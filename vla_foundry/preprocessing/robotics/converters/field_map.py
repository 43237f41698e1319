"""Apply a field map: cut a recording's columns into fields, describe them, and group them into poses."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_foundry.config.yaml_source import find_config
from vla_foundry.params.commands.preprocessing_robotics import FieldMapParams, FieldParams
from vla_foundry.params.experiment import load_params_from_yaml
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import PoseGroup, parse_field_name, parse_pose_groups
from vla_foundry.robotics.rotations import rotation_width
from vla_foundry.robotics.spec import FieldDescription, GripperRange, Role


@dataclass(frozen=True)
class Source:
    """An array of a recording: L rows of numbers."""

    # columns
    width: int
    # type that its values are stored as
    dtype: str
    # True for integers and switches
    is_discrete: bool = False
    # name of each column; empty: unknown
    names: tuple[str, ...] = ()


def load_field_map(path: str) -> FieldMapParams:
    """Load a field map: a path, a URI, or a preset (`field_maps/libero.yaml`).

    Raises:
        ValueError: the file is not a field map.
        FileNotFoundError: the file does not exist.
    """
    return load_params_from_yaml(FieldMapParams, find_config(path))


def stored_dtype(dtype: np.dtype) -> str:
    """Return the type that numbers are stored as without loss: float32, or float64 for wider types."""
    if dtype.kind in "iu":
        return "float32" if dtype.itemsize <= 2 else "float64"
    return "float64" if dtype == np.float64 else "float32"


def source_of(name: str, field: FieldParams) -> str:
    """Return the recording's name of the array that holds a field."""
    return field.source or name


def describe_fields(
    fields: Mapping[str, FieldParams], sources: Mapping[str, Source], *, origin: str
) -> dict[str, FieldDescription]:
    """Describe every field of a map.

    Args:
        sources: the arrays of the recording.
        origin: the recording, for messages.

    Raises:
        ValueError: a field's source is missing, has too few columns, or does not fit the rotation format.
    """
    described = {}
    for name, field in fields.items():
        source_name = source_of(name, field)
        if source_name not in sources:
            raise ValueError(f"{origin}: " + unknown_name_message(f"field {name}: source", source_name, list(sources)))
        source = sources[source_name]
        first, end = field.columns or (0, source.width)
        if end > source.width:
            raise ValueError(
                f"{origin}: field {name} takes columns {first} to {end} of '{source_name}', which has {source.width}."
            )
        width = end - first
        if field.rotation is not None and rotation_width(field.rotation) != width:
            raise ValueError(
                f"{origin}: field {name} has {width} columns, but a rotation written as {field.rotation} has "
                f"{rotation_width(field.rotation)}."
            )
        gripper = field.gripper and GripperRange(open=field.gripper.open, closed=field.gripper.closed)
        described[name] = FieldDescription(
            shape=(width,),
            dtype=source.dtype,
            unit=field.unit,
            frame=field.frame,
            representation=field.representation,
            rotation=field.rotation,
            role=field.role or default_role(name),
            gripper=gripper,
            is_discrete=field.is_discrete or source.is_discrete,
            names=source.names[first:end],
        )
    return described


def default_role(name: str) -> Role:
    """Return action for names like `action`, `actions.left` and `robot__action__...`, else observation."""
    parts = parse_field_name(name)
    is_action = parts.source == "action" if parts is not None else name.startswith("action")
    return "action" if is_action else "observation"


def split_fields(fields: Mapping[str, FieldParams], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cut the columns of a recording into fields: {source: (L, width)} -> {field: (L, C)}."""
    split = {}
    for name, field in fields.items():
        values = arrays[source_of(name, field)]
        first, end = field.columns or (0, values.shape[1])
        split[name] = np.ascontiguousarray(values[:, first:end], dtype=stored_dtype(values.dtype))
    return split


def pose_groups(
    params: FieldMapParams, described: Mapping[str, FieldDescription], *, origin: str
) -> tuple[PoseGroup, ...]:
    """Return the pose groups of a map; the format of their rotations is that of the rotation field.

    Raises:
        ValueError: a group's field is not there, or is no position or rotation.
    """
    groups = []
    for value in params.pose_groups:
        rotation = described.get(value.get("rotation_key", ""))
        known = {"rotation_format": rotation.rotation} if rotation is not None and rotation.rotation else {}
        groups.append({**known, **value})
    parsed = parse_pose_groups(groups, f"{origin}: pose_groups")
    for group in parsed:
        pairs = ((group.position_key, group.rotation_key), group.reference_keys)
        for key in (key for pair in pairs for key in pair):
            if key not in described:
                raise ValueError(f"{origin}: " + unknown_name_message(f"pose group {group.name}", key, list(described)))
        for position, rotation in pairs:
            if described[position].width != 3:
                raise ValueError(f"{origin}: '{position}' of pose group {group.name} must have 3 columns (x, y, z).")
            if described[rotation].rotation != group.rotation_format:
                raise ValueError(
                    f"{origin}: '{rotation}' of pose group {group.name} must be a rotation written as "
                    f"{group.rotation_format}, but its field says {described[rotation].rotation}."
                )
    return parsed
