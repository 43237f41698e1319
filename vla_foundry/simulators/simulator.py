"""The interface of simulators, and their registry.

A simulator is a Gymnasium environment that also says what a policy needs to know: cameras, fields, the parts of an
action, the instruction, success and, if it has one, its expert. It knows no policy. Images are uint8 HWC and upright.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from jaxtyping import Float, UInt8

from vla_foundry.config.yaml_source import find_config
from vla_foundry.params.commands.datagen import SimulatorParams
from vla_foundry.registry import Registry
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.storage.uri import read_yaml

P = TypeVar("P", bound=SimulatorParams)

# names of a simulator's signals in recorded data: prefix of cameras, prefix of fields, all fields concatenated, and
# prefix of an action's parts
IMAGES, OBSERVATION, STATE, ACTION = "observation.images", "observation", "observation.state", "action"


def name_observation(
    images: Mapping[str, np.ndarray], fields: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return (images, fields) of an observation under their names in recorded data, STATE included."""
    named = {f"{OBSERVATION}.{name}": values for name, values in fields.items()}
    named[STATE] = np.concatenate(list(fields.values()))
    return {f"{IMAGES}.{name}": image for name, image in images.items()}, named


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectState:
    """Position and state of one object."""

    # its name in instructions and captions
    name: str
    # the part that a robot acts on ("handle"); empty: the whole object
    part: str
    # position of that part
    position: Float[np.ndarray, "3"]
    # points spread over the whole object
    landmarks: Float[np.ndarray, "N 3"]
    # 0: fully closed (or at rest), 1: fully open; None: it does not open
    openness: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatorState:
    """The true state of a scene, hidden from policies."""

    # midpoint between the fingertips
    gripper_position: Float[np.ndarray, "3"]
    # the objects in the scene, the main one first
    objects: tuple[ObjectState, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A scene to set up. Every number is a fraction, 0 to 1, of a range that the simulator chooses."""

    # where the main object stands: across and along the table
    object_place: tuple[float, float]
    # how far it is open
    openness: float
    # where the gripper is: across, along and above the table
    gripper_place: tuple[float, float, float]
    # how far the fingers are apart
    gripper_opening: float


def read_success(info: Mapping[str, Any], key: str = "success") -> bool:
    """Return whether an info says success; it must be true or false, or 1 or 0.

    Raises:
        ValueError: it is something else, such as a share of what is done, or absent.
    """
    if key not in info or info[key] not in (0, 1):
        raise ValueError(f"info['{key}'] must say success: true or false, got {info.get(key)!r}.")
    return bool(info[key])


class Simulator(gymnasium.Env[dict[str, Any], np.ndarray], ABC):
    """One task in one simulated world, as a Gymnasium environment. Use it as a context manager, or call `close()`.

    An observation is {"images": {camera: uint8 [H, W, 3]}, "fields": {field: float32 [C]}}; `step` and `reset` put
    "success" into their info. Derived classes define `reset` and `step`, which return `observe()`, and what `observe`
    calls: `sense` and `render`. They set the attributes below and `action_space`.

    The seed given to `reset` determines everything: the same seed and the same actions give the same bytes, whatever
    happened before.
    """

    # the task in words
    instruction: str
    # all wordings of the task; `instruction` is the first
    instructions: tuple[str, ...]
    # the robot's name
    robot: str
    # control steps per second
    fps: int
    # range of each number of an action, in its own unit; values outside are clipped
    action_space: Any  # a Box
    # name of each number of an action; the effort of the fingers is called "gripper"
    action_names: tuple[str, ...]
    # what an action's numbers mean, part by part in order; empty: unknown
    action_parts: Mapping[str, FieldDescription] = MappingProxyType({})
    # part of an action -> field whose current value, sent as that part, holds the robot still; 0 holds the others
    rest_fields: Mapping[str, str] = MappingProxyType({})
    # field of an observation -> name of each of its numbers
    field_names: Mapping[str, tuple[str, ...]]
    # control steps after which an episode ends
    max_steps: int
    # names of the cameras in observations
    cameras: tuple[str, ...]
    # width and height of images, pixels
    image_size: tuple[int, int]
    # render the images of the next observations: that takes most of the time, and policies look rarely
    renders_images = True

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    @classmethod
    @abstractmethod
    def defaults(cls, **source: str) -> tuple[tuple[str, ...], str]:
        """Return the tasks (empty: the user must name some) and the camera if the user names none.

        Args:
            source: as in create_simulator.
        """

    @abstractmethod
    def sense(self) -> dict[str, np.ndarray]:
        """Return the fields of the current state, float32."""

    @abstractmethod
    def render(self, camera: str | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """Render the current state, upright; None: as the first camera sees it."""

    def observe(self) -> dict[str, Any]:
        """Sense the current state; nothing moves. `renders_images` says whether images are rendered.

        Raises:
            ValueError: the simulator broke down: what it senses is not finite, or not what it says of itself.
        """
        images = {camera: self.render(camera) for camera in self.cameras} if self.renders_images else {}
        fields = self.sense()
        if list(fields) != list(self.field_names):
            raise ValueError(f"{self.robot} senses {list(fields)}, but its field_names are {list(self.field_names)}.")
        for name, parts in self.field_names.items():
            values = np.asarray(fields[name])
            if values.dtype.kind not in "fiu" or values.shape != (len(parts),) or not np.isfinite(values).all():
                found = values.tolist() if values.shape == (len(parts),) else f"{values.dtype} {values.shape}"
                raise ValueError(f"field '{name}' of {self.robot} must be {len(parts)} finite numbers, got {found}.")
        width, height = self.image_size
        for camera, image in images.items():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (height, width, 3):
                found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else repr(image)[:80]
                raise ValueError(f"camera '{camera}' of {self.robot} gives {found}, not uint8 {(height, width, 3)}.")
        return {"images": images, "fields": fields}

    @property
    def has_expert(self) -> bool:
        """Whether there is an expert."""
        return type(self).expert is not Simulator.expert

    def expert(self) -> Float[np.ndarray, " A"]:
        """Return the action of a scripted expert, which sees the true state.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(f"{type(self).__name__} has no expert.")

    @property
    def action_scale(self) -> Float[np.ndarray, " A"]:
        """Size of a large action, in its unit: demonstrations scale their noise with it."""
        return (self.action_space.high - self.action_space.low).astype(np.float64) / 2

    def clip_action(self, action: Float[np.ndarray, " A"]) -> Float[np.ndarray, " A"]:
        """Return an action within the action space.

        Raises:
            ValueError: its width is wrong, or it is not finite.
        """
        if action.shape != self.action_space.shape:
            raise ValueError(f"An action must have shape {self.action_space.shape}, got {action.shape}.")
        if not np.isfinite(action).all():
            raise ValueError(f"An action must be finite, got {action.tolist()}.")
        return np.clip(action, self.action_space.low, self.action_space.high).astype(np.float32)

    def describe_observations(self) -> gymnasium.Space:
        """Return the space of observations, from `field_names`, `cameras` and `image_size`."""
        width, height = self.image_size
        images: dict[str, Any] = {name: Box(0, 255, (height, width, 3), np.uint8) for name in self.cameras}
        fields: dict[str, Any] = {
            name: Box(-np.inf, np.inf, (len(parts),), np.float32) for name, parts in self.field_names.items()
        }
        return Dict({"images": Dict(images), "fields": Dict(fields)})


class SceneSimulator(Simulator):
    """A simulator that can also arrange scenes of its task's objects, and tell their true state.

    Positions are metres in its world frame.
    """

    @abstractmethod
    def project(self, camera: str, position: Float[np.ndarray, "3"]) -> tuple[float, float]:
        """Return where a point appears: (column, row) as fractions of width and height from the top left corner."""

    @abstractmethod
    def is_hidden(self, camera: str, position: Float[np.ndarray, "3"], *, by: Literal["robot", "object"]) -> bool:
        """Return whether the robot, or the main object, hides a point from the camera."""

    @abstractmethod
    def describe(self) -> SimulatorState:
        """Return the true current state."""

    @abstractmethod
    def arrange(self, layout: Layout) -> SimulatorState | None:
        """Set up a scene outside any episode, as a function of `layout` alone. Goal markers are hidden.

        Returns:
            Its true state, or None if the robot would penetrate an object.

        Raises:
            ValueError: this task has no such scenes.
        """


SIMULATORS: Registry[Any] = Registry("simulator", package="vla_foundry.simulators", decorator="register_simulator")
# decorator of a Simulator class, created as `(task, *, cameras, image_size)`
register_simulator = SIMULATORS.register


def create_simulator(
    name: str, task: str, *, cameras: Sequence[str], image_size: int | tuple[int, int], **source: str
) -> Simulator:
    """Build one task of the simulator `name`.

    Args:
        task: the simulator's name of the task.
        cameras: cameras in observations.
        image_size: width and height of each image in pixels; one number: both.
        source: further words for the simulator; `gymnasium` takes env_id and field_map.

    Raises:
        ValueError: the simulator, task or camera is unknown, the simulator is not installed, or there is no renderer.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return SIMULATORS.get(name)(task, cameras=tuple(cameras), image_size=size, **source)


def find_source(params: SimulatorParams) -> dict[str, str]:
    """Return the further words with which to create the simulator that the params name."""
    given = {"env_id": params.env_id, "field_map": params.field_map}
    return {name: value for name, value in given.items() if value is not None}


def describe_source(params: SimulatorParams) -> dict[str, Any]:
    """Return what an episode depends on besides the simulator's name: the environment and the content of its map."""
    source: dict[str, Any] = find_source(params)
    return source | {"field_map": read_yaml(find_config(source["field_map"]))} if source else source


def complete_params(params: P) -> tuple[P, str]:
    """Fill in tasks that the user did not name.

    Returns:
        The params, and the simulator's default camera.

    Raises:
        ValueError: the simulator is unknown or has no default tasks, or its field map is wrong.
    """
    tasks, camera = SIMULATORS.get(params.simulator).defaults(**find_source(params))
    if not (params.tasks or tasks):
        raise ValueError(f"tasks is empty. Name tasks of simulator '{params.simulator}': --tasks NAME,NAME.")
    return replace(params, tasks=params.tasks or list(tasks)), camera
