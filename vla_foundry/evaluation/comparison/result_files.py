"""Read result files of any layout: the published one, ours, and the vla-eval harness's."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from vla_foundry.evaluation.results import ROLLOUTS_FOLDER
from vla_foundry.parsing import parse_record
from vla_foundry.storage.uri import read_text, read_yaml

_MAX_INDEX = 2**53


@dataclass(kw_only=True)
class Run:
    """The episodes of a model and a task in one file; lists of one length."""

    model: str
    task: str
    path: str
    time: str
    budget: int | None
    is_null: bool = False
    # SHA-256 of the family that was declared when the file was begun; None: there was none, or the file is not ours
    declared: str | None = None
    is_ours: bool = False
    index: list[int] = field(default_factory=list)
    outcome: list[str] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    reason: list[str | None] = field(default_factory=list)

    def keep(self, positions: Iterable[int]) -> None:
        """Drop the episodes at all other positions."""
        positions = list(positions)
        for name in ("index", "outcome", "seconds", "reason"):
            values = getattr(self, name)
            setattr(self, name, [values[position] for position in positions])


def read_files(root: Path) -> list[Run]:
    """Read the result files below a folder, one Run for each file and task.

    Raises:
        ValueError: a file is broken or misplaced.
    """
    runs: list[Run] = []
    models = set()
    others = []
    for path in sorted(root.rglob("*.json")):
        parts = path.relative_to(root).parts
        if ROLLOUTS_FOLDER in parts[:-1]:
            if not path.name.startswith("results"):
                continue
            place = len(parts) - 1 - parts[::-1].index(ROLLOUTS_FOLDER)
            # the root may also be the folder of one model, or of one task
            above = (root.resolve().parent.name, root.resolve().name, *parts[:place])[-max(2, place) :]
            models.add(root.joinpath(*parts[: max(0, place - 1)]))
            runs += _read_published(path, "/".join(parts), model="/".join(above[:-1]), time=parts[-2])
        elif path.name == "results.json":
            raise ValueError(
                f"{path} is misplaced: results lie in <model>/<task>/{ROLLOUTS_FOLDER}/<time>/results.json."
            )
        else:
            others.append(path)
    # `evaluate harness` keeps the harness's files beside the same episodes in our layout
    others = [path for path in others if not models.intersection(path.parents)]
    whole = {path.parent for path in others if path.stem.endswith("_aggregate")}
    for path in others:
        if path.parent not in whole or path.stem.endswith("_aggregate"):
            runs += _read_harness(path, root)
    return runs


def _read_published(path: Path, name: str, *, model: str, time: str) -> list[Run]:
    values = _read_object(path)
    episodes, budget = values.get("evaluations"), values.get("max_sample_size_per_model")
    if type(budget) is not int or budget < 1:
        raise ValueError(f"{path}: max_sample_size_per_model must be a number of rollouts, not {budget!r:.40}.")
    if not isinstance(episodes, list) or not all(isinstance(episode, dict) for episode in episodes):
        raise ValueError(f"{path}: evaluations must be a list of episodes.")
    settings = values.get("settings")
    is_ours = isinstance(settings, dict)
    is_null = is_ours and settings.get("policy") == "null"
    declared = settings.get("family") if is_ours else None
    by_task: dict[Any, list[dict[str, Any]]] = {}
    try:
        for episode in episodes:
            by_task.setdefault(episode.get("skill_type"), []).append(episode)
        _check("skill_type", list(by_task), (str,), bool, "the name of a task")
        runs = []
        for task, of_task in by_task.items():
            shown = _checked(task if settings is not None else as_pascal_case(task))
            run = Run(model=model, task=shown, path=_checked(name), time=time, budget=budget)
            run.is_ours, run.is_null, run.declared = is_ours, is_null, declared
            _read_columns(run, of_task)
            runs.append(run)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}.") from None
    return runs


def _read_columns(run: Run, episodes: list[dict[str, Any]]) -> None:
    run.index = [episode.get("scenario_index", position) for position, episode in enumerate(episodes)]
    _check("scenario_index", run.index, (int,), lambda value: 0 <= value < _MAX_INDEX, "a whole number from 0")
    succeeded = [episode.get("is_success") for episode in episodes]
    _check("is_success", succeeded, (bool, NoneType), lambda value: True, "true, false or null")
    messages = [episode.get("failure_message") for episode in episodes]
    _check("failure_message", messages, (str, NoneType), lambda value: True, "text or null")
    # our files say what an episode's outcome was; elsewhere any exception ends in is_success = false
    told = [episode.get("outcome", "untold") for episode in episodes]
    _check("outcome", told, (str, NoneType), _TOLD.__contains__, "success, failure, trivial, invalid or null")
    run.outcome = [
        _TOLD[outcome] or ("pending" if episode.get("is_pending") else _outcome_of(success, message))
        for outcome, success, message, episode in zip(told, succeeded, messages, episodes, strict=True)
    ]
    seconds = [episode.get("total_time") for episode in episodes]
    _check("total_time", seconds, (int, float, NoneType), lambda value: 0 <= (value or 0) < 1e9, "seconds or null")
    # some published policies have no times
    run.seconds = (
        [None if value is None else float(value) for value in seconds] if any(seconds) else [None] * len(seconds)
    )
    run.reason = [message and _last_line(message) for message in messages]


# what our files call an outcome, and what it is called here
_TOLD = {name: name for name in ("success", "failure", "trivial", "invalid")} | {None: "pending", "untold": None}


def _check(
    key: str, values: list[Any], types: tuple[type, ...], is_right: Callable[[Any], bool], expected: str
) -> None:
    """Check a column of a file, all at once because there are many."""
    if not (set(map(type, values)) <= set(types) and all(map(is_right, values))):
        wrong = next(
            position for position, value in enumerate(values) if type(value) not in types or not is_right(value)
        )
        raise ValueError(f"{key} {wrong} must be {expected}, not {values[wrong]!r:.40}")


def as_pascal_case(task: str) -> str:
    """Return the published name of a task: put_mug_on_saucer is PutMugOnSaucer."""
    return "".join(part[:1].upper() + part[1:] for part in task.split("_")) if "_" in task else task


def _outcome_of(succeeded: bool | None, message: str | None) -> str:
    if succeeded:
        return "success"
    return "invalid" if succeeded is None or message else "failure"


def _last_line(message: str) -> str:
    return _checked((message.strip().splitlines() or [""])[-1][:200])


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(text)[:60]} holds half of a surrogate pair, which is not text") from None
    return text


def _read_harness(path: Path, root: Path) -> list[Run]:
    """Read a file of vla-eval; [] if it is another kind of JSON file."""
    # of anything else that lies about, only what could be one is read whole
    with path.open("rb") as file:
        if b'"benchmark"' not in file.read(4096):
            return []
    values = _read_object(path)
    tasks, benchmark = values.get("tasks"), values.get("benchmark")
    if not isinstance(tasks, list) or not isinstance(benchmark, str):
        return []
    name = path.relative_to(root).as_posix()
    model = path.parent.relative_to(root).as_posix() if path.parent != root else root.resolve().name
    time = values.get("created_at")
    runs = []
    for task in tasks:
        if not isinstance(task, dict) or not isinstance(task.get("episodes"), list) or not task.get("task"):
            raise ValueError(f"{path}: tasks must be a list of objects with `task` and `episodes`.")
        shown = f"{benchmark}: {task['task']}"
        run = Run(model=model, task=shown, path=name, time=time if isinstance(time, str) else "", budget=None)
        try:
            _checked(name + shown)
            _read_harness_episodes(run, task["episodes"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: task {ascii(shown)[:60]}: {error}.") from None
        runs.append(run)
    return runs


def _read_harness_episodes(run: Run, episodes: list[Any]) -> None:
    _check("episode", episodes, (dict,), lambda value: True, "an object")
    numbers: list[Any] = [episode.get("episode_id", position) for position, episode in enumerate(episodes)]
    index: list[Any] = [int(number) if isinstance(number, str) and number.isdecimal() else number for number in numbers]
    _check("episode_id", index, (int,), lambda value: 0 <= value < _MAX_INDEX, "a whole number from 0")
    run.index = index
    reasons = [episode.get("failure_reason") for episode in episodes]
    succeeded = [
        None if reason else episode["metrics"].get("success") for episode, reason in zip(episodes, reasons, strict=True)
    ]
    right = [bool(reason) or success in (True, False) for success, reason in zip(succeeded, reasons, strict=True)]
    _check("success of episode", right, (bool,), bool, "true or false, or have a failure_reason")
    run.outcome = [
        "invalid" if reason else "success" if success else "failure"
        for success, reason in zip(succeeded, reasons, strict=True)
    ]
    run.seconds = [None] * len(episodes)
    details = [episode.get("failure_detail") or "" for episode in episodes]
    run.reason = [
        _last_line(f"{reason}: {detail}".rstrip(": ")) if reason else None
        for reason, detail in zip(reasons, details, strict=True)
    ]


def _read_object(path: Path) -> dict[str, Any]:
    # faster than parse_object; the text that is used is checked here
    values = parse_record(read_text(str(path)), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return values


def read_names(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Read a rename.yaml: {task: its name to show}, and {group: its tasks}; both empty if there is none."""
    if not path.is_file():
        return {}, {}
    values = read_yaml(str(path))
    tasks, groups = (
        (values.get(key) or {} for key in ("tasks", "task_groups")) if isinstance(values, dict) else ((), ())
    )
    if (
        not isinstance(tasks, dict)
        or not isinstance(groups, dict)
        or not all(isinstance(name, str) for pair in tasks.items() for name in pair)
        or not all(isinstance(group, list) for group in groups.values())
        or not all(isinstance(task, str) for group in groups.values() for task in group)
    ):
        raise ValueError(f"{path}: tasks must map names to names, and task_groups names to lists of tasks.")
    return tasks, {str(name): tuple(group) for name, group in groups.items()}
