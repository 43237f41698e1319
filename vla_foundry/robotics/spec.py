"""The dataset spec: what a robotics dataset holds and what its numbers mean (`robotics.json`).

    {"version": 1, "layout": "episodes" | "samples", "fps": 20.0, "past_lowdim_steps": 1, "future_lowdim_steps": 14,
     "image_indices": [-1, 0], "padding_strategy": "copy",
     "cameras": {name: {"size": [W, H], "original_size": [W, H] | null, "is_depth": false}},
     "fields": {name: {"shape": [C], "dtype": "float32", "unit": "m", "frame": "world", "representation": "absolute",
                       "rotation": null, "role": "action", "gripper": null, "is_discrete": false,
                       "names": ["x", "y", "z"]}},
     "pose_groups": [{"name", "position_key", "rotation_key", "rotation_format", ...}], "language_types": ["original"]}

`fields` lists the fields of a window: the stored ones, and the `_relative` ones computed from pose groups.
`original_size` is null if episodes differ, `names` is absent if unknown. Training configs, statistics and checkpoints
are checked against the spec.
"""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

from vla_foundry.parsing import parse_json, parse_object
from vla_foundry.robotics.fields import (
    PaddingStrategy,
    PoseGroup,
    absolute_field,
    is_relative_field,
    parse_pose_groups,
)
from vla_foundry.run_folder import PREPROCESSING_CONFIG_NAME
from vla_foundry.shards import parse_manifest
from vla_foundry.storage.uri import (
    file_test,
    is_remote,
    join_uri,
    open_input,
    parent_uri,
    read_range,
    read_text,
    read_yaml,
)

SPEC_NAME = "robotics.json"
SPEC_VERSION = 1
# instruction types that published datasets may have; recordings have others, nonsense for ablations
PUBLISHED_LANGUAGE_TYPES = ("original", "randomized", "verbose", "alternative")
# bytes of a remote shard to read to find its first sample
_FIRST_BYTES = 16 << 20
# steps, pixels or columns
_MOST = 1_000_000
_POSITION, _ROTATION = "__xyz", "__rot_6d"

Layout = Literal["episodes", "samples"]
Representation = Literal["absolute", "relative", "delta"]
Role = Literal["observation", "action"]
_Stored = Literal["float32", "float64"]
_Switch = Literal[True, False]


@dataclass(frozen=True, kw_only=True)
class GripperRange:
    """The values of a closed and an open gripper, in the field's unit; their order gives the sign."""

    open: float
    closed: float


@dataclass(frozen=True, kw_only=True)
class FieldDescription:
    """What the numbers of a field mean."""

    # columns: (C,)
    shape: tuple[int]
    # float32 or float64
    dtype: str = "float32"
    # unit of every column (m, rad, N, ...); None: mixed or unknown
    unit: str | None = None
    # frame of poses (world, base, ...); None: unknown, or not a pose
    frame: str | None = None
    # absolute; relative: to the reference pose at the anchor; delta: change from the previous step
    representation: Representation = "absolute"
    # rotation format (robotics/rotations.py); None: the field is not a rotation
    rotation: str | None = None
    role: Role = "observation"
    # range of a gripper field; None: not a gripper, or unknown
    gripper: GripperRange | None = None
    # True for switches, counters and ids, which cannot be interpolated
    is_discrete: bool = False
    # name of each column (joints); empty: unknown
    names: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Number of columns (C)."""
        return self.shape[0]

    def label(self, column: int) -> str:
        """Return a column's number, and its name if known."""
        return f"{column} ({self.names[column]})" if self.names else str(column)


@dataclass(frozen=True, kw_only=True)
class CameraDescription:
    """The images of a camera."""

    # (W, H) as stored
    size: tuple[int, int]
    # (W, H) as recorded; None: differs between episodes
    original_size: tuple[int, int] | None
    # True: 16-bit PNG in millimetres; False: RGB JPEG
    is_depth: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The spec of a robotics dataset; see the module docstring."""

    layout: Layout
    # frames per second; None: unknown (published datasets do not state it)
    fps: float | None
    # the preprocessing window: the statistics cover it, and the layout "samples" stores only it
    past_lowdim_steps: int
    future_lowdim_steps: int
    # frame offsets of the images from the anchor: fixed in the layout "samples", a suggestion in "episodes"
    image_indices: tuple[int, ...]
    padding_strategy: PaddingStrategy
    # in dataset order
    cameras: dict[str, CameraDescription]
    fields: dict[str, FieldDescription]
    pose_groups: tuple[PoseGroup, ...] = ()
    # instruction types that occur in at least one episode
    language_types: tuple[str, ...] = ()


class NamedSpec(NamedTuple):
    """A spec, and the name by which the user knows its owner."""

    # a manifest or a run folder
    name: str
    spec: DatasetSpec


def format_spec(spec: DatasetSpec) -> str:
    """Format robotics.json."""
    values = {"version": SPEC_VERSION, **asdict(spec)}
    for field in values["fields"].values():
        if not field["names"]:
            del field["names"]
    values["pose_groups"] = [
        {key: value for key, value in asdict(group).items() if value is not None} for group in spec.pose_groups
    ]
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def parse_spec(text: str, origin: str) -> DatasetSpec:
    """Parse robotics.json.

    Args:
        origin: where the text comes from, for messages.

    Raises:
        ValueError: the text is not a spec or has another version; the message names the key.
    """
    values = parse_json(text, origin, finite=True)
    if not isinstance(values, dict) or values.get("version") != SPEC_VERSION:
        found = values.get("version") if isinstance(values, dict) else None
        raise ValueError(f"{origin} is not a robotics spec of version {SPEC_VERSION} (its version is {found!r}).")
    try:
        spec = DatasetSpec(
            layout=_choice(values["layout"], Layout, "layout"),
            fps=None if values["fps"] is None else _number(values["fps"], "fps"),
            past_lowdim_steps=_whole(values["past_lowdim_steps"], "past_lowdim_steps"),
            future_lowdim_steps=_whole(values["future_lowdim_steps"], "future_lowdim_steps"),
            image_indices=tuple(_whole(index, "image_indices", -_MOST) for index in values["image_indices"]),
            padding_strategy=parse_padding(values["padding_strategy"]),
            cameras={name: _parse_camera(value) for name, value in values["cameras"].items()},
            fields={name: _parse_field(name, value) for name, value in values["fields"].items()},
            pose_groups=parse_pose_groups(values.get("pose_groups", ()), "pose_groups"),
            language_types=tuple(_text(kind, "language_types") for kind in values.get("language_types", ())),
        )
    except KeyError as error:
        raise ValueError(f"{origin} lacks the key {error}.") from None
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{origin} is not a robotics spec ({error}).") from None
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    if spec.fps is not None and not spec.fps > 0:
        raise ValueError(f"{origin}: fps ({spec.fps:g}) must be above 0.")
    return spec


def _parse_camera(value: Mapping[str, Any]) -> CameraDescription:
    width, height = value["size"]
    original = value.get("original_size")
    return CameraDescription(
        size=(_whole(width, "size", 1), _whole(height, "size", 1)),
        original_size=None if original is None else (_whole(original[0], "size", 1), _whole(original[1], "size", 1)),
        is_depth=_choice(value.get("is_depth", False), _Switch, "is_depth"),
    )


def _parse_field(name: str, value: Mapping[str, Any]) -> FieldDescription:
    known = {field.name: value[field.name] for field in fields(FieldDescription) if field.name in value}
    path = f"fields.{name}"
    gripper = value.get("gripper")
    (width,) = value["shape"]
    known |= {
        "shape": (_whole(width, f"{path}.shape"),),
        "dtype": _choice(value.get("dtype", "float32"), _Stored, f"{path}.dtype"),
        "gripper": None
        if gripper is None
        else GripperRange(**{end: _number(gripper[end], f"{path}.gripper.{end}") for end in ("open", "closed")}),
        "representation": _choice(value.get("representation", "absolute"), Representation, path),
        "role": _choice(value.get("role", "observation"), Role, path),
        "is_discrete": _choice(value.get("is_discrete", False), _Switch, f"{path}.is_discrete"),
        "names": tuple(_text(column, f"{path}.names") for column in value.get("names", ())),
    }
    for key in ("unit", "frame", "rotation"):
        known[key] = None if value.get(key) is None else _text(value[key], f"{path}.{key}")
    if len(known["names"]) not in (0, width):
        raise ValueError(f"fields.{name} has {width} columns, but {len(known['names'])} names.")
    return FieldDescription(**known)


def parse_padding(value: Any) -> PaddingStrategy:
    """Return what fills the steps beyond an episode's ends.

    Raises:
        ValueError: nothing is registered by this name.
    """
    return _choice(value, PaddingStrategy, "padding_strategy")


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float) or abs(value) > _MOST:
        raise ValueError(f"{what} must be a number from -{_MOST:,} to {_MOST:,}, got {value!r}.")
    return float(value)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, got {value!r}.")
    return value


def _whole(value: Any, what: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= _MOST:
        raise ValueError(f"{what} must be a whole number from {least:,} to {_MOST:,}, got {value!r}.")
    return value


def _choice(value: Any, choices: Any, what: str) -> Any:
    allowed = get_args(choices)
    # 1 == True
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"{what} must be one of {', '.join(map(str, allowed))}, got {value!r}.")
    return value


def read_spec(manifest: str) -> DatasetSpec:
    """Return the spec of the dataset that a manifest belongs to.

    Raises:
        FileNotFoundError: the dataset has neither a spec nor a published preprocessing_config.yaml.
        ValueError: one of these is malformed.
    """
    folder = parent_uri(manifest)
    location = join_uri(folder, SPEC_NAME)
    try:
        text = read_text(location)
    except FileNotFoundError:
        return _describe_published(folder, manifest)
    return parse_spec(text, location)


@lru_cache(maxsize=64)  # needed when params are resolved, and again by each loader
def _describe_published(folder: str, manifest: str) -> DatasetSpec:
    from vla_foundry.storage.npz import NpzFile  # lazy, so that params can import this file without numpy

    location = join_uri(folder, PREPROCESSING_CONFIG_NAME)
    try:
        values = read_yaml(location)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{manifest} does not belong to a robotics dataset: it has neither {SPEC_NAME} nor "
            f"{PREPROCESSING_CONFIG_NAME} beside it. Make the dataset with `vla-foundry preprocess robotics`."
        ) from None
    try:
        past, future = (
            _whole(values["past_lowdim_steps"], "past_lowdim_steps"),
            _whole(values["future_lowdim_steps"], "future_lowdim_steps"),
        )
        image_indices = tuple(_whole(index, "image_indices", -_MOST) for index in values["image_indices"])
        padding = parse_padding(values.get("padding_strategy", "copy"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{location} is not a published preprocessing config ({type(error).__name__}: {error})."
        ) from None
    first = parse_manifest(read_text(manifest), manifest, file_test(parent_uri(manifest)))[0].shard + ".tar"
    members = _read_first_sample(join_uri(folder, first))
    metadata = parse_object(members["metadata.json"], f"{first}: its first metadata.json")
    arrays = NpzFile.from_bytes(members["lowdim.npz"])
    widths = {name: arrays.shape(name)[1] for name in arrays.names if len(arrays.shape(name)) == 2}
    fields = {name: describe_published_field(name, width) for name, width in widths.items()}
    return DatasetSpec(
        layout="samples",
        fps=None,
        past_lowdim_steps=past,
        future_lowdim_steps=future,
        image_indices=image_indices,
        padding_strategy=padding,
        cameras=_describe_cameras(metadata, values.get("resize_images_size")),
        fields=fields,
        pose_groups=find_published_pose_groups(fields),
        language_types=PUBLISHED_LANGUAGE_TYPES,
    )


def describe_published_field(name: str, width: int) -> FieldDescription:
    """Describe a field of published data from its name alone."""
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
    """Return the pose groups that published fields form, judging by their names."""
    stems = [name.removesuffix(_POSITION) for name in fields if name.endswith(_POSITION)]
    return tuple(
        PoseGroup(name=stem, position_key=stem + _POSITION, rotation_key=stem + _ROTATION)
        for stem in stems
        if stem + _ROTATION in fields
    )


def _read_first_sample(shard: str) -> dict[str, bytes]:
    """Return {suffix: content} of the members of a shard's first sample that are not images."""
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
