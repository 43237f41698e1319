"""One demonstration: a scripted expert acts in a simulator, disturbed by noise, until its task is done.

The expert's action is executed with noise, so that it strays and shows how to recover; the recorded action is what the
expert wanted at that state, without the noise (Laskey et al. 2017, DART). The episode goes on for a few frames after
success. One that does not succeed is tried again from another start.
"""

from pathlib import Path

import numpy as np

from vla_foundry.params.commands.datagen import DemosParams
from vla_foundry.params.commands.evaluation import FIRST_DEMO_SEED
from vla_foundry.preprocessing.robotics.lerobot_recording import EpisodeRecorder, LeRobotFeatures
from vla_foundry.randomness import draw_index
from vla_foundry.simulators import Observation, Simulator

_FRAMES_AFTER_SUCCESS = 5
# share of the noise at one step that is left at the next: the arm really leaves its track
_NOISE_MEMORY = 0.7
# noise on the effort of fingers, relative to that on motion: they must not let go
_GRIPPER_NOISE = 0.3
_STATE, _ACTION = "observation.state", "action"


def features_of(simulator: Simulator, params: DemosParams) -> LeRobotFeatures:
    """Columns of the set.

    `observation.state` is what LeRobot's own policies read: all fields in a row. Each field has a column too.
    """
    state = tuple(f"{field}.{part}" for field, parts in simulator.field_names.items() for part in parts)
    fields = {f"observation.{field}": parts for field, parts in simulator.field_names.items()}
    return LeRobotFeatures(
        fps=simulator.fps,
        robot_type=simulator.robot,
        vectors={_STATE: state, **fields, _ACTION: simulator.action_names},
        cameras={f"observation.images.{camera}": (params.image_size, params.image_size) for camera in params.cameras},
        video=params.video,
    )


def record_episode(simulator: Simulator, params: DemosParams, *, task: str, number: int, path: Path) -> None:
    """Record the `number`-th episode of a task: a function of the simulator's task, the params and these alone.

    Raises:
        ValueError: the expert did not succeed in any attempt.
    """
    failed_seeds: list[int] = []
    features = features_of(simulator, params)
    which = draw_index(len(simulator.instructions), seed=params.seed, position=number, purpose=f"instruction of {task}")
    for attempt in range(params.max_attempts):
        seed = FIRST_DEMO_SEED + draw_index(
            1 << 31, seed=params.seed, position=number, purpose=f"attempt {attempt} at {task}"
        )
        with EpisodeRecorder(path, features) as recorder:
            if _demonstrate(simulator, recorder, params, seed):
                facts = {"task": task, "seed": seed, "failed_seeds": failed_seeds}
                recorder.finish(simulator.instructions[which], facts)
                return
        failed_seeds.append(seed)
    raise ValueError(
        f"The expert of '{task}' failed in all {params.max_attempts} attempts at episode {number}. "
        f"Lower action_noise ({params.action_noise:g}), or raise max_attempts."
    )


def _demonstrate(simulator: Simulator, recorder: EpisodeRecorder, params: DemosParams, seed: int) -> bool:
    """Let the expert act until a few frames after success; return whether it succeeded."""
    generator = np.random.default_rng(seed)
    scale = params.action_noise * np.array(
        [_GRIPPER_NOISE if name == "gripper" else 1 for name in simulator.action_names]
    )
    noise = np.zeros(simulator.action_dim)
    observation = simulator.reset(seed)
    frames_left: int | None = None
    for _ in range(simulator.max_steps):
        action = simulator.expert()
        _add_frame(recorder, observation, action)
        if frames_left == 0:
            return True
        # of the same variance at every step but the first few
        fresh = generator.standard_normal(simulator.action_dim) * np.sqrt(1 - _NOISE_MEMORY**2)
        noise = _NOISE_MEMORY * noise + fresh
        simulator.apply(action + scale * noise)
        observation = simulator.observe()
        if frames_left is not None:
            frames_left -= 1
        elif simulator.success():
            frames_left = _FRAMES_AFTER_SUCCESS - 1
    return False


def _add_frame(recorder: EpisodeRecorder, observation: Observation, action: np.ndarray) -> None:
    vectors = {f"observation.{field}": values for field, values in observation.fields.items()}
    vectors |= {_STATE: np.concatenate(list(observation.fields.values())), _ACTION: action}
    recorder.add(vectors, {f"observation.images.{camera}": image for camera, image in observation.images.items()})
