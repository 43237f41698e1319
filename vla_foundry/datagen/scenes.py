"""`vla-foundry scenes`: render scenes in a simulator and write pictures with captions from their true states."""

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vla_foundry.config.command_line import parse_command
from vla_foundry.datagen.processes import check_settings, create_processes, get_simulator
from vla_foundry.datagen.scene_captions import DIRECTIONS, GRID, LEVEL, Attributes, cell_of, describe_scene
from vla_foundry.params.commands.datagen import ScenesParams
from vla_foundry.run_folder import lock_folder
from vla_foundry.simulators import SIMULATORS, Layout, SceneSimulator, SimulatorState
from vla_foundry.storage.uri import read_object
from vla_foundry.world import num_cores

SPLITS = ("train", "validation")
# file beside the splits with the settings that made them
FACTS = "scenes.json"
# increment it when the same seed and index give another scene
_VERSION = 3
# object -> its states, each with its range of openness; gaps between the ranges keep the states distinct
_STATES: dict[str, dict[str, tuple[float, float]]] = {
    "button": {"released": (0.0, 0.1), "pressed": (0.9, 1.0)},
    "faucet": {"turned left": (0.0, 0.25), "turned right": (0.75, 1.0)},
    "lever": {"down": (0.0, 0.1), "up": (0.9, 1.0)},
}
_OPENINGS = {"closed": (0.0, 0.05), "half open": (0.4, 0.6), "open": (0.95, 1.0)}
# metres: up to the first distance two things are level, from the second on they differ in a direction; scenes in
# between are skipped
_LEVEL_UP_TO, _DIRECTION_FROM = 0.03, 0.05
# least distance of a described point from the picture's edge, as a fraction of the picture
_MARGIN = 0.02
# largest share of the thing that the arm may hide
_MAX_HIDDEN = 0.2
_MAX_ATTEMPTS = 1000
_SCENES_PER_TASK = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A picture and its true description."""

    # uint8 [H, W, 3]
    image: np.ndarray
    caption: str
    attributes: Attributes


def create_scene(simulator: SceneSimulator, camera: str, *, seed: int, split: str, index: int, state: int) -> Scene:
    """Draw one scene, as a pure function of the simulator's task and the arguments.

    Args:
        state: index of the object's state, modulo the number of states.

    Raises:
        ValueError: no layout shows everything that the caption describes.
    """
    generator = np.random.default_rng((seed, SPLITS.index(split), index))
    name = simulator.describe().objects[0].name
    states = list(_STATES.get(name, _OPENINGS).items())
    word, openness = states[state % len(states)]
    for _ in range(_MAX_ATTEMPTS):
        numbers = generator.random(7)
        layout = Layout(
            object_place=(numbers[0], numbers[1]),
            openness=openness[0] + (openness[1] - openness[0]) * numbers[2],
            gripper_place=(numbers[3], numbers[4], numbers[5]),
            gripper_opening=numbers[6],
        )
        arranged = simulator.arrange(layout)
        attributes = None if arranged is None else _describe_state(simulator, camera, arranged, word)
        if attributes is not None:
            return Scene(image=simulator.render(camera), caption=describe_scene(attributes), attributes=attributes)
    raise ValueError(f"Camera '{camera}' never saw the whole {name} in {_MAX_ATTEMPTS} layouts. Choose another camera.")


def generate_scenes(params: ScenesParams) -> dict[str, int]:
    """Draw the scenes that the output folder lacks, in worker processes.

    Returns:
        Scenes drawn now, by split.

    Raises:
        ValueError: the folder is in use or holds scenes of other settings, or this machine cannot render.
    """
    if params.camera is None:
        params = replace(params, camera=SIMULATORS.get(params.simulator).defaults()[1])
    output = Path(params.output)
    with lock_folder(output, what="folder of scenes", flag="--output"):
        _claim(output, params)
        numbers = {"train": params.num_scenes, "validation": params.num_validation_scenes}
        missing = {split: _missing(output / split, number) for split, number in numbers.items()}
        tasks = list(_tasks(params, missing))
        with create_processes(min(params.num_processes or num_cores(), max(len(tasks), 1))) as run:
            for _ in run(_draw, [(params, *task) for task in tasks]):
                pass
        return {split: len(indices) for split, indices in missing.items()}


def main(argv: list[str]) -> None:
    """Run `vla-foundry scenes`: print how many scenes there are and how many were drawn now."""
    params = parse_command(ScenesParams, argv, prog="vla-foundry scenes", positional=())
    start = time.monotonic()
    drawn = generate_scenes(params)
    seconds = time.monotonic() - start
    total = sum(drawn.values())
    sys.stdout.write(
        f"{params.output}: {params.num_scenes} scenes and {params.num_validation_scenes} held out; "
        f"{total} drawn now in {seconds:.1f} s ({total / seconds:.0f}/s)\n"
    )


def _describe_state(simulator: SceneSimulator, camera: str, arranged: SimulatorState, word: str) -> Attributes | None:
    """Return the attributes of an arranged scene, or None if the picture would not show them clearly."""
    thing, gripper = arranged.objects[0], arranged.gripper_position
    places = {"object": thing.position, "gripper": gripper}
    attributes: Attributes = {"object": thing.name}
    if thing.part:
        attributes["part"] = thing.part
    if thing.openness is not None:
        attributes["state"] = word
    for name, position in places.items():
        column, row = simulator.project(camera, position)
        if not (_MARGIN <= column < 1 - _MARGIN and _MARGIN <= row < 1 - _MARGIN):
            return None
        attributes[f"{name}_row"], attributes[f"{name}_column"] = cell_of(column, row)
    for (name, words), distance in zip(DIRECTIONS.items(), thing.position - gripper, strict=True):
        if _LEVEL_UP_TO < abs(distance) < _DIRECTION_FROM:
            return None
        attributes[name] = words[int(distance > 0)] if abs(distance) >= _DIRECTION_FROM else LEVEL
    if simulator.is_hidden(camera, thing.position, by="robot") or simulator.is_hidden(camera, gripper, by="object"):
        return None
    hidden = sum(simulator.is_hidden(camera, point, by="robot") for point in thing.landmarks)
    return attributes if hidden <= _MAX_HIDDEN * len(thing.landmarks) else None


def _claim(output: Path, params: ScenesParams) -> None:
    """Write the settings of these scenes; check that scenes already in the folder have the same."""
    given = asdict(params)
    facts = {name: given[name] for name in ("image_size", "seed", "simulator", "tasks", "camera")}
    facts |= {"version": _VERSION, "grid": GRID}
    path = output / FACTS
    if path.exists():
        check_settings(params.output, read_object(str(path)), facts)
    for split in SPLITS:
        (output / split).mkdir(parents=True, exist_ok=True)
        for leftover in (output / split).glob(".*.partial"):
            leftover.unlink()
    _write(path, (json.dumps(facts, indent=2) + "\n").encode())


def _missing(folder: Path, number: int) -> list[int]:
    """Return the indices of missing scenes. A scene's caption is written last, so a scene without one is missing."""
    present = {path.stem for path in folder.glob("*.txt")}
    wanted = [f"{index:08d}" for index in range(number)]
    if surplus := len(present.difference(wanted)):
        raise ValueError(
            f"'{folder}' holds {surplus} more scenes than the {number} requested. "
            "Request at least as many, or choose another output folder."
        )
    return [index for index, name in enumerate(wanted) if name not in present]


def _tasks(params: ScenesParams, missing: dict[str, list[int]]) -> Iterator[tuple[str, str, list[int]]]:
    """Yield the work units: (simulator task, split, indices), with the scenes of one task together."""
    for number, task in enumerate(params.tasks):
        for split, indices in missing.items():
            own = [index for index in indices if index % len(params.tasks) == number]
            for start in range(0, len(own), _SCENES_PER_TASK):
                yield task, split, own[start : start + _SCENES_PER_TASK]


def _draw(params: ScenesParams, task: str, split: str, indices: Sequence[int]) -> None:
    """Draw and write scenes; runs in a worker process."""
    from PIL import Image

    assert params.camera is not None
    simulator = get_simulator(params.simulator, task, (params.camera,), params.image_size)
    if not isinstance(simulator, SceneSimulator):
        raise ValueError(f"simulator '{params.simulator}' cannot arrange scenes.")
    folder = Path(params.output) / split
    for index in indices:
        scene = create_scene(
            simulator,
            params.camera,
            seed=params.seed,
            split=split,
            index=index,
            state=index // len(params.tasks),
        )
        picture = io.BytesIO()
        Image.fromarray(scene.image).save(picture, format="PNG")
        _write(folder / f"{index:08d}.png", picture.getvalue())
        _write(folder / f"{index:08d}.json", (json.dumps(scene.attributes) + "\n").encode())
        _write(folder / f"{index:08d}.txt", scene.caption.encode())


def _write(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
