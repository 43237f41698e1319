"""Params of `preprocess robotics` with its converters and field maps, and of `stats`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from vla_foundry.config.schema import (
    FPS,
    BaseParams,
    Bounds,
    ChoiceParams,
    Count,
    Finite,
    Fraction,
    ImageIndex,
    Location,
    Name,
    NonNegative,
    NonNegativeInt,
    NumWorkers,
    Positive,
    Size,
    Steps,
    register_choice,
)
from vla_foundry.robotics.spec import Representation, Role

T = TypeVar("T", bound=type)
_QuarterTurns = Annotated[int, Bounds(least=-4, most=4)]


def register_converter_params(name: str) -> Callable[[T], T]:
    """Register a dataclass as the params of the converter `name`."""
    return register_choice(name)


@dataclass(frozen=True, kw_only=True)
class RoboticsPreprocessParams(ChoiceParams):
    """Turn robot recordings into shards; `--type` names the kind of recording."""

    _choice_registry: ClassVar[dict[str, Any]] = {}
    choice_path: ClassVar[str] = "type"

    # recordings: folders or files, local or s3://, as the converter expects them
    source_episodes: list[Location]
    # folder to write to, local or s3://
    output_dir: Location
    # episodes: store each frame once and build windows when loading; samples: store each sample whole
    layout: Literal["episodes", "samples"] = "episodes"
    # steps before the anchor, in statistics and in the windows that layout samples stores
    past_lowdim_steps: Steps = 1
    # steps after the anchor
    future_lowdim_steps: Steps = 14
    # cameras to store, in this order, by name or by its last part; null: all
    camera_names: list[str] | None = None
    # skip episodes that lack a camera; false: they fail
    skip_episodes_missing_cameras: bool = False
    # image frames relative to the anchor
    image_indices: list[ImageIndex] = field(default_factory=lambda: [-1, 0])
    # every stride-th frame is an anchor
    stride: Count = 1
    # skip anchors whose window starts more than this many steps before the episode's first frame
    max_padding_left: Steps = 1
    # skip anchors whose window ends more than this many steps after the last frame
    max_padding_right: Steps = 7
    # fill steps outside the episode with the nearest frame, zeros, or mirrored frames
    padding_strategy: Literal["copy", "zero", "reflect"] = "copy"
    # skip windows in which nothing moves
    filter_still_samples: bool = False
    # a field moves if its standard deviation over the window is above this, in the field's own unit; applies to the
    # fields named *action*, *joint*, *poses*, *xyz* or *actual*
    still_threshold: NonNegative = 0.01
    # thresholds by field or pattern, as numbers or with a unit: {"*__xyz": "5 mm", "*__rot_6d": "1 deg"}; they replace
    # still_threshold
    still_thresholds: dict[str, str] = field(default_factory=dict)
    # resample every episode to this rate, frames per second; null: as recorded
    target_fps: FPS | None = None
    # without target_fps: how far a frame may be from its time, in frames
    timestamp_tolerance: NonNegative = 0.5
    # most samples in a shard of layout samples
    samples_per_shard: Count = 128
    # target number of frames per shard of episodes; small datasets get smaller shards, so that all workers have some
    frames_per_shard: Count = 2048
    # process only this many first episodes; -1: all
    max_episodes_to_process: Annotated[int, Bounds(least=-1)] = -1
    # NaN and infinite values: true: the episode fails; false: skip and report it
    fail_on_nan: bool = True
    # fraction of episodes that may fail; above it the job stops and publishes nothing
    max_failed_fraction: Fraction = 0.0
    # write stats.json
    compute_statistics: bool = True
    # share of the episodes (or tasks) held out: the output is then output_dir/train and output_dir/validation
    validation_fraction: Fraction = 0.0
    # hold out episodes of every task, or whole tasks
    validation_by: Literal["episode", "task"] = "episode"
    # hold out these episodes too, by id or pattern ("pick_*")
    validation_episodes: list[str] = field(default_factory=list)
    # [width, height] of stored images; null: as recorded
    resize_images_size: list[Size] | None = None
    # centre crop, distort, or pad with black
    image_resizing_method: Literal["center_crop", "resize_no_crop", "resize_fit"] = "center_crop"
    # quarter turns clockwise by camera, before resizing: {wrist: 1}; null: none
    camera_rotations: dict[str, _QuarterTurns] | None = None
    # quality of stored JPEG images
    jpeg_quality: Annotated[int, Bounds(least=1, most=100)] = 95
    # seed of the order of episodes and samples, and of the validation split
    seed: NonNegativeInt = 0
    # parallel tasks; null: one per core; 0: no Ray, run tasks one by one in this process
    num_workers: NumWorkers | None = None
    # Ray cluster to run on ("auto", host:port); null: this machine
    ray_address: Name | None = None
    # replace an output folder that was written or started with another configuration
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source_episodes or not self.output_dir:
            raise ValueError("source_episodes and output_dir must not be empty.")
        if not self.image_indices or len(set(self.image_indices)) < len(self.image_indices):
            raise ValueError(f"image_indices {self.image_indices} must list at least one frame, and none twice.")
        if self.image_indices != sorted(self.image_indices):
            raise ValueError(f"image_indices {self.image_indices} must ascend. Use {sorted(self.image_indices)}.")
        if self.camera_names is not None and len({name.lower() for name in self.camera_names}) < len(self.camera_names):
            raise ValueError(f"camera_names {self.camera_names} must differ, in lower case too.")
        size = self.resize_images_size
        if size is not None and len(size) != 2:
            raise ValueError(f"resize_images_size {size} must be [width, height], pixels.")


@dataclass(frozen=True, kw_only=True)
class GripperParams(BaseParams):
    """The values of a gripper's two ends."""

    # value of the open gripper, in the field's unit
    open: Finite
    # value of the closed gripper
    closed: Finite

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.open == self.closed:
            raise ValueError(f"open and closed must differ, both are {self.open:g}.")


@dataclass(frozen=True, kw_only=True)
class FieldParams(BaseParams):
    """One field: its columns in the recording, and what they mean."""

    # column of a LeRobot dataset, or path within an episode of an HDF5 file; null: the field's own name
    source: str | None = None
    # [first, end) of the source's columns; null: all
    columns: tuple[Steps, Steps] | None = None
    # null: action for names like `action...` and `robot__action__...`, else observation
    role: Role | None = None
    # unit of every column: m, rad, N, ...
    unit: str | None = None
    # frame that poses are given in: world, base, ...
    frame: str | None = None
    # absolute, or delta: the change from the step before
    representation: Representation = "absolute"
    # rotation format: rot_6d_rows, quaternion_xyzw, axis_angle, euler_xyz, ...
    rotation: str | None = None
    # the ends of a gripper
    gripper: GripperParams | None = None
    # switches, counters and ids: values must not be interpolated
    is_discrete: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns is not None and not self.columns[0] < self.columns[1]:
            raise ValueError(f"columns {list(self.columns)} must be [first, end) with 0 <= first < end.")
        if self.representation == "relative":
            raise ValueError("representation must be absolute or delta: relative fields are made from pose_groups.")


@dataclass(frozen=True, kw_only=True)
class CameraParams(BaseParams):
    """One camera of an HDF5 file: an array of images, or of encoded JPEG or PNG files."""

    # path within an episode; null: the camera's own name
    source: str | None = None
    # the images are BGR instead of RGB
    is_bgr: bool = False
    # the first row of the array is the bottom of the image, as in OpenGL
    is_bottom_up: bool = False
    # depth cameras: millimetres per unit; null: a colour camera
    depth_scale: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class FieldMapParams(BaseParams):
    """A field map (`--field_map FILE`): maps a recording's columns to fields."""

    # field -> its columns, and what they mean
    fields: dict[str, FieldParams]
    # fields that form poses: name, position_key, rotation_key and, unless the field names say it,
    # reference_position_key and reference_rotation_key: the pose that relative actions refer to
    pose_groups: list[dict[str, str]] = field(default_factory=list)
    # HDF5: camera -> its array; "*" means all arrays of a group: {"*": {source: images/*}}
    cameras: dict[str, CameraParams] = field(default_factory=dict)
    # HDF5: pattern of the groups that each hold an episode; "/": the file holds one
    episodes: str = "/"
    # HDF5: frames per second, or where to find it: group@attribute, or group@attribute:key.of.its.JSON
    fps: FPS | str | None = None
    # HDF5: where to find the instruction, in the same notation; null: none
    instruction: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fields:
            raise ValueError("fields is empty. Name at least one field.")
        any_camera = self.cameras.get("*")
        if any_camera is not None and not (any_camera.source or "").endswith("/*"):
            raise ValueError(f"cameras: the source of '*' ({any_camera.source}) must be a group followed by /*.")


@dataclass(frozen=True, kw_only=True)
class ActionFieldsParams(BaseParams):
    """How to cut a recording's array of actions into fields (`--action_fields_config_path FILE`)."""

    # fields, in the order of their columns
    action_key_fields: list[str]
    # end column of each field, exclusive
    action_index_fields: list[Size]
    # fields that form poses; ignored where a recording lacks the fields
    pose_groups: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        names, ends = self.action_key_fields, self.action_index_fields
        if len(names) != len(ends) or len(set(names)) < len(names):
            raise ValueError(
                f"action_key_fields ({len(names)}) must name different fields, one for each of action_index_fields "
                f"({len(ends)})."
            )
        if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
            raise ValueError(f"action_index_fields {ends} must ascend.")


@register_converter_params("lerobot")
@dataclass(frozen=True, kw_only=True)
class LeRobotParams(RoboticsPreprocessParams):
    """LeRobot datasets, versions 2.0, 2.1 and 3.0: folders with meta/info.json, local, s3:// or hf://datasets/."""

    # features to use as observations; null: all numbers but actions and bookkeeping (none with a field map)
    observation_keys: list[str] | None = None
    # features to use as actions; null: all named `action...` (none with a field map)
    action_keys: list[str] | None = None
    # YAML file that splits features into named fields with units, rotations and poses; a path or field_maps/NAME.yaml
    field_map: Location | None = None


@register_converter_params("spartan")
@dataclass(frozen=True, kw_only=True)
class SpartanParams(RoboticsPreprocessParams):
    """Raw LBM recordings: folders with `episode_<n>/processed/` at any depth."""

    # frames per second; the recordings do not store it
    fps: FPS = 10.0
    # YAML file that cuts actions.npz into fields and groups fields into poses
    action_fields_config_path: Location = "config_presets/action_fields/lbm.yaml"
    # YAML file with `language_dict: {task: {original: [...], randomized: [...]}}`; null: as recorded
    language_annotations_path: Location | None = None
    # JSON file {task: [episode, ...]} of validation episodes, which are left out
    validation_episodes_path: Location | None = None
    # fields to leave out
    data_discard_keys: list[str] = field(default_factory=list)


@register_converter_params("hdf5")
@dataclass(frozen=True, kw_only=True)
class HDF5Params(RoboticsPreprocessParams):
    """HDF5 files (.hdf5, .h5): folders, patterns or files; the field map describes their layout."""

    # YAML file that says where episodes, fields and cameras are: a path, or field_maps/robomimic.yaml,
    # field_maps/libero.yaml, field_maps/aloha.yaml
    field_map: Location
    # frames per second; null: as in the field map
    fps: FPS | None = None
    # instruction of every episode; null: as in the field map
    instruction: str | None = None


@dataclass(frozen=True, kw_only=True)
class StatsParams(BaseParams):
    """Compute the statistics of a robotics dataset from its shards, or merge those of several datasets."""

    # dataset, local or s3://; the statistics are written to its stats.json
    folder: Location
    # datasets, or stats.json files, whose statistics to merge; the shards of `folder` are not read
    merge: list[Location] = field(default_factory=list)
    # steps before the anchor; null: as the dataset was preprocessed
    past_lowdim_steps: Steps | None = None
    # steps after the anchor; null: as the dataset was preprocessed
    future_lowdim_steps: Steps | None = None
    # another file to write, for --data.dataset_statistics
    output: Location | None = None
    # merge even if datasets contradict each other about a field or have different rates
    accept_contradictions: bool = False
    # replace existing statistics
    overwrite: bool = False
    # parallel tasks; null: one per core; 0: no Ray, run tasks one by one in this process
    num_workers: NumWorkers | None = None
    # Ray cluster to run on ("auto", host:port); null: this machine
    ray_address: Name | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.folder or self.output == "":
            raise ValueError("folder and output must not be empty.")
        if self.merge and (self.past_lowdim_steps is not None or self.future_lowdim_steps is not None):
            raise ValueError("merge uses statistics as they are. Leave out past_lowdim_steps and future_lowdim_steps.")
