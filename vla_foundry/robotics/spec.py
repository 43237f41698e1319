"""@: what a robotics dataset holds and what its numbers mean (`robotics.json`).

    {"version": 1, "layout": "episodes" | "samples", "fps": 20.0, "past_lowdim_steps": 1, "future_lowdim_steps": 14,
     "image_indices": [-1, 0], "padding_strategy": "copy",
     "cameras": {name: {"size": [W, H], "original_size": [W, H] | null, "is_depth": false}},
     "fields": {name: {"shape": [C], "dtype": "float32", "unit": "m", "frame": "world", "representation": "absolute",
                       "rotation": null, "role": "action", "gripper": null, "is_discrete": false}},
     "pose_groups": [{"name", "position_key", "rotation_key", "rotation_format", ...}], "language_types": ["original"]}

`fields` are those that windows hold: the stored ones, and the `_relative` ones that pose groups give. `original_size`
is null where episodes differ. A training config, statistics and a checkpoint are checked against this.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from vla_foundry.robotics.fields import PoseGroup, parse_pose_groups

SPEC_NAME = "robotics.json"
SPEC_VERSION = 1

Layout = Literal["episodes", "samples"]
Representation = Literal["absolute", "relative", "delta"]
Role = Literal["observation", "action"]


@dataclass(frozen=True, kw_only=True)
class GripperRange:
    """The values of a gripper's two ends, in the field's unit; their order is its sign."""

    open: float
    closed: float


@dataclass(frozen=True, kw_only=True)
class FieldDescription:
    """What the numbers of a field mean."""

    # columns: (C,)
    shape: tuple[int]
    # float32 or float64
    dtype: str = "float32"
    # of every column (m, rad, N, ...); None: mixed, or not known
    unit: str | None = None
    # frame that poses are given in (world, base, ...); None: not known, or no pose
    frame: str | None = None
    # absolute; relative to the reference pose at the anchor; delta: change from the step before
    representation: Representation = "absolute"
    # how rotations are written (robotics/rotations.py); None: the field is no rotation
    rotation: str | None = None
    role: Role = "observation"
    # of a gripper field; None: it is none, or its range is not known
    gripper: GripperRange | None = None
    # True for switches, counters and ids: values between two of them mean nothing
    is_discrete: bool = False

    @property
    def width(self) -> int:
        """Columns (C)."""
        return self.shape[0]


@dataclass(frozen=True, kw_only=True)
class CameraDescription:
    """The images of a camera."""

    # (W, H) as stored
    size: tuple[int, int]
    # (W, H) as recorded; None: it differs between episodes
    original_size: tuple[int, int] | None
    # 16 bits of millimetres, PNG; else RGB, JPEG
    is_depth: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What a robotics dataset holds; see the module."""

    layout: Layout
    # frames a second; None: not known (published datasets do not say)
    fps: float | None
    # the window of preprocessing: what statistics are of, and all that the layout "samples" holds
    past_lowdim_steps: int
    future_lowdim_steps: int
    # frames of the images from the anchor, in the layout "samples"; a suggestion in the layout "episodes"
    image_indices: tuple[int, ...]
    padding_strategy: str
    # in the order of the dataset
    cameras: dict[str, CameraDescription]
    fields: dict[str, FieldDescription]
    pose_groups: tuple[PoseGroup, ...] = ()
    # kinds of instructions that some episode has
    language_types: tuple[str, ...] = ()


class NamedSpec(NamedTuple):
    """A spec, and what the user knows its owner as."""

    # a manifest, or the folder of a run
    name: str
    spec: DatasetSpec


def format_spec(spec: DatasetSpec) -> str:
    """Format robotics.json."""
    values = {"version": SPEC_VERSION, **asdict(spec)}
    values["pose_groups"] = [
        {key: value for key, value in asdict(group).items() if value is not None} for group in spec.pose_groups
    ]
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def parse_spec(text: str, origin: str) -> DatasetSpec:
    """Parse robotics.json.

    Args:
        origin: where the text comes from, for messages.

    Raises:
        ValueError: it is no such spec, or of another version; the key is named.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} is not JSON ({error}).") from None
    if not isinstance(values, dict) or values.get("version") != SPEC_VERSION:
        found = values.get("version") if isinstance(values, dict) else None
        raise ValueError(f"{origin} is no robotics spec of version {SPEC_VERSION} (it has {found!r}).")
    try:
        spec = DatasetSpec(
            layout=_choice(values["layout"], Layout, "layout"),
            fps=None if values["fps"] is None else float(values["fps"]),
            past_lowdim_steps=int(values["past_lowdim_steps"]),
            future_lowdim_steps=int(values["future_lowdim_steps"]),
            image_indices=tuple(int(index) for index in values["image_indices"]),
            padding_strategy=str(values["padding_strategy"]),
            cameras={name: _parse_camera(value) for name, value in values["cameras"].items()},
            fields={name: _parse_field(name, value) for name, value in values["fields"].items()},
            pose_groups=parse_pose_groups(values.get("pose_groups", ()), f"{origin}: pose_groups"),
            language_types=tuple(str(kind) for kind in values.get("language_types", ())),
        )
    except KeyError as error:
        raise ValueError(f"{origin} lacks the key {error}.") from None
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{origin} is no robotics spec ({error}).") from None
    if spec.fps is not None and not spec.fps > 0:
        raise ValueError(f"{origin}: fps ({spec.fps:g}) must be above 0.")
    return spec


def _parse_camera(value: Mapping[str, Any]) -> CameraDescription:
    width, height = value["size"]
    original = value.get("original_size")
    return CameraDescription(
        size=(int(width), int(height)),
        original_size=None if original is None else (int(original[0]), int(original[1])),
        is_depth=bool(value.get("is_depth", False)),
    )


def _parse_field(name: str, value: Mapping[str, Any]) -> FieldDescription:
    known = {field.name: value[field.name] for field in fields(FieldDescription) if field.name in value}
    gripper = value.get("gripper")
    (width,) = value["shape"]
    known |= {
        "shape": (int(width),),
        "gripper": None if gripper is None else GripperRange(open=gripper["open"], closed=gripper["closed"]),
        "representation": _choice(value.get("representation", "absolute"), Representation, f"fields.{name}"),
        "role": _choice(value.get("role", "observation"), Role, f"fields.{name}"),
    }
    return FieldDescription(**known)


def _choice(value: Any, choices: Any, what: str) -> Any:
    if value not in get_args(choices):
        raise ValueError(f"robotics spec: {what} must be one of {', '.join(get_args(choices))}, got {value!r}.")
    return value
