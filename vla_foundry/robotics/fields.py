"""Name low-dimensional fields and images, group the fields of a pose, and define the window around an anchor.

A field is a named signal with one row per frame. The published names follow

    robot__{source}__{quantity}__{side}::{body}[__{component}][_relative]

as in `robot__actual__poses__left::panda__xyz` or `robot__action__grippers__right::panda_hand`. Other names
(`observation.state`) are valid fields too, but have no parts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vla_foundry.registry import unknown_name_message

RELATIVE_SUFFIX = "_relative"
# values of steps outside the episode: the nearest frame, zeros, or frames mirrored at the episode's end
PaddingStrategy = Literal["copy", "zero", "reflect"]

_WORD = r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*?"
_FIELD_PATTERN = re.compile(
    rf"robot__(?P<source>actual|desired|action)__(?P<quantity>{_WORD})__(?P<side>{_WORD})"
    rf"::(?P<body>{_WORD})(?:__(?P<component>{_WORD}))?(?P<relative>{RELATIVE_SUFFIX})?"
)


@dataclass(frozen=True, kw_only=True)
class FieldName:
    """The parts of a field's name."""

    # actual: measured; desired: commanded by the controller; action: commanded by the policy or the operator
    source: Literal["actual", "desired", "action"]
    # poses, grippers, joint_position, ...
    quantity: str
    # left, right
    side: str
    # panda, panda_hand
    body: str
    # xyz, rot_6d; None if the quantity has only one component
    component: str | None = None
    # True if expressed in the frame of the reference pose at the anchor
    is_relative: bool = False


def parse_field_name(name: str) -> FieldName | None:
    """Parse a field's name; return None if it does not follow the grammar above."""
    match = _FIELD_PATTERN.fullmatch(name)
    if match is None:
        return None
    parts = match.groupdict()
    is_relative = parts.pop("relative") is not None
    return FieldName(**parts, is_relative=is_relative)  # pyright: ignore[reportArgumentType]


def is_relative_field(name: str) -> bool:
    """True if the field holds poses relative to the reference pose at the anchor."""
    return name.endswith(RELATIVE_SUFFIX)


def relative_field(name: str) -> str:
    """Return the name of the relative form of an absolute pose field.

    Raises:
        ValueError: the field is already relative.
    """
    if is_relative_field(name):
        raise ValueError(f"field '{name}' is already relative: a relative of a relative pose has no meaning.")
    return name + RELATIVE_SUFFIX


def absolute_field(name: str) -> str:
    """Return the name of the absolute pose field that a relative field was computed from."""
    return name.removesuffix(RELATIVE_SUFFIX)


def actual_field(name: str) -> str:
    """Return the measured field that belongs to a commanded one: `robot__action__X` -> `robot__actual__X`.

    Raises:
        ValueError: the name has no second part to replace.
    """
    parts = absolute_field(name).split("__")
    if len(parts) <= 2:
        raise ValueError(
            f"field '{name}' does not name its measurement (expected robot__<source>__...). "
            "Give its pose group reference_position_key and reference_rotation_key."
        )
    return "__".join([parts[0], "actual", *parts[2:]])


@dataclass(frozen=True, kw_only=True)
class PoseGroup:
    """The fields that form one pose, and those of the reference pose that relative actions refer to."""

    # name of the group, for messages
    name: str
    # field of the position (3 columns, metres)
    position_key: str
    # field of the rotation
    rotation_key: str
    # rotation format; see rotations.py (published data use rot_6d_rows)
    rotation_format: str = "rot_6d_rows"
    # fields of the reference pose; None: the measured ("actual") pose of the same body
    reference_position_key: str | None = None
    reference_rotation_key: str | None = None

    @property
    def reference_keys(self) -> tuple[str, str]:
        """The fields (position, rotation) of the reference pose."""
        return (
            self.reference_position_key or actual_field(self.position_key),
            self.reference_rotation_key or actual_field(self.rotation_key),
        )

    @property
    def relative_keys(self) -> tuple[str, str]:
        """The fields (position, rotation) that hold this pose relative to its reference at the anchor."""
        return relative_field(self.position_key), relative_field(self.rotation_key)


def parse_pose_groups(values: Sequence[Mapping[str, str]], origin: str = "pose_groups") -> tuple[PoseGroup, ...]:
    """Read pose groups from a config.

    Raises:
        ValueError: a key is missing or unknown, a group is named twice, or a group holds relative fields.
    """
    groups = []
    allowed = tuple(PoseGroup.__dataclass_fields__)
    for number, value in enumerate(values):
        missing = [key for key in allowed[:3] if not value.get(key)]
        if missing:
            raise ValueError(f"{origin}[{number}] needs the keys {', '.join(allowed[:3])}; missing: {missing[0]}.")
        unknown = sorted(value.keys() - set(allowed))
        if unknown:
            raise ValueError(unknown_name_message(f"{origin}[{number}]", unknown[0], list(allowed)))
        wrong = [key for key in value if not isinstance(value[key], str)]
        if wrong:
            raise ValueError(f"{origin}[{number}].{wrong[0]} must be text, got {value[wrong[0]]!r}.")
        group = PoseGroup(**value)
        relative = [key for key in (group.position_key, group.rotation_key) if is_relative_field(key)]
        if relative:
            raise ValueError(
                f"{origin}[{number}] holds '{relative[0]}', which is already relative. "
                f"Give '{absolute_field(relative[0])}'."
            )
        groups.append(group)
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{origin} names group '{twice}' twice. Choose another name for one of them.")
    return tuple(groups)


@dataclass(frozen=True)
class Window:
    """The time steps around an anchor: `past` steps before it, the anchor itself, `future` steps after it."""

    # steps before the anchor
    past: int
    # steps after the anchor
    future: int

    def __post_init__(self) -> None:
        if self.past < 0 or self.future < 0:
            raise ValueError(f"a window needs past ({self.past}) >= 0 and future ({self.future}) >= 0 steps.")

    @property
    def num_steps(self) -> int:
        """Number of steps in the window (T)."""
        return self.past + 1 + self.future

    @property
    def anchor(self) -> int:
        """Index of the anchor in the window."""
        return self.past

    @property
    def offsets(self) -> range:
        """Each step's offset from the anchor."""
        return range(-self.past, self.future + 1)

    def crop(self, inner: "Window") -> slice:
        """Return the slice of this window that a smaller window around the same anchor covers.

        Raises:
            ValueError: `inner` extends beyond this window.
        """
        if inner.past > self.past or inner.future > self.future:
            raise ValueError(
                f"the window asked for ({inner.past} past, {inner.future} future steps) is larger than the stored one "
                f"({self.past} past, {self.future} future). Ask for less or preprocess with more steps."
            )
        return slice(self.past - inner.past, self.past + 1 + inner.future)


def image_name(camera: str, offset: int) -> str:
    """Return the name of a camera's image `offset` frames from the anchor, as in the published members."""
    return f"{camera}_t{offset}"


def image_names(cameras: Sequence[str], offsets: Sequence[int]) -> list[str]:
    """Return the names of a sample's images in batch order: time-major, cameras within a time step."""
    return [image_name(camera, offset) for offset in offsets for camera in cameras]
