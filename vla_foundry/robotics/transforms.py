"""Transform the fields of a window to a model's numbers and back; each transform is next to its inverse.

| transform       | apply                                              | invert                                      |
|-----------------|----------------------------------------------------|---------------------------------------------|
| RelativePoses   | poses -> relative to the reference at the anchor   | back to the world frame                     |
| SelectFields    | fields -> one array; 0 in columns that are missing | array -> fields                             |
| FieldTransform  | select, then normalize                             | denormalize, then split into fields         |
| ActionTransform | relative poses, select, normalize                  | commands from the anchor step on            |

`windows.Windows` pads time steps and inverts the padding. Arrays may hold one window (T, C) or many (N, T, C).
`FieldTransform.invert` accepts torch tensors too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import PaddingStrategy, PoseGroup, absolute_field
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.robotics.rotations import first_index, matrix_to_rotation, rotation_to_matrix


@dataclass(frozen=True)
class RelativePoses:
    """Poses relative to a reference pose at the anchor: inv(T_ref) T_t."""

    groups: tuple[PoseGroup, ...]
    # index of the step that gives the reference pose
    anchor: int
    # values of padded steps; zeros are not a pose and stay zeros
    padding: PaddingStrategy = "copy"

    def apply(
        self,
        fields: Mapping[str, np.ndarray],
        is_padding: Bool[np.ndarray, "*N T"] | None = None,
        references: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the groups' `_relative` fields, float64.

        Args:
            fields: windows (*N, T, C) of the groups' fields and of their reference fields.
            is_padding: required only if padded steps hold zeros.
            references: the groups' reference fields at the anchor, (*N, C); None: those of `fields`.

        Raises:
            ValueError: a field is missing or does not hold a pose.
        """
        hole = is_padding[..., None] if self.padding == "zero" and is_padding is not None else None
        result = {}
        for group in self.groups:
            pose = _group_fields(fields, group, (group.position_key, group.rotation_key))
            at_anchor = slice(self.anchor, self.anchor + 1)
            if references is None:
                reference = [part[..., at_anchor, :] for part in _group_fields(fields, group, group.reference_keys)]
            else:
                reference = [part[..., None, :] for part in _group_fields(references, group, group.reference_keys)]
            if hole is not None:
                # any valid pose will do here: zeros are restored below
                pose = [np.where(hole, part[..., at_anchor, :], part) for part in pose]
            relative = _relative_pose(pose, reference, group)
            if hole is not None:
                relative = [np.where(hole, 0.0, part) for part in relative]
            result.update(zip(group.relative_keys, relative, strict=True))
        return result

    def invert(self, fields: Mapping[str, np.ndarray], references: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the groups' absolute fields, float64.

        Args:
            fields: the groups' `_relative` fields, (*N, T, C).
            references: the groups' reference fields at the anchor, (*N, C).

        Raises:
            ValueError: a field is missing or does not hold a pose.
        """
        result = {}
        for group in self.groups:
            relative = _group_fields(fields, group, group.relative_keys)
            reference = [part[..., None, :] for part in _group_fields(references, group, group.reference_keys)]
            pose = _absolute_pose(relative, reference, group)
            result.update(zip((group.position_key, group.rotation_key), pose, strict=True))
        return result


def _group_fields(fields: Mapping[str, Any], group: PoseGroup, keys: tuple[str, str]) -> list[np.ndarray]:
    for key in keys:
        if key not in fields:
            raise ValueError(unknown_name_message(f"pose group '{group.name}': field", key, sorted(fields)))
    return [fields[key] for key in keys]


def _relative_pose(pose: list[np.ndarray], reference: list[np.ndarray], group: PoseGroup) -> list[np.ndarray]:
    """Express [position, rotation] in the frame of a reference pose: [R_ref^T (p - p_ref), R_ref^T R]."""
    position, R = _read_pose(pose, group, "")
    origin, R_reference = _read_pose(reference, group, "reference of ")
    R_inverse = np.swapaxes(R_reference, -1, -2)
    offset = (R_inverse @ (position - origin)[..., None])[..., 0]
    return [offset, matrix_to_rotation(R_inverse @ R, group.rotation_format)]


def _absolute_pose(relative: list[np.ndarray], reference: list[np.ndarray], group: PoseGroup) -> list[np.ndarray]:
    """Convert [position, rotation] back to the world frame. The inverse of `_relative_pose`."""
    offset, R = _read_pose(relative, group, "")
    origin, R_reference = _read_pose(reference, group, "reference of ")
    position = origin + (R_reference @ offset[..., None])[..., 0]
    return [position, matrix_to_rotation(R_reference @ R, group.rotation_format)]


def _read_pose(pose: list[np.ndarray], group: PoseGroup, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a pose's position (..., 3) and rotation matrix (..., 3, 3), in float64."""
    name = f"{kind}pose group '{group.name}'"
    position, rotation = pose
    is_finite = np.isfinite(position)
    if not is_finite.all():
        raise ValueError(f"{name}{first_index(~is_finite.all(axis=-1))} has a position that is not finite.")
    return position.astype(np.float64), rotation_to_matrix(rotation, group.rotation_format, field=name)


@dataclass(frozen=True)
class SelectFields:
    """Fields concatenated into one array (..., width), in a fixed order."""

    # fields in column order
    fields: tuple[str, ...]
    # number of columns of each field
    widths: tuple[int, ...]
    # columns of zeros after the last field, where a model's robots differ in width
    padding: int = 0

    @classmethod
    def create(cls, fields: Sequence[str], widths: Mapping[str, int], *, what: str = "field") -> "SelectFields":
        """Create the layout of `fields` from their widths.

        Args:
            what: config path of the list, for messages (`data.action_fields`).

        Raises:
            ValueError: a field is unknown or given twice.
        """
        for number, name in enumerate(fields):
            if name not in widths:
                raise ValueError(unknown_name_message(what, name, sorted(widths)))
            if name in fields[:number]:
                raise ValueError(f"{what} lists '{name}' twice. Remove one.")
        return cls(tuple(fields), tuple(widths[name] for name in fields))

    @property
    def width(self) -> int:
        """Number of columns of the whole array."""
        return sum(self.widths) + self.padding

    @property
    def slices(self) -> dict[str, slice]:
        """The columns of each field."""
        columns, start = {}, 0
        for name, width in zip(self.fields, self.widths, strict=True):
            columns[name] = slice(start, start + width)
            start += width
        return columns

    def apply(
        self, fields: Mapping[str, Float[np.ndarray, "*N _"]]
    ) -> tuple[Float[np.ndarray, "*N C"], Bool[np.ndarray, " C"]]:
        """Concatenate the fields, in float64.

        Returns:
            The array, with 0 in columns of missing fields, and a mask of the columns that are present.

        Raises:
            ValueError: a field has the wrong width, or all fields are missing.
        """
        if not any(name in fields for name in self.fields):
            raise ValueError(f"it has none of the fields {', '.join(self.fields)}")
        shape = next(fields[name].shape[:-1] for name in self.fields if name in fields)
        values, is_there = np.zeros((*shape, self.width)), np.zeros(self.width, dtype=bool)
        for name, columns in self.slices.items():
            if name in fields:
                width = columns.stop - columns.start
                if fields[name].shape[-1] != width:
                    raise ValueError(f"field '{name}' has {fields[name].shape[-1]} columns, expected {width}.")
                values[..., columns] = fields[name]
                is_there[columns] = True
        return values, is_there

    def invert(self, values: Any) -> dict[str, Any]:
        """Split a numpy array or torch tensor (..., C) into views, one per field.

        Raises:
            ValueError: the array has the wrong width.
        """
        if values.shape[-1] != self.width:
            raise ValueError(f"fields {', '.join(self.fields)} need {self.width} columns, got {values.shape[-1]}.")
        return {name: values[..., columns] for name, columns in self.slices.items()}


@dataclass(frozen=True, eq=False)
class FieldTransform:
    """Fields of a window <-> an array of a model's numbers: concatenated, then normalized."""

    select: SelectFields
    normalizer: RoboticsNormalizer
    # index of the anchor step in the window
    anchor: int

    @classmethod
    def create(
        cls, fields: Sequence[str], normalizer: RoboticsNormalizer, *, anchor: int, width: int | None = None
    ) -> "FieldTransform":
        """Create the transform for some of a normalizer's fields.

        Args:
            width: columns of the array, the last of which are padding; None: those of the fields.

        Raises:
            ValueError: a field is unknown or given twice.
        """
        select = SelectFields.create(fields, normalizer.widths)
        return cls(replace(select, padding=0 if width is None else width - select.width), normalizer, anchor)

    def apply(
        self, fields: Mapping[str, Float[np.ndarray, "*N T _"]]
    ) -> tuple[Float32[np.ndarray, "*N T C"], Bool[np.ndarray, " C"]]:
        """Select and normalize, in float64.

        Args:
            fields: {field: (*N, T, its columns)}; fields that this robot lacks are absent.

        Returns:
            The numbers, with 0 in missing columns, and a mask of the columns that are present.

        Raises:
            ValueError: a field has the wrong width, or all fields are missing.
        """
        values, is_there = self.select.apply(fields)
        own = sum(self.select.widths)
        normalized = self.normalizer.normalize(values[..., :own], self.select.fields, anchor=self.anchor)
        if self.select.padding:
            normalized = np.concatenate([normalized, values[..., own:]], axis=-1)
        if not is_there.all():
            normalized[..., ~is_there] = 0
        return normalized.astype(np.float32), is_there

    def invert(self, values: Any) -> dict[str, Any]:
        """Denormalize and split into fields.

        Args:
            values: (*N, T, C), a torch tensor or a numpy array; numpy computes in float64.

        Returns:
            {field: (*N, T, its columns)} in the units of the data.
        """
        values = values.astype(np.float64) if isinstance(values, np.ndarray) else values
        if values.shape[-1] == self.select.width:
            values = values[..., : sum(self.select.widths)]
        fields = replace(self.select, padding=0)
        return fields.invert(self.normalizer.denormalize(values, self.select.fields, anchor=self.anchor))


@dataclass(frozen=True, eq=False)
class ActionTransform:
    """Commands of a robot <-> actions of a model: relative poses, concatenated and normalized."""

    poses: RelativePoses
    fields: FieldTransform
    # {command: its rotation format (rotations.py)}; other commands are not rotations
    rotations: Mapping[str, str]

    def apply(
        self,
        fields: Mapping[str, Float[np.ndarray, "*N T _"]],
        is_padding: Bool[np.ndarray, "*N T"] | None = None,
        references: Mapping[str, Float[np.ndarray, "*N _"]] | None = None,
    ) -> tuple[Float32[np.ndarray, "*N T C"], Bool[np.ndarray, " C"]]:
        """Return normalized actions for all steps, and a mask of the columns that are present.

        Args:
            fields: commands over the window, and the references of relative poses unless `references` has them.
            is_padding: required only if padded steps hold zeros.
            references: the reference fields of relative poses at the anchor; None: those of `fields`.

        Raises:
            ValueError: a field is missing, has the wrong width or does not hold a pose.
        """
        return self.fields.apply({**fields, **self.poses.apply(fields, is_padding, references)})

    def invert(
        self, actions: Float[np.ndarray, "*N T C"], references: Mapping[str, Float[np.ndarray, "*N _"]]
    ) -> dict[str, np.ndarray]:
        """Return the commands from the anchor step on: {field: (*N, future + 1, its columns)}, poses absolute.

        Predicted rotation matrices are only approximately orthogonal, so they are projected back.

        Args:
            references: the reference fields of relative poses at the anchor.

        Raises:
            ValueError: a reference is missing, or a rotation is degenerate.
        """
        fields = {name: values[..., self.fields.anchor :, :] for name, values in self.fields.invert(actions).items()}
        fields |= self.poses.invert(fields, references)
        for name, rotation_format in self.rotations.items():
            matrix = rotation_to_matrix(fields[name], rotation_format, field=name)
            fields[name] = matrix_to_rotation(matrix, rotation_format, field=name)
        return {name: fields[name] for name in map(absolute_field, self.fields.select.fields)}
