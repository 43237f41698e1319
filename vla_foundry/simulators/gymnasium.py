"""Any registered Gymnasium environment as a simulator, by a field map that says what its numbers mean."""

import importlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box, Discrete
from jaxtyping import Float, UInt8

from vla_foundry.config.yaml_source import find_config
from vla_foundry.images.geometry import resize_image
from vla_foundry.params.commands.simulators import ColumnsParams, EnvironmentMapParams
from vla_foundry.params.experiment import load_params_from_yaml
from vla_foundry.registry import Registry, unknown_name_message
from vla_foundry.robotics.spec import FieldDescription, GripperRange
from vla_foundry.simulators.mujoco_renderer import choose_opengl
from vla_foundry.simulators.simulator import Simulator, read_success, register_simulator

# key of an observation that is an array
_WHOLE = "observation"

EXPERTS: Registry[Any] = Registry("expert", package="vla_foundry.simulators", decorator="register_expert")
# decorator of a function that is called at each start with the environment (without wrappers), and returns a function
# that returns the next action
register_expert = EXPERTS.register


@register_simulator("gymnasium")
class GymnasiumSimulator(Simulator):
    """A Gymnasium environment, described by a field map.

    Actions are those of the environment; of a discrete one, the number is rounded to the nearest choice.

    Args:
        task: the map's task.
        env_id: registered id of the environment.
        field_map: the map's file.

    Raises:
        ValueError: the environment cannot be made, or the map does not fit it.
    """

    def __init__(
        self, task: str, *, cameras: Sequence[str], image_size: tuple[int, int], env_id: str, field_map: str
    ) -> None:
        described = load_map(field_map)
        known = _name_task(described, env_id)
        if task != known:
            raise ValueError(unknown_name_message(f"task of {field_map}", task, [known]))
        for camera in cameras:
            if camera not in described.cameras:
                raise ValueError(unknown_name_message(f"camera of {field_map}", camera, list(described.cameras)))
        self._map = described
        self._create_expert = None if described.expert is None else EXPERTS.get(described.expert)
        self._environment = create_environment(env_id, described)
        self.instructions = tuple(described.instruction)
        self.instruction = self.instructions[0]
        self.robot = described.robot or task
        self.cameras, self.image_size = tuple(cameras), image_size
        with name_fault(field_map):
            self.fps = described.fps or _known(self._environment.metadata.get("render_fps"), "fps")
            spec = self._environment.spec
            self.max_steps = _known(described.max_steps or (spec and spec.max_episode_steps), "max_steps")
            self.action_space = _as_box(self._environment.action_space)
            self._describe_actions(described)
            self._read(self._environment.reset(seed=0)[0])
            if any(described.cameras[name].source is None for name in cameras):
                # MuJoCo's renderer aims its camera at what it sees first: let that be the same in every process
                self._draw()
            self.field_names = {
                name: _names_of(part, len(values))
                for (name, part), values in zip(described.fields.items(), self.sense().values(), strict=True)
            }
        self.observation_space = self.describe_observations()
        self._act: Callable[[], np.ndarray] | None = None
        self._return = 0.0

    @classmethod
    def defaults(cls, **source: str) -> tuple[tuple[str, ...], str]:
        """See Simulator."""
        described = load_map(source["field_map"])
        return (_name_task(described, source["env_id"]),), next(iter(described.cameras))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode of `seed`."""
        super().reset(seed=seed)
        observation, info = self._environment.reset(seed=seed, options=options)
        self._read(observation)
        self._return = 0.0
        self._act = self._create_expert and self._create_expert(self._environment.unwrapped)
        key = self._map.success.info
        is_success = key is not None and key in info and read_success(info, key)
        return self.observe(), {**info, "success": is_success}

    def step(self, action: Float[np.ndarray, " A"]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Advance one control step."""
        observation, reward, is_terminated, is_truncated, info = self._environment.step(self._convert(action))
        self._read(observation)
        self._return += float(reward)
        is_success = self._judge(float(reward), is_terminated, is_truncated, info)
        return self.observe(), float(reward), is_terminated, is_truncated, {**info, "success": is_success}

    def sense(self) -> dict[str, np.ndarray]:
        """See Simulator."""
        sensed = {}
        for name, part in self._map.fields.items():
            key = part.source or (_WHOLE if list(self._sensed) == [_WHOLE] else name)
            values = np.asarray(self._find(f"fields.{name}: source", key), np.float32).reshape(-1)
            sensed[name] = _cut(values, part, f"fields.{name}")
        return sensed

    def render(self, camera: str | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """See Simulator."""
        camera = camera or (*self.cameras, *self._map.cameras)[0]
        params = self._map.cameras[camera]
        source = params.source
        image = self._draw() if source is None else self._find(f"cameras.{camera}: source", source)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"camera '{camera}' of {self.robot} does not give images: uint8 (height, width, 3).")
        width, height = self.image_size
        pixels = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)
        return resize_image(pixels, (height, width), method=params.resize)[0].movedim(0, -1).numpy().copy()

    def _draw(self) -> Any:
        if self._environment.render_mode is None:
            raise ValueError(f"{self.robot} cannot render. Take a camera with a source: the key of an image.")
        return self._environment.render()

    @property
    def has_expert(self) -> bool:
        """Whether the map names one."""
        return self._create_expert is not None

    def expert(self) -> Float[np.ndarray, " A"]:
        """See Simulator."""
        return super().expert() if self._act is None else self.clip_action(np.asarray(self._act(), np.float32))

    @property
    def action_scale(self) -> Float[np.ndarray, " A"]:
        """See Simulator."""
        widths = [part.width for part in self.action_parts.values()]
        given = [np.nan if part.scale is None else part.scale for part in self._map.actions.values()]
        given = np.repeat(given, widths)
        scale = np.where(np.isnan(given), super().action_scale, given)
        if not np.isfinite(scale).all():
            raise ValueError(f"The actions of {self.robot} have no range. Give them a scale or a range in the map.")
        return scale

    def close(self) -> None:
        """Free the environment."""
        self._environment.close()

    def _describe_actions(self, described: EnvironmentMapParams) -> None:
        """Set what is known of the action's parts.

        Raises:
            ValueError: they do not cover the action, in order.
        """
        width = self.action_space.shape[0]
        self.action_parts, end = {}, 0
        for name, part in described.actions.items():
            first, last = part.columns or (0, width)
            if first != end or last > width:
                raise ValueError(f"actions.{name}: columns [{first}, {last}) must follow {end} and end by {width}.")
            end = last
            self.action_parts[name] = FieldDescription(
                shape=(last - first,),
                unit=part.unit,
                frame=part.frame,
                representation=part.representation,
                rotation=part.rotation,
                role="action",
                gripper=part.gripper and GripperRange(open=part.gripper.open, closed=part.gripper.closed),
            )
            if part.range is not None:
                self.action_space.low[first:last], self.action_space.high[first:last] = part.range
        if end != width:
            raise ValueError(f"actions covers {end} of the action's {width} numbers.")
        self.action_names = tuple(
            name if part.gripper and len(found) == 1 else f"{name}.{number}"
            for name, part in described.actions.items()
            for found in [_names_of(part, self.action_parts[name].width)]
            for number in found
        )
        self.rest_fields = {name: part.rest for name, part in described.actions.items() if part.rest is not None}

    def _convert(self, action: np.ndarray) -> Any:
        """Return an action as the environment takes it."""
        space, clipped = self._environment.action_space, self.clip_action(action)
        if isinstance(space, Box):
            return clipped.reshape(space.shape).astype(space.dtype)
        whole = np.rint(np.clip(clipped, self.action_space.low + 0.5, self.action_space.high - 0.5)).astype(int)
        return int(whole[0]) if isinstance(space, Discrete) else whole.reshape(space.shape)

    def _judge(self, reward: float, is_terminated: bool, is_truncated: bool, info: Mapping[str, Any]) -> bool:
        success = self._map.success
        if math.isnan(reward):
            raise ValueError(f"the reward of {self.robot} is not a number.")
        if success.info is not None:
            if success.info not in info and (is_terminated or is_truncated):
                raise ValueError(unknown_name_message(f"success.info: key of {self.robot}", success.info, list(info)))
            return success.info in info and read_success(info, success.info)
        if success.reward is not None:
            return reward >= success.reward
        if success.episode_return is not None:
            return (is_terminated or is_truncated) and self._return >= success.episode_return
        return is_terminated

    def _read(self, observation: Any) -> None:
        self._sensed = dict(_flatten(observation))

    def _find(self, what: str, key: str) -> Any:
        if key not in self._sensed:
            raise ValueError(unknown_name_message(what, key, list(self._sensed)))
        return self._sensed[key]


class PresetSimulator(GymnasiumSimulator):
    """Base of simulators whose environments and maps come with the package."""

    # task -> id of its environment, and its map; the first is the default
    presets: Mapping[str, tuple[str, str]]

    def __init__(self, task: str, *, cameras: Sequence[str], image_size: tuple[int, int]) -> None:
        if task not in self.presets:
            raise ValueError(unknown_name_message(f"task of {type(self).__name__}", task, list(self.presets)))
        env_id, field_map = self.presets[task]
        super().__init__(task, cameras=cameras, image_size=image_size, env_id=env_id, field_map=field_map)

    @classmethod
    def defaults(cls, **source: str) -> tuple[tuple[str, ...], str]:
        """See Simulator."""
        env_id, field_map = next(iter(cls.presets.values()))
        return super().defaults(env_id=env_id, field_map=field_map)


def load_map(field_map: str) -> EnvironmentMapParams:
    """Load a field map: a path, or a preset (`simulators/pusht.yaml`).

    Raises:
        ValueError: the file is not such a map.
        FileNotFoundError: it does not exist.
    """
    return load_params_from_yaml(EnvironmentMapParams, find_config(field_map))


def create_environment(env_id: str, described: EnvironmentMapParams) -> Any:
    """Create the environment, able to render if it can.

    Raises:
        ValueError: it is unknown, one of its packages is missing, or it does not take the map's `make`.
    """
    # for those that use MuJoCo; others need no such library
    with suppress(ValueError):
        choose_opengl()
    # pygame draws without a display
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    options: dict[str, Any] = dict(described.make)
    if described.max_steps is not None:
        options["max_episode_steps"] = described.max_steps
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        entry: Any = gymnasium.spec(name).entry_point
        creator = load_env_creator(entry) if isinstance(entry, str) else entry
        if "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", []):
            options["render_mode"] = "rgb_array"
        return gymnasium.make(name, disable_env_checker=True, **options)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        raise ValueError(f"env_id {env_id} cannot be made: {' '.join(str(error).split())}") from None


def _name_task(described: EnvironmentMapParams, env_id: str) -> str:
    return described.task or re.sub(r".*[:/]", "", env_id)


@contextmanager
def name_fault(field_map: str) -> Iterator[None]:
    """Begin the message of what does not fit with the map's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field_map} does not fit the environment: {error}") from None


def _known(value: int | float | None, name: str) -> int:
    if value is None:
        raise ValueError(f"{name} is unknown. Add it to the map.")
    return round(value)


def _as_box(space: Any) -> Box:
    """Return the range of the numbers of an action; half a choice beyond the ends of discrete ones."""
    if isinstance(space, Box):
        return Box(space.low.reshape(-1).astype(np.float32), space.high.reshape(-1).astype(np.float32))
    if isinstance(space, Discrete):
        low, number = np.array([space.start]), np.array([space.n])
    elif isinstance(space, gymnasium.spaces.MultiDiscrete):
        low, number = space.start.reshape(-1), space.nvec.reshape(-1)
    elif isinstance(space, gymnasium.spaces.MultiBinary):
        low, number = np.zeros(math.prod(space.shape)), np.full(math.prod(space.shape), 2)
    else:
        raise ValueError(
            f"actions are {type(space).__name__}; take an environment with Box, Discrete or Multi... ones."
        )
    return Box((low - 0.5).astype(np.float32), (low + number - 0.5).astype(np.float32))


def _flatten(observation: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(observation, Mapping):
        for name, value in observation.items():
            yield from _flatten(value, f"{prefix}/{name}" if prefix else str(name))
    elif isinstance(observation, tuple):
        yield from _flatten(dict(enumerate(observation)), prefix)
    else:
        yield prefix or _WHOLE, observation


def _cut(values: np.ndarray, part: ColumnsParams, name: str) -> np.ndarray:
    first, end = part.columns or (0, len(values))
    if end > len(values):
        raise ValueError(f"{name}: columns [{first}, {end}) end beyond the {len(values)} numbers of its source.")
    return values[first:end]


def _names_of(part: ColumnsParams, width: int) -> tuple[str, ...]:
    if part.names and len(part.names) != width:
        raise ValueError(f"names {part.names} must be {width}, one for each number.")
    return tuple(part.names or map(str, range(width)))
