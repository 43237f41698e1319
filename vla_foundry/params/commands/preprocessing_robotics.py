"""Params of `vla-foundry preprocess robotics`, without what each converter adds."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from vla_foundry.config.base import ChoiceParams


@dataclass(frozen=True, kw_only=True)
class RoboticsPreprocessParams(ChoiceParams):
    """Turn recordings of robots into shards; `--type` says what kind of recordings they are."""

    _choice_registry: ClassVar[dict[str, Any]] = {}
    choice_path: ClassVar[str] = "type"

    # recordings: folders or files, local or s3://; what exactly, the converter says
    source_episodes: list[str]
    # folder to write to, local or s3://
    output_dir: str
    # episodes: each frame is stored once, windows are made when loading; samples: each sample is stored whole
    layout: Literal["episodes", "samples"] = "episodes"
    # steps before the anchor in the windows that statistics are of, and that layout samples stores
    past_lowdim_steps: int = 1
    # steps after the anchor
    future_lowdim_steps: int = 14
    # cameras to take, in this order; null: all
    camera_names: list[str] | None = None
    # leave out episodes that lack a camera; false: they fail
    skip_episodes_missing_cameras: bool = False
    # frames of a sample's images, counted from the anchor
    image_indices: list[int] = field(default_factory=lambda: [-1, 0])
    # every stride-th frame is an anchor
    stride: int = 1
    # anchors whose window reaches further beyond the episode's first frame are no samples, steps
    max_padding_left: int = 1
    # anchors whose window reaches further beyond the last frame are no samples, steps
    max_padding_right: int = 7
    # what stands in steps outside the episode: the nearest frame, zeros, or the frames mirrored
    padding_strategy: Literal["copy", "zero", "reflect"] = "copy"
    # windows in which nothing moves are no samples
    filter_still_samples: bool = False
    # a field moves if its standard deviation over the window is above this, in the field's own unit; holds for the
    # fields named *action*, *joint*, *poses*, *xyz* or *actual*
    still_threshold: float = 0.01
    # thresholds by field or pattern, as numbers or with a unit: {"*__xyz": "5 mm", "*__rot_6d": "1 deg"}; given, they
    # stand for still_threshold
    still_thresholds: dict[str, str] = field(default_factory=dict)
    # bring every episode to this rate, frames a second; null: as recorded
    target_fps: float | None = None
    # how far a frame may be from its time without target_fps, in frames
    timestamp_tolerance: float = 0.5
    # most samples in a shard of layout samples
    samples_per_shard: int = 128
    # about how many frames a shard of episodes holds; few frames make smaller shards, so that all workers have some
    frames_per_shard: int = 2048
    # only the first so many episodes; -1: all
    max_episodes_to_process: int = -1
    # NaN and infinite values: true: the episode fails; false: it is left out and reported
    fail_on_nan: bool = True
    # share of the episodes that may fail; more stop the job, and nothing is published
    max_failed_fraction: float = 0.0
    # write stats.json
    compute_statistics: bool = True
    # share of the episodes (or tasks) held out: the output is then output_dir/train and output_dir/validation
    validation_fraction: float = 0.0
    # hold out episodes of every task, or whole tasks
    validation_by: Literal["episode", "task"] = "episode"
    # hold out these episodes too, by id or pattern ("pick_*")
    validation_episodes: list[str] = field(default_factory=list)
    # [width, height] of stored images; null: as recorded
    resize_images_size: list[int] | None = None
    # cut the centre out, distort, or scale into black borders
    image_resizing_method: Literal["center_crop", "resize_no_crop", "resize_fit"] = "center_crop"
    # quarter turns clockwise by camera, made before resizing: {wrist: 1}; null: none
    camera_rotations: dict[str, int] | None = None
    # 1 .. 100
    jpeg_quality: int = 95
    # seed of the order of episodes and samples, and of the validation split
    seed: int = 0
    # tasks at a time; null: one per core; 0: no Ray, one task after another in this process
    num_workers: int | None = None
    # Ray cluster to run on ("auto", host:port); null: this machine
    ray_address: str | None = None
    # replace what the output folder holds if it was made, or begun, with another configuration
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.source_episodes or not self.output_dir:
            raise ValueError("source_episodes and output_dir must not be empty.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} ({value}) must be at least {least}.")
        for name in ("max_failed_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name):g}) must be between 0 and 1.")
        if self.target_fps is not None and not self.target_fps > 0:
            raise ValueError(f"target_fps ({self.target_fps:g}) must be above 0.")
        if not self.image_indices or len(set(self.image_indices)) < len(self.image_indices):
            raise ValueError(f"image_indices {self.image_indices} must be at least one frame, none of them twice.")
        if self.image_indices != sorted(self.image_indices):
            raise ValueError(f"image_indices {self.image_indices} must be in order. Use {sorted(self.image_indices)}.")
        if self.camera_names is not None and len({name.lower() for name in self.camera_names}) < len(self.camera_names):
            raise ValueError(f"camera_names {self.camera_names} must differ, in lower case too.")
        size = self.resize_images_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"resize_images_size {size} must be [width, height], pixels.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality ({self.jpeg_quality}) must be 1 .. 100.")


_LEAST = {
    "past_lowdim_steps": 0, "future_lowdim_steps": 0, "stride": 1, "max_padding_left": 0, "max_padding_right": 0,
    "still_threshold": 0, "timestamp_tolerance": 0, "samples_per_shard": 1, "frames_per_shard": 1, "seed": 0,
    "max_episodes_to_process": -1, "num_workers": 0,
}  # fmt: skip
