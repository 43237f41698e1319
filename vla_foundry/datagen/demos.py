"""`vla-foundry demos`: scripted experts show tasks in a simulator; what they saw and did becomes a LeRobot set.

While it works, `<output_dir>/_progress` holds what was asked for and the finished episodes. At the end these are joined
to a set, which is moved into place, `meta` with the report (`meta/demos.json`) last; then `_progress` goes. So a folder
with that report is whole, and a run that was killed goes on where it was.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from vla_foundry.config.command_line import parse_command
from vla_foundry.datagen.demo_episode import features_of, record_episode
from vla_foundry.params.commands.datagen import DemosParams
from vla_foundry.preprocessing.robotics.lerobot_recording import LeRobotFeatures, delete_leftovers, read_part
from vla_foundry.preprocessing.robotics.lerobot_writer import LeRobotWriter
from vla_foundry.progress import show_progress
from vla_foundry.simulators import Simulator, create_simulator
from vla_foundry.world import num_cores

REPORT = "meta/demos.json"
# instruction of an episode -> every way to say it
INSTRUCTIONS = "meta/instructions.json"
_PROGRESS, _SETTINGS = "_progress", "settings.json"
# raise it when an episode of the same settings comes out differently
_VERSION = 2
_SIMULATORS_PER_PROCESS = 4

# (function, arguments of each call) -> results, in any order
Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What a simulator says of one task."""

    task: str
    instructions: tuple[str, ...]
    features: LeRobotFeatures


def record_demos(params: DemosParams) -> dict[str, Any]:
    """Record all demonstrations that the output folder does not hold yet, and make the set of them.

    Returns:
        The report: settings; episodes, attempts and frames of each task; instruction and seeds of each episode.

    Raises:
        ValueError: the folder holds something else, a name is unknown, or an expert does not succeed.
    """
    output = Path(params.output_dir)
    settings = _settings_of(params)
    if (output / REPORT).exists():
        report = json.loads((output / REPORT).read_text())
        _check_settings(output, report["settings"], settings)
        shutil.rmtree(output / _PROGRESS, ignore_errors=True)
        return report
    _check_folder(output, settings)
    total = params.episodes * len(params.tasks)
    with _create_processes(params) as run:
        # every name is checked before anything is written
        tasks = {facts.task: facts for facts in run(_look_at, [(params, task) for task in params.tasks])}
        parts = _claim(output, settings)
        missing = [index for index in _by_task(params) if not _part(parts, index).exists()]
        with show_progress("demos", total, total - len(missing)) as advance:
            for _ in run(_record, [(params, str(parts), index) for index in missing]):
                advance(1)
    return _publish(params, output, [tasks[task] for task in params.tasks])


def main(argv: list[str]) -> None:
    """Run `vla-foundry demos`.

    Raises:
        ValueError: what the user can fix.
    """
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
    """What makes the bytes of the set."""
    values = asdict(params)
    del values["output_dir"], values["num_workers"]
    return {"version": _VERSION, **values}


def _check_settings(output: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    changed = [f"{name} {found.get(name)} -> {value}" for name, value in settings.items() if found.get(name) != value]
    if changed:
        raise ValueError(
            f"'{output}' holds demonstrations that were recorded otherwise ({'; '.join(changed)}). "
            "Name another output_dir, or delete this one."
        )


def _check_folder(output: Path, settings: dict[str, Any]) -> None:
    """Check that what lies in the output folder, if anything, is an unfinished run of the same."""
    path = output / _PROGRESS / _SETTINGS
    if path.exists():
        _check_settings(output, json.loads(path.read_text()), settings)
    elif output.exists() and any(entry.name != _PROGRESS for entry in output.iterdir()):
        raise ValueError(f"output_dir '{output}' holds other files. Name a new folder.")


def _claim(output: Path, settings: dict[str, Any]) -> Path:
    """Write down what is asked for; return the folder of parts, without what a killed run left half done."""
    parts = output / _PROGRESS / "episodes"
    parts.mkdir(parents=True, exist_ok=True)
    delete_leftovers(parts)
    _write(output / _PROGRESS / _SETTINGS, settings)
    return parts


def _part(parts: Path, index: int) -> Path:
    return parts / f"episode-{index:06d}"


def _by_task(params: DemosParams) -> Iterator[int]:
    """All episodes, those of one task after each other; in the set the tasks take turns."""
    for number in range(len(params.tasks)):
        yield from range(number, params.episodes * len(params.tasks), len(params.tasks))


@lru_cache(maxsize=_SIMULATORS_PER_PROCESS)
def _simulator(simulator: str, task: str, cameras: tuple[str, ...], image_size: int) -> Simulator:
    """This process's simulators: to create one takes as long as some episodes."""
    return create_simulator(simulator, task, cameras=cameras, image_size=image_size)


def _look_at(params: DemosParams, task: str) -> TaskFacts:
    simulator = _simulator(params.simulator, task, tuple(params.cameras), params.image_size)
    return TaskFacts(task=task, instructions=simulator.instructions, features=features_of(simulator, params))


def _record(params: DemosParams, parts: str, index: int) -> None:
    number, which = divmod(index, len(params.tasks))
    task = params.tasks[which]
    simulator = _simulator(params.simulator, task, tuple(params.cameras), params.image_size)
    record_episode(simulator, params, task=task, number=number, path=_part(Path(parts), index))


def _publish(params: DemosParams, output: Path, tasks: Sequence[TaskFacts]) -> dict[str, Any]:
    """Join the parts to a set and move it into place; may be killed and called again at any point."""
    progress = output / _PROGRESS
    parts = [_part(progress / "episodes", index) for index in range(params.episodes * len(params.tasks))]
    joined = progress / "set"
    shutil.rmtree(joined, ignore_errors=True)
    writer = LeRobotWriter(joined, tasks[0].features)
    for part in parts:
        writer.add_episode(part)
    writer.finish()
    variants = {text: list(task.instructions) for task in tasks for text in task.instructions}
    _write(joined / INSTRUCTIONS, {"version": 1, "variants": variants})
    report = _report_on(params, parts)
    _write(joined / REPORT, report)
    _sync(joined)
    for name in ("data", "videos", "meta"):
        # what lies there without a report is from a run that was killed in this very loop
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


def _write(path: Path, values: Any) -> None:
    """Write a whole JSON file or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def _sync(folder: Path) -> None:
    """Bring all files to the disk, so that the report does not outlive them when the machine stops."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def _create_processes(params: DemosParams) -> Iterator[Run]:
    """Yield what makes calls in processes of their own, or in this one for 0 workers.

    Raises:
        ValueError: a process died.
    """
    if params.num_workers == 0:
        yield lambda function, calls: (function(*call) for call in calls)
        return
    num_workers = min(params.num_workers or num_cores(), params.episodes * len(params.tasks))
    # spawned, so that no process inherits another's OpenGL or threads
    context = get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_follow_the_parent) as pool:

        def run(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
            for future in as_completed([pool.submit(function, *call) for call in calls]):
                yield future.result()

        try:
            yield run
        except BrokenProcessPool:
            raise ValueError(
                "A recording process died; most often the machine ran out of memory. "
                f"Lower num_workers ({num_workers}) and run the same again: finished episodes are kept."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _follow_the_parent() -> None:
    """Leave interrupts to the parent process, and end as soon as it has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
