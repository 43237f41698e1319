"""Params of `vla-foundry scenes`: captioned pictures drawn by a simulator."""

from dataclasses import dataclass, field

from vla_foundry.config.base import BaseParams

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
    """Draw scenes and describe them. The output does not depend on processes, and a killed run goes on."""

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
    # simulator that draws
    simulator: str = "metaworld"
    # tasks whose things are shown, in turn
    tasks: list[str] = field(default_factory=lambda: list(_TASKS))
    # camera that looks
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
