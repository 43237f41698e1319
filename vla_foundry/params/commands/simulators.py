"""Params of a field map that makes a Gymnasium environment a simulator (`--simulator gymnasium --field_map FILE`)."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from vla_foundry.config.schema import BaseParams, Count, Finite, Name, Positive, Steps
from vla_foundry.params.commands.preprocessing_robotics import GripperParams


@dataclass(frozen=True, kw_only=True)
class ColumnsParams(BaseParams):
    """Some of the numbers of an array."""

    # [first, end) of the flattened array; null: all
    columns: tuple[Steps, Steps] | None = None
    # name of each number; empty: they are counted
    names: list[Name] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns is not None and not self.columns[0] < self.columns[1]:
            raise ValueError(f"columns {list(self.columns)} must be [first, end) with 0 <= first < end.")


@dataclass(frozen=True, kw_only=True)
class StateFieldParams(ColumnsParams):
    """A field that the policy senses."""

    # key of the observation, keys of nested ones joined by /; null: the field's name, or the whole of an observation
    # that is an array
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class ActionPartParams(ColumnsParams):
    """A part of an action: what its numbers mean."""

    # unit of every number: m, rad, px, ...
    unit: str | None = None
    # frame of a pose: world, base, ...
    frame: str | None = None
    # absolute, or delta: a change from the step before
    representation: Literal["absolute", "delta"] = "absolute"
    # rotation format, as in the field maps of preprocessing
    rotation: str | None = None
    # the ends of a gripper
    gripper: GripperParams | None = None
    # least and largest value; null: the environment's
    range: tuple[Finite, Finite] | None = None
    # field whose current value, sent as this part, holds the robot still; null: 0 does
    rest: Name | None = None
    # size of a large action, in its unit: demonstrations scale their noise with it; null: half the action's range
    scale: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class EnvironmentCameraParams(BaseParams):
    """A camera."""

    # key of the observation that holds its images; null: the environment's render()
    source: str | None = None
    # how images of another size or aspect are fitted
    resize: Literal["center_crop", "resize_no_crop", "resize_fit"] = "center_crop"


@dataclass(frozen=True, kw_only=True)
class SuccessParams(BaseParams):
    """When the task is done: one of four."""

    # a key of `info` is true
    info: str | None = None
    # the reward of a step is at least this
    reward: Finite | None = None
    # the sum of rewards is at least this when the environment ends the episode
    episode_return: Finite | None = None
    # the environment terminates the episode
    terminated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [self.info is not None, self.reward is not None, self.episode_return is not None, self.terminated]
        if sum(given) != 1:
            raise ValueError("success must be one of info, reward, episode_return and terminated: true.")


@dataclass(frozen=True, kw_only=True)
class EnvironmentMapParams(BaseParams):
    """A field map of an environment: names its numbers and images, and says when its task is done."""

    # the task in words, and other wordings
    instruction: list[str]
    # field -> where it is in an observation
    fields: dict[str, StateFieldParams]
    # part of an action -> its numbers, all parts in order
    actions: dict[str, ActionPartParams]
    success: SuccessParams
    # camera -> its images; the first is the default
    cameras: dict[str, EnvironmentCameraParams] = field(default_factory=lambda: {"front": EnvironmentCameraParams()})
    # name of the task; null: from the environment's id
    task: Name | None = None
    # the robot's name; null: the task
    robot: Name | None = None
    # control steps per second; null: the environment's render_fps
    fps: Count | None = None
    # steps after which an episode ends; null: the environment's limit
    max_steps: Count | None = None
    # keyword arguments of gymnasium.make
    make: dict[str, Any] = field(default_factory=dict)
    # expert registered with @register_expert; null: none
    expert: Name | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("instruction", "fields", "actions", "cameras"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty. Name at least one.")
        for name in (*self.fields, *self.actions, *self.cameras):
            if not re.fullmatch(r"[\w@-]+", name):
                raise ValueError(f"'{name}' must be letters, digits, _, - and @: it becomes part of longer names.")
        if "state" in self.fields and len(self.fields) > 1:
            raise ValueError("fields.state: demos call all fields together 'state'. Choose another name.")
        for name, part in self.actions.items():
            if part.rest is not None and part.rest not in self.fields:
                raise ValueError(f"actions.{name}.rest '{part.rest}' is none of fields: {', '.join(self.fields)}.")
