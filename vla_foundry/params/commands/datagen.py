"""Params of the commands that generate data in a simulator: `demos` and `scenes`."""

from dataclasses import dataclass, field

from vla_foundry.config.schema import BaseParams


@dataclass(frozen=True, kw_only=True)
class DemosParams(BaseParams):
    """Record demonstrations as a LeRobot set (v3.0). Processes do not change the output, and a killed run continues."""

    # tasks of the simulator, such as drawer-open-v3, or drawer-open-v3@half (it starts half open)
    tasks: list[str]
    # local folder to write to
    output_dir: str
    # successful demonstrations of each task
    episodes: int = 50
    # simulator with scripted experts
    simulator: str = "metaworld"
    # cameras to record
    cameras: list[str] = field(default_factory=lambda: ["workspace"])
    # width and height of a picture in pixels
    image_size: int = 64
    # store pictures as mp4 (small, a little changed) instead of as PNG
    video: bool = False
    # standard deviation of the noise on executed actions, of which 1 is the largest; recorded ones are the expert's
    action_noise: float = 0.2
    # attempts at an episode, each from another start, until its expert succeeds
    max_attempts: int = 10
    # seed of starts, noise and the choice of instructions; episode i of a task depends on this, the task and i alone
    seed: int = 0
    # processes that record; 0: this one; null: one per core
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("episodes", 1), ("image_size", 16), ("max_attempts", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, or null for one per core, got {self.num_workers}.")
        if not 0 <= self.action_noise <= 1:
            raise ValueError(f"action_noise must lie in 0 .. 1, got {self.action_noise:g}.")
        if not self.output_dir or "://" in self.output_dir:
            raise ValueError(f"output_dir must be a local folder, got '{self.output_dir}'.")
        for name in ("tasks", "cameras"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold at least one name, each once, got {values}.")


# seven things that differ in shape and colour; drawers and windows are what the quickstart's robot learns to move
_TASKS = (
    "drawer-open-v3",
    "window-open-v3",
    "door-open-v3",
    "button-press-v3",
    "handle-press-v3",
    "faucet-open-v3",
    "stick-push-v3",
)


@dataclass(frozen=True, kw_only=True)
class ScenesParams(BaseParams):
    """Draw scenes and describe them. The output does not depend on processes, and a killed run continues."""

    # local folder to write to: train/ and validation/ with 00000000.png, .txt (caption), .json (attributes) ...
    output: str
    # scenes to learn from
    num_scenes: int = 6000
    # held-out scenes
    num_validation_scenes: int = 500
    # width and height of a picture in pixels
    image_size: int = 64
    # seed of layouts; scene i depends on this and i alone
    seed: int = 0
    # processes that draw; null: one per core
    num_processes: int | None = None
    # simulator that renders the scenes
    simulator: str = "metaworld"
    # tasks whose things are shown, in turn
    tasks: list[str] = field(default_factory=lambda: list(_TASKS))
    # camera to render
    camera: str = "workspace"

    def __post_init__(self) -> None:
        for name, least in (("num_scenes", 0), ("num_validation_scenes", 0), ("image_size", 16), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes must be at least 1, or null for one per core, got {self.num_processes}.")
        if not self.output:
            raise ValueError("output is empty. Name a folder to write to.")
        if not self.tasks:
            raise ValueError("tasks is empty. Name at least one task.")
