"""`vla-foundry demos`: record scripted experts that solve tasks in a simulator, as a LeRobot dataset.

During recording, `<output_dir>/_progress` holds the settings and the finished episodes. At the end they are joined to a
dataset and moved into place: `meta`, with the report `meta/demos.json`, comes last; then `_progress` is deleted. A
folder with that report is complete. A killed run resumes where it stopped.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_foundry.config.command_line import parse_command
from vla_foundry.config.loading import dump_value
from vla_foundry.datagen.processes import check_settings, create_processes, get_simulator
from vla_foundry.params.commands.datagen import DemosParams
from vla_foundry.params.commands.evaluation import FIRST_DEMO_SEED
from vla_foundry.preprocessing.robotics.lerobot_recording import (
    EpisodeRecorder,
    LeRobotFeatures,
    delete_leftovers,
    read_part,
)
from vla_foundry.preprocessing.robotics.lerobot_writer import LeRobotWriter
from vla_foundry.progress import show_progress
from vla_foundry.randomness import draw_index
from vla_foundry.run_folder import lock_folder
from vla_foundry.simulators import (
    ACTION,
    IMAGES,
    OBSERVATION,
    STATE,
    Simulator,
    complete_params,
    describe_source,
    find_source,
    name_observation,
    read_success,
)
from vla_foundry.storage.uri import read_object, write_text
from vla_foundry.world import num_cores

REPORT = "meta/demos.json"
# file that maps an episode's instruction to all its wordings
INSTRUCTIONS = "meta/instructions.json"
# field map for preprocessing: what the columns of the data mean
FIELD_MAP = "meta/field_map.yaml"
_PROGRESS, _SETTINGS = "_progress", "settings.json"
# increment it when the same settings give other episodes
_VERSION = 2
_FRAMES_AFTER_SUCCESS = 5
# share of a step's noise that carries over to the next step, so that the arm really leaves its path
_NOISE_MEMORY = 0.7
# noise on the fingers' effort, relative to that on motion; small, so that they keep their grip
_GRIPPER_NOISE = 0.3


def features_of(simulator: Simulator, params: DemosParams) -> LeRobotFeatures:
    """Return the dataset's columns: each field, and all fields concatenated, as LeRobot's own policies read them."""
    state = tuple(f"{field}.{part}" for field, parts in simulator.field_names.items() for part in parts)
    fields = {f"{OBSERVATION}.{field}": parts for field, parts in simulator.field_names.items()}
    return LeRobotFeatures(
        fps=simulator.fps,
        robot_type=simulator.robot,
        vectors={STATE: state, **fields, ACTION: simulator.action_names},
        cameras={f"{IMAGES}.{camera}": (params.image_size, params.image_size) for camera in params.cameras},
        video=params.video,
    )


def describe_fields(simulator: Simulator) -> dict[str, Any]:
    """Return the field map of the dataset: fields as they are recorded, the action cut into its parts."""
    fields: dict[str, Any] = {f"{OBSERVATION}.{field}": {} for field in simulator.field_names}
    end = 0
    for name, part in simulator.action_parts.items():
        known = {key: getattr(part, key) for key in ("unit", "frame", "rotation") if getattr(part, key) is not None}
        known |= {"gripper": asdict(part.gripper)} if part.gripper is not None else {}
        columns = [end, end + part.width]
        fields[f"{ACTION}.{name}"] = {"source": ACTION, "columns": columns, **known} | {
            "representation": part.representation
        }
        end += part.width
    return {"fields": fields if end else {**fields, ACTION: {}}}


def record_episode(simulator: Simulator, params: DemosParams, *, task: str, number: int, path: Path) -> None:
    """Record the `number`-th episode of a task, as a function of the arguments alone.

    The expert's action is executed with noise, so that the robot strays and the episode shows how to recover. The
    recorded action is the expert's own, without noise (Laskey et al. 2017, DART). An episode continues for a few frames
    after success; a failed one is repeated from another start.

    Raises:
        ValueError: the expert failed in every attempt.
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
    scale = params.action_noise * simulator.action_scale
    scale[[name == "gripper" for name in simulator.action_names]] *= _GRIPPER_NOISE
    noise = np.zeros(len(scale))
    observation, _ = simulator.reset(seed=seed)
    frames_left: int | None = None
    for _ in range(simulator.max_steps):
        action = simulator.expert()
        images, fields = name_observation(**observation)
        recorder.add({**fields, ACTION: action}, images)
        if frames_left == 0:
            return True
        # scaled so that the noise keeps its variance, apart from the first few steps
        fresh = generator.standard_normal(len(scale)) * np.sqrt(1 - _NOISE_MEMORY**2)
        noise = _NOISE_MEMORY * noise + fresh
        observation, _, is_terminated, is_truncated, info = simulator.step(action + scale * noise)
        if frames_left is not None:
            frames_left -= 1
        elif read_success(info):
            frames_left = _FRAMES_AFTER_SUCCESS - 1
        # a simulator may judge an episode only when it ends it
        if is_terminated or is_truncated:
            return frames_left is not None
    return False


def record_demos(params: DemosParams) -> dict[str, Any]:
    """Record the demonstrations that the output folder lacks, and join all of them to a dataset.

    Returns:
        The report: settings; episodes, attempts and frames of each task; instruction and seeds of each episode.

    Raises:
        ValueError: the folder is in use or holds something else, a name is unknown, or an expert fails every attempt.
    """
    params, camera = complete_params(params)
    params = replace(params, cameras=params.cameras or [camera])
    output = Path(params.output_dir)
    if (report := _check_folder(output, params)) is not None:
        return report
    total = params.episodes * len(params.tasks)
    num_workers = num_cores() if params.num_workers is None else params.num_workers
    with create_processes(min(num_workers, total)) as run:
        # check every name before writing anything
        found = dict(run(_look_at, [(params, task) for task in params.tasks]))
        with lock_folder(output, what="dataset", flag="--output_dir"):
            # another process may have written to the folder before it was locked
            if (report := _check_folder(output, params)) is not None:
                return report
            parts = _claim(output, params)
            missing = [index for index in _by_task(params) if not _part(parts, index).exists()]
            with show_progress("demos", total, total - len(missing)) as advance:
                for _ in run(_record, [(params, str(parts), index) for index in missing]):
                    advance(1)
            instructions = {text: list(found[task][0]) for task in params.tasks for text in found[task][0]}
            _, features, fields = found[params.tasks[0]]
            return _publish(params, output, instructions, features, fields)


def main(argv: list[str]) -> None:
    """Run `vla-foundry demos`: print the success rate of each expert, and the size of the dataset."""
    params = parse_command(DemosParams, argv, prog="vla-foundry demos")
    start = time.monotonic()
    was_done = (Path(params.output_dir) / REPORT).exists()
    report = record_demos(params)
    seconds = time.monotonic() - start
    for task, numbers in report["tasks"].items():
        share = numbers["episodes"] / numbers["attempts"]
        sys.stdout.write(
            f"{task}: {numbers['episodes']} of {numbers['attempts']} attempts succeeded ({share:.0%}), "
            f"{numbers['frames']} frames\n"
        )
    num_frames = sum(numbers["frames"] for numbers in report["tasks"].values())
    speed = "recorded before" if was_done else f"{seconds:.1f} s, {num_frames / seconds:.0f} frames/s"
    sys.stdout.write(f"{params.output_dir}: {len(report['episodes'])} episodes, {num_frames} frames ({speed})\n")


def _settings_of(params: DemosParams) -> dict[str, Any]:
    """Return what determines the bytes of the dataset."""
    values = asdict(params)
    for name in ("output_dir", "num_workers", "env_id", "field_map"):
        del values[name]
    return {"version": _VERSION, **values, **describe_source(params)}


def _check_folder(output: Path, params: DemosParams) -> dict[str, Any] | None:
    """Check that the output folder is empty or was made with the same settings; return the report of a complete one."""
    path = output / _PROGRESS / _SETTINGS
    if (output / REPORT).exists():
        report = read_object(str(output / REPORT))
        check_settings(str(output), report["settings"], _settings_of(params))
        shutil.rmtree(output / _PROGRESS, ignore_errors=True)
        return report
    if path.exists():
        check_settings(str(output), read_object(str(path)), _settings_of(params))
    elif output.exists() and any(entry.name != _PROGRESS for entry in output.iterdir()):
        raise ValueError(f"output_dir '{output}' holds other files. Choose a new folder.")
    return None


def _claim(output: Path, params: DemosParams) -> Path:
    """Write the settings; return the folder of finished episodes, without half-written ones of a killed run."""
    parts = output / _PROGRESS / "episodes"
    parts.mkdir(parents=True, exist_ok=True)
    delete_leftovers(parts)
    _write_json(output / _PROGRESS / _SETTINGS, _settings_of(params))
    return parts


def _part(parts: Path, index: int) -> Path:
    return parts / f"episode-{index:06d}"


def _by_task(params: DemosParams) -> Iterator[int]:
    """Yield the indices of all episodes, task after task; in the dataset the tasks alternate."""
    for number in range(len(params.tasks)):
        yield from range(number, params.episodes * len(params.tasks), len(params.tasks))


def _look_at(params: DemosParams, task: str) -> tuple[str, tuple[tuple[str, ...], LeRobotFeatures, dict[str, Any]]]:
    """Return a task, and its simulator's instructions, columns and field map."""
    simulator = _get_simulator(params, task)
    if not simulator.has_expert:
        raise ValueError(f"simulator '{params.simulator}' has no expert for '{task}' to record.")
    return task, (simulator.instructions, features_of(simulator, params), describe_fields(simulator))


def _get_simulator(params: DemosParams, task: str) -> Simulator:
    return get_simulator(params.simulator, task, tuple(params.cameras), params.image_size, **find_source(params))


def _record(params: DemosParams, parts: str, index: int) -> None:
    number, which = divmod(index, len(params.tasks))
    task = params.tasks[which]
    simulator = _get_simulator(params, task)
    record_episode(simulator, params, task=task, number=number, path=_part(Path(parts), index))


def _publish(
    params: DemosParams,
    output: Path,
    instructions: dict[str, list[str]],
    features: LeRobotFeatures,
    fields: dict[str, Any],
) -> dict[str, Any]:
    """Join the episodes to a dataset and move it into place; may be killed at any point and called again.

    Args:
        instructions: all wordings of each instruction.
        features: columns of the dataset.
        fields: what they mean.
    """
    progress = output / _PROGRESS
    parts = [_part(progress / "episodes", index) for index in range(params.episodes * len(params.tasks))]
    joined = progress / "set"
    shutil.rmtree(joined, ignore_errors=True)
    writer = LeRobotWriter(joined, features)
    for part in parts:
        writer.add_episode(part)
    writer.finish()
    _write_json(joined / INSTRUCTIONS, {"version": 1, "variants": instructions})
    write_text(str(joined / FIELD_MAP), dump_value(fields))
    report = _report_on(params, parts)
    _write_json(joined / REPORT, report)
    _sync(joined)
    for name in ("data", "videos", "meta"):
        # without a report, a run that was killed in this loop left this folder
        shutil.rmtree(output / name, ignore_errors=True)
        if (joined / name).exists():
            os.rename(joined / name, output / name)
    shutil.rmtree(progress)
    return report


def _report_on(params: DemosParams, folders: Sequence[Path]) -> dict[str, Any]:
    episodes = []
    totals = {task: {"episodes": 0, "attempts": 0, "frames": 0} for task in params.tasks}
    for folder in folders:
        part = read_part(folder)
        episodes.append({**part.facts, "instruction": part.task, "frames": part.length})
        total = totals[part.facts["task"]]
        total["episodes"] += 1
        total["attempts"] += 1 + len(part.facts["failed_seeds"])
        total["frames"] += part.length
    return {"settings": _settings_of(params), "tasks": totals, "episodes": episodes}


def _write_json(path: Path, values: Any) -> None:
    write_text(str(path), json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _sync(folder: Path) -> None:
    """Flush all files to disk, so that the report cannot outlive them when the machine stops."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
