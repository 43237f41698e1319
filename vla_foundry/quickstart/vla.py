"""The action stage: demonstrations -> shards -> policies from the VLM and from nothing -> their comparison."""

import json
from collections.abc import Iterator
from pathlib import Path

from vla_foundry.evaluation.comparison.compare import Column, Comparison, PairResult, compare
from vla_foundry.evaluation.comparison.family import FAMILY_NAME, read_family
from vla_foundry.evaluation.comparison.rollouts import read_rollouts
from vla_foundry.evaluation.report.command import PAGE_NAME
from vla_foundry.evaluation.results import SUMMARY_NAME, add_rates, read_summary
from vla_foundry.quickstart.steps import Sizes, Stage, Step, count_trainers, training_step, words_of

# each starts half open, so that only the instruction, not the picture, says whether to open or to close
TASKS = ("drawer-open-v3@half", "drawer-close-v3@half", "window-open-v3@half", "window-close-v3@half")
# rollouts of each policy on each task, at most
NUM_EPISODES = 32
# rollouts of a trained policy on each task that are filmed
NUM_FILMED = 2
# control steps of an episode; trained policies took up to 130
MAX_STEPS = 200
FIELD_MAP = "config_presets/field_maps/metaworld.yaml"
PRESET = "config_presets/training_jobs/vla_quickstart.yaml"
# model in the results -> its label on the page
LABELS = {
    "policy": "from the vision-language model",
    "from_nothing": "the same, trained from nothing",
    "null": "no motion",
    "random": "random motion",
}
_ABLATIONS = {"other_images": "policy, pictures of another episode", "wrong_instruction": "policy, told the opposite"}
_GOAL, _ERROR_GOAL = 0.8, 0.5
_COLUMN_WIDTH = 13
# what is compared, declared before the first rollout
_FAMILY = f"""models: {json.dumps(list(LABELS))}
tasks: {json.dumps(TASKS)}
alpha: 0.05
max_sample_size: {NUM_EPISODES}
"""


def create_vla_stage(output_dir: Path, sizes: Sizes, *, ablations: bool) -> Stage:
    """Build the action stage, which writes below `<output_dir>/vla` and starts from the run in `vlm`.

    Args:
        ablations: also evaluate the policy with other pictures and with wrong instructions.
    """
    folder, vlm_run = output_dir / "vla", output_dir / "vlm" / "runs" / "vlm"
    demos, shards, results = folder / "demos", folder / "shards", folder / "evaluation"
    summary, action_error, page = folder / "summary.txt", folder / "action_error.txt", comparison_page(output_dir)
    run, scratch = folder / "runs" / "vla", folder / "runs" / "vla_from_nothing"
    steps = (
        Step(
            name="demos",
            what="Record scripted experts that move the robot, as a LeRobot dataset",
            seconds=25,
            words=words_of("demos", tasks=",".join(TASKS), episodes=sizes.demos, output_dir=demos),
            outputs=(demos / "meta" / "demos.json",),
            folder=demos,
        ),
        _preprocess(demos, shards),
        _train(
            "train_vla", "Train a policy that starts from the vision-language model", sizes, run, _from_vlm(vlm_run)
        ),
        _train(
            "train_from_nothing",
            "Train the same policy from nothing, on the same samples in the same order",
            sizes,
            scratch,
            _from_nothing(vlm_run),
        ),
        *_comparison_steps(results, run, scratch, page),
        Step(
            name="action_error",
            what="Compare predicted actions with those of held-out demonstrations",
            seconds=12,
            words=words_of("action-error", checkpoint=run),
            output=action_error,
            outputs=(action_error,),
        ),
        *(ablation_steps(folder) if ablations else ()),
        Step(
            name="vla_report_with_ablations" if ablations else "vla_report",
            what="Collect the results",
            function=lambda: write_vla_report(folder, summary=summary, ablations=ablations),
            outputs=(summary,),
        ),
    )
    return Stage(steps=steps, summary=summary)


def _comparison_steps(results: Path, run: Path, scratch: Path, page: Path) -> list[Step]:
    """Return the steps from the declaration to the report."""
    films = {"save_videos": "all", "max_videos": NUM_FILMED, "num_pictured": NUM_FILMED}
    return [
        Step(
            name="declare",
            what="Declare what is compared, before the first rollout",
            function=lambda: _declare(results),
            text=_FAMILY,
            outputs=(results / FAMILY_NAME,),
            # rollouts under another declaration
            folder=results,
        ),
        _evaluate(results, "policy", "Evaluate the policy in closed loop", checkpoint=run, name="policy", **films),
        _evaluate(
            results,
            "from_nothing",
            "Evaluate the one from nothing, on each task until a sequential test tells them apart",
            checkpoint=scratch,
            name="from_nothing",
            until_decided=results / "policy",
            **films,
        ),
        *(
            _evaluate(
                results,
                name,
                f"Without a policy: {name} actions",
                policy=name,
                until_decided=results / "policy",
            )
            for name in ("null", "random")
        ),
        Step(
            name="report",
            what="Compare them on one page",
            seconds=5,
            words=("report", str(results)),
            outputs=(page,),
            folder=page.parent,
        ),
    ]


def comparison_page(output_dir: Path) -> Path:
    """Return the page that compares the policies."""
    return output_dir / "vla" / "evaluation" / "report" / PAGE_NAME


def ablation_steps(folder: Path) -> list[Step]:
    """Return the steps that take something from the policy: its pictures or its instruction.

    Args:
        folder: folder of the action stage.
    """
    results, run = folder / "ablations", folder / "runs" / "vla"
    swapped = ", ".join(f"{task}: {_opposite_instruction(task)}" for task in TASKS)
    return [
        _evaluate(
            results,
            "other_images",
            "Show the policy pictures of another episode",
            name="other_images",
            checkpoint=run,
            images="other_episode",
        ),
        _evaluate(
            results,
            "wrong_instruction",
            "Tell the policy the opposite",
            name="wrong_instruction",
            checkpoint=run,
            instructions="{" + swapped + "}",
        ),
    ]


def _from_vlm(run: Path) -> dict[str, object]:
    return {"model.vision_language_backbone.resume_from_checkpoint": run}


def _from_nothing(vlm_run: Path) -> dict[str, object]:
    """Return the flags of the same architecture and tokenizer, without the weights of the VLM and the LLM."""
    return {
        "model.vision_language_backbone.vlm": f"include {vlm_run / 'config_model.yaml'}",
        # the VLM itself started from the LLM's checkpoint
        "model.vision_language_backbone.vlm.transformer.resume_from_checkpoint": "null",
        "data.processor": vlm_run / "processor",
    }


def _train(name: str, what: str, sizes: Sizes, run: Path, start: dict[str, object]) -> Step:
    return training_step(
        name,
        what,
        seconds=140,
        preset=PRESET,
        run=run,
        shards=run.parent.parent / "shards",
        num_processes=count_trainers(),
        flags={**start, **sizes.training_flags(sizes.vla_samples)},
    )


def _preprocess(demos: Path, shards: Path) -> Step:
    return Step(
        name="preprocess_demos",
        what="Write the demonstrations to shards, a tenth of them held out",
        seconds=8,
        words=words_of(
            "preprocess robotics",
            type="lerobot",
            source_episodes=demos,
            output_dir=shards,
            field_map=FIELD_MAP,
            past_lowdim_steps=0,
            future_lowdim_steps=7,
            image_indices="[0]",
            max_padding_left=0,
            max_padding_right=7,
            validation_fraction=0.1,
            num_workers=0,
        ),
        outputs=(shards / "train" / "manifest.jsonl", shards / "validation" / "manifest.jsonl"),
        folder=shards,
    )


def _evaluate(results: Path, folder: str, what: str, **flags: object) -> Step:
    options = {
        "tasks": ",".join(TASKS),
        "episodes": f"0:{NUM_EPISODES}",
        "max_steps": MAX_STEPS,
        "output": results,
        "num_pictured": 0,
    }
    is_trained = "checkpoint" in flags
    if is_trained:
        # a prediction of four takes hardly longer than one of one, and two robots move meanwhile; with 5 sampling steps
        # in place of the preset's 10, 70% of one policy's rollouts succeeded in place of 68%
        options |= {"batch_size": 4, "num_workers": 6, "num_inference_steps": 5}
    words = words_of("evaluate", **(options | flags))
    # results of other weights or settings are deleted, not resumed
    return Step(
        name=f"evaluate_{folder}",
        what=what,
        # one without a policy is soon told apart
        seconds=60 if is_trained else 10,
        words=words,
        # matrices of one robot are small; two threads took a third more CPU time than one
        num_threads=1,
        outputs=(results / folder / SUMMARY_NAME,),
        folder=results / folder,
    )


def _opposite_instruction(task: str) -> str:
    thing, _, rest = task.partition("-")
    return f"{'close' if rest.startswith('open') else 'open'} the {thing}"


def _declare(results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    (results / FAMILY_NAME).write_text(_FAMILY, encoding="utf-8")
    print("".join(f"  {line}\n" for line in _FAMILY.splitlines()), end="")  # noqa: T201


def write_vla_report(folder: Path, *, summary: Path, ablations: bool = False) -> str:
    """Write the page of the action stage.

    Args:
        folder: of the action stage: evaluation/ with the results of all policies, action_error.txt.
        summary: text file to write.
        ablations: show those of ablations/ too.

    Returns:
        The page.
    """
    results = folder / "evaluation"
    comparison = compare(read_rollouts(results), read_family(results))
    text = "\n".join(
        (
            "Action stage: success in closed loop; policies that share a letter are not told apart",
            *_format_rates(comparison),
            *(f"  {line}" for line in decisions(comparison)),
            *(format_ablations(folder / "ablations") if ablations else ()),
            f"  goal: {_GOAL:.0%} for the policy, at most 10% without one, and the one from nothing told apart from it",
            *(folder / "action_error.txt").read_text(encoding="utf-8").rstrip("\n").split("\n"),
            f"  goal: at most {_ERROR_GOAL:.2f} in the last column",
        )
    )
    summary.write_text(text + "\n", encoding="utf-8")
    return text


def _format_rates(comparison: Comparison) -> Iterator[str]:
    heads, rows = rate_cells(comparison)
    width = max(map(len, LABELS.values()))
    for label, *cells in (("", *heads), *rows):
        yield f"  {label:{width}}{''.join(f'{cell:>{_COLUMN_WIDTH}}' for cell in cells)}"


def rate_cells(comparison: Comparison) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return a table as text: the heads of its columns, and a row per policy that begins with its name.

    The columns are the tasks and their mean. Cells hold a rate and the letters; "-" where there is no rollout.
    """
    *tasks, mean = comparison.columns
    rows = []
    for model, label in LABELS.items():
        cells = []
        for task in tasks:
            rate = task.rates.get(model)
            cells.append(f"{rate.num_successes}/{rate.num_trials} {task.letters[model]}" if rate else "-")
        cells.append(f"{mean.means[model]:.0%} {mean.letters[model]}" if model in mean.means else "-")
        rows.append((label, *cells))
    return [*(task.name.partition("-v3")[0] for task in tasks), "mean"], rows


def decisions(comparison: Comparison) -> Iterator[str]:
    """Say whether the policy is told apart from each other one, and how many rollouts that saved."""
    *tasks, mean = comparison.columns
    for pair in mean.pairs:
        if "policy" in (pair.first, pair.second):
            other = LABELS[pair.second if pair.first == "policy" else pair.first]
            yield f"policy against '{other}': {_describe_decision(pair, mean)}"
    planned = sum(task.n_max for task in tasks) * len(LABELS)
    run = sum(rate.num_trials for task in tasks for rate in task.rates.values())
    yield f"rollouts: {run} of {planned} planned; {planned - run} saved by the sequential test"


def _describe_decision(pair: PairResult, mean: Column) -> str:
    if pair.better is None:
        return f"not told apart after {pair.num_rollouts} of {mean.n_max} rollouts of each"
    verb = "better" if pair.better == "policy" else "worse"
    return f"{verb}, decided after {pair.num_rollouts} of {mean.n_max} rollouts of each"


def format_ablations(results: Path) -> Iterator[str]:
    """Yield the success rate of each ablation, a line each."""
    for name, label in _ABLATIONS.items():
        total = add_rates(read_summary(results / name / SUMMARY_NAME).values())
        yield f"  {label:<36}{total.format()}"
