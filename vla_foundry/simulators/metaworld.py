"""Meta-World: 50 table-top tasks of a Sawyer arm in MuJoCo, and variants of four with half-open starts."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Float, UInt8

from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.spec import FieldDescription, GripperRange
from vla_foundry.simulators.metaworld_tasks import (
    HALF_OPEN_STARTS,
    INSTRUCTIONS,
    TASKS_WITH_MARKED_GOAL,
    THINGS,
    HalfOpenStart,
    Thing,
    instructions_of,
)
from vla_foundry.simulators.mujoco_renderer import Camera, MujocoRenderer, choose_opengl
from vla_foundry.simulators.simulator import (
    Layout,
    ObjectState,
    SceneSimulator,
    SimulatorState,
    register_simulator,
)

CAMERAS: dict[str, Camera] = {
    "behindGripper": Camera(model_camera="behindGripper", is_upside_down=False),
    "corner": Camera(model_camera="corner", is_upside_down=True),
    # closer than in Meta-World, as is usual for learning from images
    "corner2": Camera(model_camera="corner2", is_upside_down=True, position=(0.75, 0.075, 0.7)),
    "corner3": Camera(model_camera="corner3", is_upside_down=True),
    "gripperPOV": Camera(model_camera="gripperPOV", is_upside_down=False),
    "topview": Camera(model_camera="topview", is_upside_down=False),
    # the same corner, aimed at the workspace: objects are twice as large in a small image
    "workspace": Camera(
        model_camera="corner2", is_upside_down=False, position=(0.7, 0.1, 0.75), looks_at=(0.02, 0.68, 0.12), fovy=46.0
    ),
}
# range of the gripper in arranged scenes: across, along, above the table
_GRIPPER_LOW = np.array([-0.3, 0.4, 0.07])
_GRIPPER_HIGH = np.array([0.3, 0.82, 0.35])
# physics steps until the arm rests at its target
_NUM_ARM_STEPS = 250
# where an object waits while the arm moves
_OUT_OF_THE_WAY = np.array([0.0, 10.0, 0.0])


def task_names() -> list[str]:
    """Return every task, `@half` variants included."""
    return sorted([*INSTRUCTIONS, *(f"{name}@half" for name in HALF_OPEN_STARTS)])


def scene_tasks() -> list[str]:
    """Return the tasks that can `arrange` scenes."""
    return sorted(THINGS)


@register_simulator("metaworld")
class MetaworldSimulator(SceneSimulator):
    """One Meta-World task. Actions: x, y, z displacement of the hand (1 is 1 cm) and finger effort (1 closes).

    Fields: `end_effector_position` in metres, `gripper_opening` in [0, 1].
    """

    robot = "sawyer"
    fps = 80
    action_names = ("dx", "dy", "dz", "gripper")
    action_parts = {
        "displacement": FieldDescription(shape=(3,), unit="cm", frame="world", representation="delta", role="action"),
        "gripper": FieldDescription(shape=(1,), gripper=GripperRange(open=-1.0, closed=1.0), role="action"),
    }
    field_names = {"end_effector_position": ("x", "y", "z"), "gripper_opening": ("opening",)}

    def __init__(self, task: str, *, cameras: Sequence[str], image_size: tuple[int, int]) -> None:
        name, _, variant = task.partition("@")
        if task not in task_names():
            raise ValueError(unknown_name_message("metaworld task", task, task_names()))
        for camera in cameras:
            _find_camera(camera)
        environment, expert = _create_environment(name)
        self._task = task
        self.instruction = INSTRUCTIONS[name]
        self.instructions = instructions_of(name)
        self.cameras, self.image_size = tuple(cameras), image_size
        self.action_space = Box(-1, 1, (len(self.action_names),), np.float32)
        self.observation_space = self.describe_observations()
        self.max_steps = environment.max_path_length
        self._half_open: HalfOpenStart | None = HALF_OPEN_STARTS[name] if variant else None
        self._thing: Thing | None = THINGS.get(name)
        self._environment, self._expert = environment, expert
        self._model, self._data = environment.model, environment.data
        # resets change bodies and markers of the model itself; an episode must not depend on the one before
        self._pristine = {part: getattr(self._model, part).copy() for part in ("body_pos", "body_quat", "site_pos")}
        if self._half_open is not None:
            self._limit_layouts(self._half_open)
        self._shows_goal = name in TASKS_WITH_MARKED_GOAL
        self._renderer = MujocoRenderer(self._model, image_size)
        self._hide_sites_but_goal()
        self._state: np.ndarray | None = None

    @classmethod
    def defaults(cls, **source: str) -> tuple[tuple[str, ...], str]:
        """See Simulator."""
        return (), "workspace"

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode of `seed`; None: of a random one."""
        super().reset(seed=seed)
        seed = int(self.np_random.integers(1 << 31)) if seed is None else seed
        self._restore_model()
        self._renderer.shows_sites = self._shows_goal
        self._environment.seed(seed)
        self._environment.reset()
        if self._half_open is not None:
            start = self._half_open
            joint = self._data.joint(start.joint)
            joint.qpos = start.middle + np.random.default_rng(seed).uniform(-start.spread, start.spread)
            joint.qvel = 0
        # Meta-World moves bodies without updating the physics: positions would be those of the last episode
        _mujoco().mj_forward(self._model, self._data)
        self._state = self._sense()
        # Meta-World judges steps only
        return self.observe(), {"success": False}

    def sense(self) -> dict[str, np.ndarray]:
        """See Simulator."""
        sensed = self._sensed().astype(np.float32)
        return {"end_effector_position": sensed[:3], "gripper_opening": sensed[3:4]}

    def step(self, action: Float[np.ndarray, " A"]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move the hand and the fingers for one control step, 1 / `fps` seconds."""
        self._sensed()
        if self._environment.curr_path_length >= self.max_steps:
            raise ValueError(f"The episode is over after {self.max_steps} steps. Call reset(seed) first.")
        self._state, reward, _, _, facts = self._environment.step(self.clip_action(action))
        is_over = self._environment.curr_path_length >= self.max_steps
        return self.observe(), float(reward), False, is_over, {"success": bool(facts["success"])}

    def render(self, camera: str | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """See Simulator."""
        return self._renderer.render(self._data, _find_camera(camera or (*self.cameras, "workspace")[0]))

    def project(self, camera: str, position: Float[np.ndarray, "3"]) -> tuple[float, float]:
        """Return where a point appears: (column, row) as fractions of the image from the top left corner."""
        return self._renderer.project(self._data, _find_camera(camera), position)

    def is_hidden(self, camera: str, position: Float[np.ndarray, "3"], *, by: Literal["robot", "object"]) -> bool:
        """Return whether the arm, or the task's main object if known, hides a point."""
        if by == "object" and self._thing is None:
            return False
        body = self._thing.body if by == "object" and self._thing is not None else "hand"
        root = int(self._model.body_rootid[self._model.body(body).id])
        return self._renderer.is_hidden(self._data, _find_camera(camera), position, by_root=root)

    def expert(self) -> Float[np.ndarray, " A"]:
        """Return the scripted policy's action for the current state."""
        with warnings.catch_warnings():
            # some scripted policies exceed the action range and warn at every step
            warnings.filterwarnings("ignore", message="Constant", category=UserWarning)
            action = self._expert.get_action(self._sensed())
        return np.clip(action, -1, 1).astype(np.float32)

    def describe(self) -> SimulatorState:
        """Return the state of the gripper, and of the task's main object if known."""
        fingertips = [self._data.site(name).xpos for name in ("rightEndEffector", "leftEndEffector")]
        thing = self._thing
        objects = () if thing is None else (self._describe_thing(thing),)
        return SimulatorState(gripper_position=(fingertips[0] + fingertips[1]) / 2, objects=objects)

    def arrange(self, layout: Layout) -> SimulatorState | None:
        """Move the arm into place, then put the object down; no simulated time passes afterwards.

        Returns:
            The scene's state, or None if the arm would penetrate the object.

        Raises:
            ValueError: this task has no such scenes.
        """
        thing = self._thing
        if thing is None:
            raise ValueError(f"{self._task} cannot arrange scenes. Tasks that can: {', '.join(scene_tasks())}.")
        self._restore_model()
        self._state = None
        self._renderer.shows_sites = False
        self._move_arm(layout, thing)
        across, along = _mix(thing.across, layout.object_place[0]), _mix(thing.along, layout.object_place[1])
        self._place(thing.body, np.array([across, along, thing.height]))
        if thing.moving_body is not None:
            self._joint_of(thing.moving_body).qpos = _mix((thing.closed, thing.open), layout.openness)
        _mujoco().mj_forward(self._model, self._data)
        return None if self._is_arm_inside(thing) else self.describe()

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()

    def _sensed(self) -> np.ndarray:
        if self._state is None:
            raise ValueError("No episode was started. Call reset(seed) first.")
        return self._state

    def _sense(self) -> np.ndarray:
        environment = self._environment
        environment._prev_obs = environment._get_curr_obs_combined_no_goal()
        space = environment.sawyer_observation_space
        return np.clip(environment._get_obs(), space.low, space.high)

    def _limit_layouts(self, start: HalfOpenStart) -> None:
        space = self._environment._random_reset_space
        self._environment._random_reset_space = type(space)(np.array(start.low), np.array(start.high), dtype=np.float64)

    def _restore_model(self) -> None:
        for part, values in self._pristine.items():
            getattr(self._model, part)[:] = values
        _mujoco().mj_resetData(self._model, self._data)

    def _hide_sites_but_goal(self) -> None:
        for index in range(self._model.nsite):
            if not self._model.site(index).name.startswith("goal"):
                self._model.site_rgba[index, 3] = 0

    def _joint_of(self, body: str) -> Any:
        return self._data.joint(int(self._model.body(body).jntadr[0]))

    def _place(self, body: str, position: np.ndarray) -> None:
        """Put a body at `position`, whether it is fixed or free."""
        if self._model.body(body).jntnum[0]:
            self._joint_of(body).qpos[:3] = position
        else:
            self._model.body(body).pos = position

    def _move_arm(self, layout: Layout, thing: Thing) -> None:
        for body in (thing.body, *thing.beside):
            self._place(body, _OUT_OF_THE_WAY)
        low, high = _GRIPPER_LOW, _GRIPPER_HIGH
        self._data.mocap_pos[0] = low + (high - low) * np.array(layout.gripper_place)
        self._data.mocap_quat[0] = (1, 0, 1, 0)
        effort = 1 - 2 * layout.gripper_opening
        self._data.ctrl[:] = (effort, -effort)
        _mujoco().mj_step(self._model, self._data, _NUM_ARM_STEPS)

    def _describe_thing(self, thing: Thing) -> ObjectState:
        kind, name = thing.anchor
        anchor = getattr(self._data, kind)(name)
        rotation = anchor.xmat.reshape(3, 3)
        openness = None
        if thing.moving_body is not None:
            travel = float(self._joint_of(thing.moving_body).qpos[0]) - thing.closed
            openness = min(max(travel / (thing.open - thing.closed), 0.0), 1.0)
        return ObjectState(
            name=thing.name,
            part=thing.part,
            position=anchor.xpos + rotation @ np.array(thing.offset),
            landmarks=self._data.geom_xpos[self._visible_geoms(thing)],
            openness=openness,
        )

    def _visible_geoms(self, thing: Thing) -> np.ndarray:
        model = self._model
        is_own = model.body_rootid[model.geom_bodyid] == model.body_rootid[model.body(thing.body).id]
        return np.flatnonzero(is_own & (model.geom_group <= 2) & (model.geom_rgba[:, 3] > 0))

    def _is_arm_inside(self, thing: Thing) -> bool:
        """Return whether the arm penetrates the object deeper than a touch."""
        roots = self._model.body_rootid
        pair = {int(roots[self._model.body(name).id]) for name in ("hand", thing.body)}
        bodies = self._model.geom_bodyid
        return any(
            contact.dist < -0.004 and {int(roots[bodies[geom]]) for geom in contact.geom} == pair
            for contact in self._data.contact
        )


def _mix(span: tuple[float, float], share: float) -> float:
    return span[0] + (span[1] - span[0]) * share


def _find_camera(name: str) -> Camera:
    if name not in CAMERAS:
        raise ValueError(unknown_name_message("metaworld camera", name, sorted(CAMERAS)))
    return CAMERAS[name]


def _mujoco() -> Any:
    import mujoco

    return mujoco


def _create_environment(name: str) -> tuple[Any, Any]:
    """Build Meta-World's environment, which samples a new layout at each reset, and its scripted policy.

    Raises:
        ValueError: Meta-World is not installed, or there is no OpenGL renderer.
    """
    choose_opengl()
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The simulator 'metaworld' needs {error.name}, which is not installed: "
            "uv pip install 'vla-foundry[simulators]'"
        ) from None
    create: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-goal-observable"]
    environment = create(seed=0)
    environment._freeze_rand_vec = False
    environment.seeded_rand_vec = True
    return environment, ENV_POLICY_MAP[name]()
