"""`vla-foundry evaluate`: run a policy in a simulator and count its successes.

<output>/<name>/<task>/rollouts/<time>/results.json   outcomes in the published layout (results.py)
<output>/<name>/summary.json                          success rates with 95% Wilson intervals
<output>/<name>/contact_sheet.png                     pictures of a few episodes, from start to end

With `--until_decided BASELINE` a task's rollouts end when a sequential test has told the two apart (comparison/).
results.json is written after each batch of episodes; a restarted evaluation runs only missing episodes.
Policies are evaluated on seeds below 1,000,000; demonstrations are recorded on seeds above.
"""

from collections.abc import Sequence
from contextlib import ExitStack
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
    SuccessRate,
    count_successes,
    find_results,
    read_results,
    write_rates,
    write_results,
    write_summary,
)
from vla_foundry.evaluation.rollout_worker import RobotFacts, SimulatorSetup
from vla_foundry.evaluation.rollouts import Batch, RolloutPool, create_pool, run_batch
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.progress import say, show_progress
from vla_foundry.run_folder import lock_folder
from vla_foundry.simulators import complete_params, describe_source, find_source
from vla_foundry.storage.uri import read_object
from vla_foundry.world import num_cores

CONTACT_SHEET_NAME = "contact_sheet.png"


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
    params, default_camera = complete_params(params)
    camera = params.camera or default_camera
    if params.policy != "checkpoint":
        candidate = create_baseline(params, camera)
    else:
        from vla_foundry.evaluation.policy_actor import load_candidate

        candidate = load_candidate(params, camera)
    num_workers = min(params.num_workers or num_cores(), params.batch_size, len(params.seeds))
    setup = SimulatorSetup(
        simulator=params.simulator,
        cameras=candidate.cameras,
        picture_camera=candidate.picture_camera,
        image_size=candidate.image_size,
        max_steps=params.max_steps,
        source=find_source(params),
        plugins=named_plugins(),
    )
    folder = Path(params.output) / candidate.name
    tasks = [TaskRollouts.open(params, candidate, task) for task in params.tasks]
    rule = _open_rule(params, candidate, tasks)
    total = len(params.tasks) * len(params.seeds)
    with ExitStack() as stack:
        if any(task.is_open(params, rule) for task in tasks):
            pool = stack.enter_context(create_pool(setup, num_workers))
            # check every name before writing anything
            robots = pool.describe(params.tasks)
            actors = [candidate.create_actor(facts) for facts in robots]
            stack.enter_context(lock_folder(folder, what="evaluation", flag="--name or --output"))
            # another process may have written to the folder before it was locked
            tasks = [TaskRollouts.open(params, candidate, task) for task in params.tasks]
            num_done = sum(task.num_final(params.seeds) for task in tasks)
            advance = stack.enter_context(show_progress("episodes", total, num_done))
            for task, facts, actor in zip(tasks, robots, actors, strict=True):
                for seeds in task.missing_batches(params):
                    if task.is_open(params, rule):
                        advance(task.run(pool, actor, seeds, params=params, facts=facts))
        if rule:
            for task in tasks:
                say(rule.describe(task.task, task.outcomes(), task.max_sample_size))
        return _summarize(folder, params, candidate, tasks)


class TaskRollouts:
    """The episodes of one task and their results.json."""

    def __init__(
        self,
        path: Path,
        task: str,
        episodes: dict[int, EpisodeResult],
        *,
        max_sample_size: int,
        settings: dict[str, Any],
    ) -> None:
        self.path = path
        self.task = task
        # by seed; only those that have run
        self.episodes = episodes
        self.max_sample_size = max_sample_size
        self.settings = settings

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
            time = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
            path = folder / ROLLOUTS_FOLDER / time / RESULTS_NAME
            budget = _plan_rollouts(params, find_family(Path(params.output), candidate.name))
            return cls(path, task, {}, max_sample_size=budget, settings=settings)
        episodes, found = read_results(path)
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
        return cls(path, task, done, max_sample_size=budget, settings=settings)

    def num_final(self, seeds: Sequence[int]) -> int:
        """Return how many of the episodes have ended in success or failure."""
        return sum(seed in self.episodes and self.episodes[seed].is_final for seed in seeds)

    def missing_batches(self, params: EvaluateParams) -> list[tuple[int, ...]]:
        """Return the batches of seeds with unfinished episodes; batches start at multiples of the batch size."""
        groups: dict[int, list[int]] = {}
        for seed in params.seeds:
            groups.setdefault(seed // params.batch_size, []).append(seed)
        return [tuple(group) for group in groups.values() if self.num_final(group) < len(group)]

    def outcomes(self) -> dict[int, bool]:
        """Return {seed: success} of the episodes that count, by seed."""
        return {
            seed: episode.outcome == "success" for seed, episode in sorted(self.episodes.items()) if episode.is_final
        }

    def is_open(self, params: EvaluateParams, rule: StoppingRule | None) -> bool:
        """Return whether more episodes must run."""
        is_decided = rule and rule.decide(self.task, self.outcomes(), self.max_sample_size).better is not None
        return not is_decided and bool(self.missing_batches(params))

    def run(
        self, pool: RolloutPool, actor: Actor, seeds: tuple[int, ...], *, params: EvaluateParams, facts: RobotFacts
    ) -> int:
        """Run a batch, keep its new results and write the file; return how many episodes became final."""
        before = self.num_final(seeds)
        batch = Batch(
            task=self.task,
            seeds=seeds,
            instruction=params.instructions.get(self.task, facts.instruction),
            fps=float(facts.fps),
            pictures={seed: str(self.pictures_of(seed)) for seed in seeds if seed in self.pictured(params)},
        )
        for result in run_batch(pool, actor, batch):
            # finished episodes run again only to complete the batch
            if not (result.seed in self.episodes and self.episodes[result.seed].is_final):
                self.episodes[result.seed] = result
        self.write(params.seeds)
        return self.num_final(seeds) - before

    def pictured(self, params: EvaluateParams) -> Sequence[int]:
        """Return the seeds whose pictures are kept."""
        return params.seeds[: params.num_pictured]

    def pictures_of(self, seed: int) -> Path:
        """Return the file of an episode's pictures."""
        return self.path.parent / self.task / f"demonstration_{seed}" / "pictures.png"

    def write(self, seeds: Sequence[int]) -> None:
        """Write the file: finished episodes, and pending ones of `seeds`."""
        known = sorted({*self.episodes, *seeds})
        episodes = [self.episodes.get(seed, EpisodeResult(task=self.task, seed=seed)) for seed in known]
        write_results(self.path, episodes, max_sample_size=self.max_sample_size, settings=self.settings)


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
    write_summary(
        folder / SUMMARY_NAME,
        rates,
        name=candidate.name,
        episodes=params.episodes,
        settings=_settings_of(params, candidate),
    )
    return rates


def main(argv: list[str]) -> None:
    """Run `vla-foundry evaluate`: print the success rate of each task."""
    if argv[:1] == ["harness"]:
        from vla_foundry.evaluation import harness

        harness.main(argv[1:])
        return
    write_rates(evaluate(parse_command(EvaluateParams, argv, prog="vla-foundry evaluate")))
