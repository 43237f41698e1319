"""A simulator without physics, for tests: a bright bar is to be moved to the right edge of the picture.

Imported as a plug-in, here and in the processes of rollouts. The task "breaks" fails as a program at odd seeds, unless
there is a file named `mended` in the working directory; "dies" ends its process, "dies_once" once a seed. "slow" waits
at seed 0 until four other seeds have ended; "done" starts with success.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Box

from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.spec import FieldDescription, GripperRange
from vla_foundry.simulators import Simulator, register_simulator


@register_simulator("toy")
class Toy(Simulator):
    instruction = "move right"
    instructions = ("move right",)
    robot, fps, action_names = "toy", 10, ("dx", "gripper")
    action_space = Box(-1, 1, (2,), np.float32)
    action_parts = {
        "step": FieldDescription(shape=(1,), unit="cm", representation="delta"),
        "gripper": FieldDescription(shape=(1,), gripper=GripperRange(open=-1.0, closed=1.0)),
    }
    field_names = {"place": ("x",), "opening": ("opening",)}
    max_steps = 24
    camera = "front"

    @classmethod
    def defaults(cls, **source: str) -> tuple[tuple[str, ...], str]:
        return (), cls.camera

    def __init__(self, task: str, *, cameras: Sequence[str], image_size: tuple[int, int]) -> None:
        if task not in ("easy", "hard", "breaks", "dies", "dies_once", "slow", "done"):
            raise ValueError(f"toy task '{task}' is unknown.")
        for camera in cameras:
            if camera != self.camera:
                raise ValueError(unknown_name_message("toy camera", camera, [self.camera]))
        self.task, self.cameras, self.image_size = task, tuple(cameras), image_size

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.seed, self.place, self.num_steps = seed or 0, np.random.default_rng(seed).uniform(0, 0.4), 0
        self.effort = 0.0
        return self.observe(), {"success": self.task == "done"}

    def sense(self) -> dict[str, np.ndarray]:
        return {"place": np.array([self.place], np.float32), "opening": np.array([self.effort], np.float32)}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.num_steps += 1
        if self.task == "breaks" and self.seed % 2 and self.num_steps == 2 and not Path("mended").exists():
            raise RuntimeError("a line search did not converge")
        if self.task == "dies" and self.num_steps == 2 and not Path("mended").exists():
            os._exit(1)
        died = Path(f"died{self.seed}")
        if self.task == "dies_once" and self.num_steps == 2 and not died.exists():
            died.touch()
            os._exit(1)
        for _ in range(6000):
            if self.task != "slow" or self.seed or len(list(Path().glob("ended*"))) == 4:
                break
            time.sleep(0.01)
        self.effort = float(np.clip(action[1], -1, 1))
        self.place = float(np.clip(self.place + 0.25 * np.clip(action[0], -1, 1), 0, 1))
        is_success = self.place > (0.95 if self.task == "hard" else 0.8)
        if self.task == "slow" and is_success:
            Path(f"ended{self.seed}").touch()
        return self.observe(), float(is_success), False, False, {"success": is_success}

    def render(self, camera: str | None = None) -> np.ndarray:
        width, height = self.image_size
        image = np.full((height, width, 3), 40, np.uint8)
        middle = int(self.place * (width - 1))
        image[:, max(0, middle - 2) : middle + 3] = (250, 120, 10)
        return image

    def expert(self) -> np.ndarray:
        return np.array([1.0, -1.0], np.float32)


@register_simulator("other_toy")
class OtherToy(Toy):
    """The same world with another camera and another kind of action."""

    camera = "top"
    action_parts = {"speed": FieldDescription(shape=(2,), unit="cm")}
