"""Params of the commands that generate data in a simulator, `demos` and `scenes`, and of what they share."""

import re
from dataclasses import dataclass, field
from typing import Annotated

from vla_foundry.config.schema import (
    BaseParams,
    Bounds,
    Count,
    Fraction,
    Location,
    Name,
    NonNegativeInt,
    NumThreads,
    NumWorkers,
    Size,
)

ImageSize = Annotated[int, Bounds(least=16, most=100_000)]


@dataclass(frozen=True, kw_only=True)
class SimulatorParams(BaseParams):
    """Shared by the commands that run robots in a simulator."""

    # metaworld, pusht, aloha, gymnasium (any registered environment), or that of a plug-in; evaluate also takes lbm
    simulator: Name = "metaworld"
    # tasks of the simulator, such as drawer-open-v3, or drawer-open-v3@half (it starts half open); empty: its default
    tasks: list[Name] = field(default_factory=list)
    # simulator gymnasium: registered id, such as Reacher-v5; module:id imports the module that registers it
    env_id: Name | None = None
    # simulator gymnasium: YAML file that says what the environment's numbers mean; a path or simulators/NAME.yaml
    field_map: Location | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must hold each name once, got {self.tasks}.")
        for task in self.tasks:
            # one is also the name of a folder
            if not re.fullmatch(r"[^/\\]*[^/\\.][^/\\]*", task):
                raise ValueError(f"tasks must be names without / and \\, got '{task}'.")
        for name, example in (("env_id", "Reacher-v5"), ("field_map", "simulators/reacher.yaml")):
            if (self.simulator == "gymnasium") != (getattr(self, name) is not None):
                raise ValueError(
                    f"simulator 'gymnasium' needs {name}, such as {example}."
                    if self.simulator == "gymnasium"
                    else f"{name} is for simulator 'gymnasium', not '{self.simulator}'. Leave it out."
                )


@dataclass(frozen=True, kw_only=True)
class DemosParams(SimulatorParams):
    """Record demonstrations as a LeRobot dataset (v3.0). Output does not depend on processes; killed runs resume."""

    # local folder to write to
    output_dir: Location
    # successful demonstrations of each task
    episodes: Count = 50
    # cameras to record; empty: the simulator's default
    cameras: list[Name] = field(default_factory=list)
    # width and height of an image, pixels
    image_size: ImageSize = 64
    # store images as mp4 (small, lossy) instead of PNG
    video: bool = False
    # standard deviation of the noise added to executed actions (largest action: 1); the expert's actions are recorded
    action_noise: Fraction = 0.2
    # attempts at an episode, each from a different start, until its expert succeeds
    max_attempts: Size = 10
    # seed of starts, noise and the choice of instructions; episode i of a task depends on this, the task and i alone
    seed: NonNegativeInt = 0
    # processes that record; 0: this one; null: one per core
    num_workers: NumWorkers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output_dir or "://" in self.output_dir:
            raise ValueError(f"output_dir must be a local folder, got '{self.output_dir}'.")
        if len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras must hold each name once, got {self.cameras}.")


# seven objects that differ in shape and colour; the quickstart's robot learns to move drawers and windows
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
    """Draw scenes and describe them. The output does not depend on processes; a killed run resumes."""

    # local folder to write to: train/ and validation/ with 00000000.png, .txt (caption), .json (attributes) ...
    output: Location
    # scenes to learn from
    num_scenes: NonNegativeInt = 6000
    # held-out scenes
    num_validation_scenes: NonNegativeInt = 500
    # width and height of an image, pixels
    image_size: ImageSize = 64
    # seed of layouts; scene i depends on this and i alone
    seed: NonNegativeInt = 0
    # processes that draw; null: one per core
    num_processes: NumThreads | None = None
    # simulator that renders the scenes
    simulator: Name = "metaworld"
    # tasks whose things are shown, in turn
    tasks: list[Name] = field(default_factory=lambda: list(_TASKS))
    # camera to render; null: the simulator's default
    camera: Name | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output:
            raise ValueError("output is empty. Name a folder to write to.")
        if not self.tasks:
            raise ValueError("tasks is empty. Name at least one task.")
