"""`vla-foundry evaluate`: run a policy in a simulator and count its successes.

<output>/<name>/<task>/rollouts/<time>/results.json   outcomes in the published layout (results.py)
<output>/<name>/summary.json                          success rates with 95% Wilson intervals
<output>/<name>/contact_sheet.png                     pictures of a few episodes, from start to end

With `--until_decided BASELINE` a task's rollouts end when a sequential test has told the two apart (comparison/).
results.json is written every few seconds; a restarted evaluation runs only missing episodes.
Policies are evaluated on seeds below 1,000,000; demonstrations are recorded on seeds above.
"""

import importlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from vla_foundry.config.command_line import named_plugins, parse_command
from vla_foundry.evaluation.actors import Actor, Candidate, create_baseline
from vla_foundry.evaluation.comparison.family import FAMILY_NAME, Family, find_family
from vla_foundry.evaluation.comparison.stopping import StoppingRule, open_rule
from vla_foundry.evaluation.pictures import write_contact_sheet
from vla_foundry.evaluation.results import (
    RESULTS_NAME,
    ROLLOUTS_FOLDER,
    SUMMARY_NAME,
    EpisodeResult,
    Outcome,
    SuccessRate,
    count_successes,
    find_results,
    rate_of,
    read_results,
    record_rates,
    write_rates,
    write_results,
    write_summary,
)
from vla_foundry.evaluation.rollout_worker import RobotFacts, SimulatorSetup
from vla_foundry.evaluation.rollouts import Episode, RolloutPool, create_pool, run_episodes
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.progress import say, show_progress
from vla_foundry.run_folder import lock_folder
from vla_foundry.simulators import complete_params, describe_source, find_source
from vla_foundry.storage.uri import read_object
from vla_foundry.world import num_cores

CONTACT_SHEET_NAME = "contact_sheet.png"
# how often results.json is written
_SECONDS_BETWEEN_WRITES = 2.0


def evaluate(params: EvaluateParams) -> dict[str, SuccessRate]:
    """Run all episodes that the output folder does not contain yet.

    Returns:
        The success rate of each task.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a name is unknown, the policy does not fit the robot, or the folder holds other results.
    """
    if params.simulator == "lbm":
        from vla_foundry.evaluation.lbm import evaluate_in_lbm

        return evaluate_in_lbm(params)
    params, camera = complete_params(params)
    with ExitStack() as stack:
        if params.cluster is None:
            return _evaluate(stack, params, params.camera or camera, num_cores())
        from vla_foundry.preprocessing.tasks import ray_cluster

        num_cpus = stack.enter_context(ray_cluster(None, params.cluster, flag="--cluster"))
        # processes on the cluster have working directories of their own
        given = {name: getattr(params, name) for name in ("checkpoint", "field_map")}
        files = {name: str(Path(path).absolute()) for name, path in given.items() if path and Path(path).exists()}
        return _evaluate(stack, replace(params, **files), params.camera or camera, num_cpus)


def _evaluate(stack: ExitStack, params: EvaluateParams, camera: str, num_cpus: int) -> dict[str, SuccessRate]:
    """Run episodes on this machine, or on the cluster that it has joined."""
    candidate = open_candidate(stack, params, camera)
    folder = Path(params.output) / candidate.name
    tasks = [TaskRollouts.open(params, candidate, task) for task in params.tasks]
    rule = _open_rule(params, candidate, tasks)
    num_missing = sum(len(task.missing(params, rule)) for task in tasks)
    if num_missing:
        num_workers = min(params.num_workers or num_cpus, num_missing)
        pool = stack.enter_context(
            create_pool(describe_setup(params, candidate), num_workers, on_cluster=params.cluster is not None)
        )
        # check every name before writing anything
        robots = pool.describe(params.tasks)
        if params.simulated_latency_ms is not None and len({facts.fps for facts in robots}) > 1:
            raise ValueError("simulated_latency_ms is so many steps of one rate: evaluate tasks of each rate apart.")
        actors = [candidate.create_actor(facts) for facts in robots]
        stack.enter_context(lock_folder(folder, what="evaluation", flag="--name or --output"))
        # another process may have written to the folder before it was locked
        tasks = [TaskRollouts.open(params, candidate, task) for task in params.tasks]
        queue = (
            episode
            for task, facts, actor in zip(tasks, robots, actors, strict=True)
            for episode in task.plan(params, facts, actor, rule)
        )
        _run_all(stack, params, pool, queue, tasks, num_missing=num_missing)
    if rule:
        for task in tasks:
            say(rule.describe(task.task, task.outcomes(), task.max_sample_size))
    return _summarize(folder, params, candidate, tasks)


def open_candidate(stack: ExitStack, params: EvaluateParams, camera: str) -> Candidate:
    """Load what is evaluated; a policy on the cluster ends with the stack.

    Args:
        camera: camera of the contact sheet.
    """
    if params.policy != "checkpoint":
        return create_baseline(params, camera)
    if params.cluster is not None and params.checkpoint is not None:
        from vla_foundry.evaluation.cluster import load_on_cluster

        return stack.enter_context(load_on_cluster(params, camera))
    from vla_foundry.evaluation.policy_actor import load_candidate

    return load_candidate(params, camera)


def describe_setup(params: EvaluateParams, candidate: Candidate) -> SimulatorSetup:
    """Return how to create the candidate's simulators."""
    return SimulatorSetup(
        simulator=params.simulator,
        cameras=candidate.cameras,
        picture_camera=candidate.picture_camera,
        image_size=candidate.image_size,
        max_steps=params.max_steps,
        timeout_s=params.simulator_timeout_s,
        source=find_source(params),
        plugins=named_plugins(),
    )


def _run_all(
    stack: ExitStack,
    params: EvaluateParams,
    pool: RolloutPool,
    queue: Iterable[Episode],
    tasks: "Sequence[TaskRollouts]",
    *,
    num_missing: int,
) -> None:
    """Run episodes; write results as they end, and the last ones when the stack is left."""
    if params.save_videos != "none":
        import av  # noqa: F401  before workers need it
    total = len(params.tasks) * len(params.seeds)
    advance = stack.enter_context(show_progress("episodes", total, total - num_missing))
    by_name = {task.task: task for task in tasks}
    for task in tasks:
        stack.callback(task.write)
    counts: Counter[Outcome | None] = Counter(episode.outcome for task in tasks for episode in task.episodes.values())
    # a server makes batches of its own, and each policy on a cluster one
    batch_size = params.batch_size * params.num_policies if params.checkpoint is not None else 1
    for result in run_episodes(pool, queue, batch_size=batch_size):
        task = by_name[result.task]
        if result.seed in task.episodes:
            # it was invalid, and has run again
            counts[task.episodes[result.seed].outcome] -= 1
        counts[result.outcome] += 1
        task.add(params, result)
        advance(1, f"success {rate_of(counts).format()}")


class TaskRollouts:
    """The episodes of one task and their results.json."""

    def __init__(
        self,
        path: Path,
        task: str,
        episodes: dict[int, EpisodeResult],
        *,
        seeds: Sequence[int],
        max_sample_size: int,
        settings: dict[str, Any],
    ) -> None:
        self.path = path
        self.task = task
        # by seed; only those that have run
        self.episodes = episodes
        self.seeds = seeds
        self.max_sample_size = max_sample_size
        self.settings = settings
        # seeds whose videos are kept
        self._videos = {seed for seed in episodes if self.video_of(seed).exists()}
        # when the file was written, and whether it lacks something
        self._last_write = 0.0
        self._is_written = True

    @classmethod
    def open(cls, params: EvaluateParams, candidate: Candidate, task: str) -> "TaskRollouts":
        """Resume a task's rollouts from the output folder, or start new ones.

        Raises:
            ValueError: the folder holds rollouts of other settings.
        """
        folder = Path(params.output) / candidate.name / task
        settings = {**_settings_of(params, candidate), "instruction": params.instructions.get(task)}
        path = find_results(folder)
        if path is None:
            now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
            path = folder / ROLLOUTS_FOLDER / now / RESULTS_NAME
            budget = _plan_rollouts(params, find_family(Path(params.output), candidate.name))
            return cls(path, task, {}, seeds=params.seeds, max_sample_size=budget, settings=settings)
        episodes, found = read_results(path)
        if others := {episode.task for episode in episodes} - {task}:
            raise ValueError(f"{path} holds episodes of {others.pop()}, not of {task}. Put it where it belongs.")
        changed = [f"{key} {found.get(key)} -> {value}" for key, value in settings.items() if found.get(key) != value]
        if changed:
            raise ValueError(
                f"{path} holds rollouts made with other settings ({'; '.join(changed)}). Give another --name or "
                "--output, or delete it."
            )
        budget = read_object(str(path))["max_sample_size_per_model"]
        seeds = {episode.seed for episode in episodes} | set(params.seeds)
        if params.max_sample_size not in (None, budget) or len(seeds) > budget:
            raise ValueError(
                f"{path} has a budget of {budget} rollouts, which is fixed before the first one; "
                f"{params.max_sample_size or len(seeds)} are requested. Give another --name or --output."
            )
        done = {episode.seed: episode for episode in episodes if episode.outcome is not None}
        return cls(path, task, done, seeds=params.seeds, max_sample_size=budget, settings=settings)

    def missing(self, params: EvaluateParams, rule: StoppingRule | None) -> list[int]:
        """Return the seeds of episodes that must run."""
        if rule and rule.decide(self.task, self.outcomes(), self.max_sample_size).better is not None:
            return []
        return [seed for seed in params.seeds if not (seed in self.episodes and self.episodes[seed].is_final)]

    def plan(
        self, params: EvaluateParams, facts: RobotFacts, actor: Actor, rule: StoppingRule | None
    ) -> Iterator[Episode]:
        """Yield the episodes to run, each when it is to begin, until the rule has decided."""
        for seed in self.missing(params, rule):
            if rule and not self.missing(params, rule):
                return
            yield Episode(
                task=self.task,
                seed=seed,
                instruction=params.instructions.get(self.task, facts.instruction),
                fps=float(facts.fps),
                actor=actor,
                pictures=str(self.pictures_of(seed)) if seed in self.pictured(params) else None,
                video=str(self.video_of(seed)) if self._is_filmed(params, seed) else None,
                shown_seed=seed + 1 if params.images == "other_episode" else None,
            )

    def outcomes(self) -> dict[int, bool]:
        """Return {seed: success} of the episodes that count, by seed, up to the first that has not ended.

        Short episodes end first, and they are the successes: in the order of their ends no test would be valid.
        """
        found = {}
        for seed in sorted({*self.episodes, *self.seeds}):
            if seed not in self.episodes:
                break
            if self.episodes[seed].is_trial:
                found[seed] = self.episodes[seed].outcome == "success"
        return found

    def add(self, params: EvaluateParams, result: EpisodeResult) -> None:
        """Keep a result, and its video if it is wanted; write the file if that was long ago."""
        if params.save_videos != "none":
            self._keep_video(params, result)
        self.episodes[result.seed] = result
        self._is_written = False
        if time.monotonic() - self._last_write > _SECONDS_BETWEEN_WRITES:
            self.write()

    def pictured(self, params: EvaluateParams) -> Sequence[int]:
        """Return the seeds whose pictures are kept."""
        return params.seeds[: params.num_pictured]

    def pictures_of(self, seed: int) -> Path:
        """Return the file of an episode's pictures."""
        return self.path.parent / self.task / f"demonstration_{seed}" / "pictures.png"

    def video_of(self, seed: int) -> Path:
        """Return the file of an episode's video."""
        return self.pictures_of(seed).with_name("video.mp4")

    def _is_filmed(self, params: EvaluateParams, seed: int) -> bool:
        """Return whether to film an episode that begins."""
        if params.save_videos == "failures":
            return len(self._videos) < params.max_videos
        return params.save_videos == "all" and seed in params.seeds[: params.max_videos]

    def _keep_video(self, params: EvaluateParams, result: EpisodeResult) -> None:
        """Keep the video of an episode that has ended, or remove it."""
        video = self.video_of(result.seed)
        is_failure = result.outcome == "failure"
        if params.save_videos == "all" or (is_failure and len(self._videos) < params.max_videos):
            self._videos |= {result.seed} if video.exists() else set()
            return
        video.unlink(missing_ok=True)
        with suppress(OSError):
            # unless pictures are in it
            video.parent.rmdir()

    def write(self) -> None:
        """Write what the file lacks: finished episodes, and pending ones."""
        if self._is_written:
            return
        known = sorted({*self.episodes, *self.seeds})
        episodes = [self.episodes.get(seed, EpisodeResult(task=self.task, seed=seed)) for seed in known]
        write_results(self.path, episodes, max_sample_size=self.max_sample_size, settings=self.settings)
        self._is_written, self._last_write = True, time.monotonic()


def _settings_of(params: EvaluateParams, candidate: Candidate) -> dict[str, Any]:
    """Return what the outcomes of all tasks depend on, besides the seeds of the episodes."""
    common = {name: getattr(params, name) for name in ("policy", "simulator", "max_steps", "seed")}
    family = find_family(Path(params.output), candidate.name)
    declared = {"family": family and family.digest}
    return {**common, **describe_source(params), **candidate.settings, **declared}


def _plan_rollouts(params: EvaluateParams, family: Family | None) -> int:
    """Return the budget of a task's rollouts: as given, as declared, or the episodes."""
    declared = family and family.max_sample_size
    budget = params.max_sample_size or declared or len(params.seeds)
    if declared and max(budget, len(params.seeds)) != declared:
        raise ValueError(
            f"{FAMILY_NAME} declares max_sample_size {declared}, but {max(budget, len(params.seeds))} rollouts of a "
            f"task are requested. Give --max_sample_size {declared} and at most as many --episodes."
        )
    return budget


def _open_rule(params: EvaluateParams, candidate: Candidate, tasks: Sequence[TaskRollouts]) -> StoppingRule | None:
    if params.until_decided is None:
        return None
    return open_rule(
        params.until_decided,
        policy=candidate.name,
        tasks=params.tasks,
        alpha=params.alpha,
        family=find_family(Path(params.output), candidate.name),
        budgets={task.task: task.max_sample_size for task in tasks},
    )


def _summarize(
    folder: Path, params: EvaluateParams, candidate: Candidate, tasks: Sequence[TaskRollouts]
) -> dict[str, SuccessRate]:
    rates, pictured = {}, []
    for task in tasks:
        rates[task.task] = count_successes([task.episodes[seed] for seed in params.seeds if seed in task.episodes])
        pictured += [
            (task.episodes[seed], task.pictures_of(seed)) for seed in task.pictured(params) if seed in task.episodes
        ]
    write_contact_sheet(folder / CONTACT_SHEET_NAME, pictured)
    settings = _settings_of(params, candidate)
    write_summary(folder / SUMMARY_NAME, rates, name=candidate.name, episodes=params.episodes, settings=settings)
    name = f"{params.simulator} {candidate.name}"
    record_rates(params.checkpoint, name, rates, {**settings, "episodes": params.episodes})
    return rates


def main(argv: list[str]) -> None:
    """Run `vla-foundry evaluate`: print the success rate of each task, or the metrics of text and captions."""
    if argv[:1] in (["harness"], ["text"], ["captions"]):
        importlib.import_module(f"vla_foundry.evaluation.{argv[0]}").main(argv[1:])
        return
    write_rates(evaluate(parse_command(EvaluateParams, argv, prog="vla-foundry evaluate")))
