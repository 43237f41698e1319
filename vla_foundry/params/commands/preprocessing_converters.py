"""Params of the converters of robot recordings, and the files that say what a recording's numbers mean."""

from dataclasses import dataclass, field

from vla_foundry.config.base import BaseParams, register_converter_params
from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.robotics.spec import Representation, Role


@dataclass(frozen=True, kw_only=True)
class GripperParams(BaseParams):
    """The values of a gripper's two ends."""

    # value of the open gripper, in the field's unit
    open: float
    # value of the closed gripper
    closed: float


@dataclass(frozen=True, kw_only=True)
class FieldParams(BaseParams):
    """One field: which columns of the recording it is, and what they mean."""

    # column of a LeRobot dataset, or path within an episode of an HDF5 file; null: the field's own name
    source: str | None = None
    # [first, end) of the source's columns; null: all
    columns: tuple[int, int] | None = None
    # null: action where the name is `action...` or `robot__action__...`, else observation
    role: Role | None = None
    # of every column: m, rad, N, ...
    unit: str | None = None
    # frame that poses are given in: world, base, ...
    frame: str | None = None
    # absolute, or delta: the change from the step before
    representation: Representation = "absolute"
    # how a rotation is written: rot_6d_rows, quaternion_xyzw, axis_angle, euler_xyz, ...
    rotation: str | None = None
    # the ends of a gripper
    gripper: GripperParams | None = None
    # switches, counters and ids: values between two of them mean nothing
    is_discrete: bool = False

    def __post_init__(self) -> None:
        if self.columns is not None and not 0 <= self.columns[0] < self.columns[1]:
            raise ValueError(f"columns {list(self.columns)} must be [first, end) with 0 <= first < end.")
        if self.representation == "relative":
            raise ValueError("representation must be absolute or delta: relative fields are made of pose_groups.")


@dataclass(frozen=True, kw_only=True)
class CameraParams(BaseParams):
    """One camera of an HDF5 file: an array of images, or of the bytes of JPEG or PNG files."""

    # path within an episode; null: the camera's own name
    source: str | None = None
    # red and blue are swapped in what the file holds
    is_bgr: bool = False
    # the first row of the array is the lowest of the image, as OpenGL has it
    is_bottom_up: bool = False
    # millimetres of one unit, of depth; null: it is a colour camera
    depth_scale: float | None = None

    def __post_init__(self) -> None:
        if self.depth_scale is not None and not self.depth_scale > 0:
            raise ValueError(f"depth_scale ({self.depth_scale:g}) must be above 0.")


@dataclass(frozen=True, kw_only=True)
class FieldMapParams(BaseParams):
    """A field map (`--field_map FILE`): the fields that a recording's columns are to become."""

    # field -> which columns it is and what they mean
    fields: dict[str, FieldParams]
    # fields that make poses: name, position_key, rotation_key and, unless the field names tell, reference_position_key
    # and reference_rotation_key: what relative actions are relative to
    pose_groups: list[dict[str, str]] = field(default_factory=list)
    # HDF5: camera -> its array; "*" stands for all arrays of a group: {"*": {source: images/*}}
    cameras: dict[str, CameraParams] = field(default_factory=dict)
    # HDF5: pattern of the groups that are an episode each; "/": the file is one
    episodes: str = "/"
    # HDF5: frames a second, or where it stands: group@attribute, or group@attribute:key.of.its.JSON
    fps: float | str | None = None
    # HDF5: where the instruction stands, in the same way; null: nowhere
    instruction: str | None = None

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError("fields is empty. Name at least one field.")
        any_camera = self.cameras.get("*")
        if any_camera is not None and not (any_camera.source or "").endswith("/*"):
            raise ValueError(f"cameras: the source of '*' ({any_camera.source}) must be a group and /*.")
        if isinstance(self.fps, float) and not self.fps > 0:
            raise ValueError(f"fps ({self.fps:g}) must be above 0.")


@dataclass(frozen=True, kw_only=True)
class ActionFieldsParams(BaseParams):
    """How a recording's one array of actions is cut into fields (`--action_fields_config_path FILE`)."""

    # fields, in the order of their columns
    action_key_fields: list[str]
    # the column that each field ends before
    action_index_fields: list[int]
    # fields that make poses; those of a recording that lacks them are left out
    pose_groups: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        names, ends = self.action_key_fields, self.action_index_fields
        if len(names) != len(ends) or len(set(names)) < len(names):
            raise ValueError(
                f"action_key_fields ({len(names)}) must be different fields, one for each of action_index_fields "
                f"({len(ends)})."
            )
        if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
            raise ValueError(f"action_index_fields {ends} must be above 0 and ascend.")


@register_converter_params("lerobot")
@dataclass(frozen=True, kw_only=True)
class LeRobotParams(RoboticsPreprocessParams):
    """LeRobot datasets of version 2.0, 2.1 or 3.0: folders that hold meta/info.json, local, s3:// or hf://datasets/."""

    # features to take as observations; null: all numbers but actions and bookkeeping (none with a field map)
    observation_keys: list[str] | None = None
    # features to take as actions; null: all that are named `action...` (none with a field map)
    action_keys: list[str] | None = None
    # YAML file that splits features into named fields with units, rotations and poses; a path or field_maps/NAME.yaml
    field_map: str | None = None


@register_converter_params("spartan")
@dataclass(frozen=True, kw_only=True)
class SpartanParams(RoboticsPreprocessParams):
    """Raw recordings of LBM: folders with `episode_<n>/processed/` at any depth."""

    # frames a second of the recordings, which do not say it themselves
    fps: float = 10.0
    # YAML file that cuts actions.npz into fields, and groups fields to poses
    action_fields_config_path: str = "config_presets/action_fields/lbm.yaml"
    # YAML file with `language_dict: {task: {original: [...], randomized: [...]}}`; null: what the recording holds
    language_annotations_path: str | None = None
    # JSON file {task: [episode, ...]} of episodes to leave out, because they validate
    validation_episodes_path: str | None = None
    # fields to leave out
    data_discard_keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fps > 0:
            raise ValueError(f"fps ({self.fps:g}) must be above 0.")


@register_converter_params("hdf5")
@dataclass(frozen=True, kw_only=True)
class HDF5Params(RoboticsPreprocessParams):
    """HDF5 files (.hdf5, .h5): folders, patterns or files; the field map says how they are laid out."""

    # YAML file that says where episodes, fields and cameras are: a path, or field_maps/robomimic.yaml, libero.yaml,
    # aloha.yaml
    field_map: str
    # frames a second; null: as the field map says
    fps: float | None = None
    # instruction of every episode; null: as the field map says
    instruction: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps ({self.fps:g}) must be above 0.")
