"""The action stage: demonstrations -> shards -> a policy that starts from the VLM -> success in closed loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vla_foundry.evaluation.results import SUMMARY_NAME, SuccessRate, add_rates, read_summary
from vla_foundry.quickstart.steps import Stage, Step, count_trainers, training_step, words_of

# each starts half open, so that only the instruction, not the picture, says whether to open or to close
TASKS = ("drawer-open-v3@half", "drawer-close-v3@half", "window-open-v3@half", "window-close-v3@half")
NUM_DEMOS = 50
NUM_EPISODES = 20
# control steps of an episode; trained policies took up to 130
MAX_STEPS = 200
FIELD_MAP = "config_presets/field_maps/metaworld.yaml"
PRESET = "config_presets/training_jobs/vla_quickstart.yaml"
# folder of an evaluation -> its label in the report
_LABELS = {
    "vla": "policy",
    "null": "no motion",
    "random": "random motion",
    "other_images": "policy, pictures of another episode",
    "wrong_instruction": "policy, told the opposite",
    "vla_from_scratch": "the same policy, trained from scratch",
}
_GOAL, _ERROR_GOAL = 0.6, 0.5
_COLUMN_WIDTH = 13


def create_vla_stage(output_dir: Path, *, ablations: bool) -> Stage:
    """Build the action stage, which writes below `<output_dir>/vla` and starts from the run in `vlm`.

    Args:
        ablations: also evaluate the policy with other pictures, with wrong instructions, and trained from scratch.
    """
    folder, vlm_run = output_dir / "vla", output_dir / "vlm" / "runs" / "vlm"
    demos, shards, run = folder / "demos", folder / "shards", folder / "runs" / "vla"
    summary, figure, action_error = folder / "summary.txt", folder / "success.png", folder / "action_error.txt"
    names = [name for name in _LABELS if ablations or name in ("vla", "null", "random")]
    steps = (
        Step(
            name="demos",
            what="Record scripted experts that move the robot, as a LeRobot dataset",
            words=words_of("demos", tasks=",".join(TASKS), episodes=NUM_DEMOS, output_dir=demos),
            outputs=(demos / "meta" / "demos.json",),
            folder=demos,
        ),
        _preprocess(demos, shards),
        training_step(
            "train_vla",
            "Train the policy, starting from the vision-language model",
            preset=PRESET,
            run=run,
            shards=shards,
            num_processes=count_trainers(),
            flags={"model.vision_language_backbone.resume_from_checkpoint": vlm_run},
        ),
        _evaluate(folder, "evaluate", "Evaluate the policy in closed loop", name="vla", checkpoint=run),
        _evaluate(folder, "evaluate_null", "Without a policy: null actions", name="null", policy="null"),
        _evaluate(folder, "evaluate_random", "Without a policy: random actions", name="random", policy="random"),
        Step(
            name="action_error",
            what="Compare predicted actions with those of held-out demonstrations",
            words=words_of("action-error", checkpoint=run),
            output=action_error,
            outputs=(action_error,),
        ),
        *(ablation_steps(folder, vlm_run=vlm_run) if ablations else ()),
        Step(
            name="vla_report_with_ablations" if ablations else "vla_report",
            what="Collect the results",
            function=lambda: write_vla_report(
                folder / "evaluation", names, action_error, summary=summary, figure=figure
            ),
            outputs=(summary, figure),
        ),
    )
    return Stage(steps=steps, summary=summary)


def ablation_steps(folder: Path, *, vlm_run: Path) -> list[Step]:
    """Return the steps that remove something from the policy: its pictures, its instruction, its pretraining.

    Args:
        folder: folder of the action stage.
        vlm_run: folder of the vision-language run, whose architecture the policy trained from scratch shares.
    """
    run, scratch = folder / "runs" / "vla", folder / "runs" / "vla_from_scratch"
    swapped = {task: _opposite_instruction(task) for task in TASKS}
    return [
        _evaluate(
            folder,
            "evaluate_other_images",
            "Show the policy pictures of another episode",
            name="other_images",
            checkpoint=run,
            images="other_episode",
        ),
        _evaluate(
            folder,
            "evaluate_wrong_instruction",
            "Tell the policy the opposite",
            name="wrong_instruction",
            checkpoint=run,
            instructions="{" + ", ".join(f"{task}: {text}" for task, text in swapped.items()) + "}",
        ),
        training_step(
            "train_vla_from_scratch",
            "Train the same policy from scratch",
            preset=PRESET,
            run=scratch,
            shards=folder / "shards",
            num_processes=count_trainers(),
            flags={
                "model.vision_language_backbone.vlm": f"include {vlm_run / 'config_model.yaml'}",
                # the VLM itself started from the LLM's checkpoint
                "model.vision_language_backbone.vlm.transformer.resume_from_checkpoint": "null",
                "data.processor": vlm_run / "processor",
            },
        ),
        _evaluate(
            folder,
            "evaluate_from_scratch",
            "Evaluate that policy in closed loop",
            name="vla_from_scratch",
            checkpoint=scratch,
        ),
    ]


def _preprocess(demos: Path, shards: Path) -> Step:
    return Step(
        name="preprocess_demos",
        what="Write the demonstrations to shards, a tenth of them held out",
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


def _evaluate(folder: Path, step: str, what: str, *, name: str, **flags: object) -> Step:
    results = folder / "evaluation" / name
    options = {
        "tasks": ",".join(TASKS),
        "episodes": f"0:{NUM_EPISODES}",
        "max_steps": MAX_STEPS,
        "output": results.parent,
        "name": name,
    }
    words = words_of("evaluate", **options, **flags)
    # results of other weights or settings are deleted, not resumed
    return Step(name=step, what=what, words=words, outputs=(results / SUMMARY_NAME,), folder=results)


def _opposite_instruction(task: str) -> str:
    thing, _, rest = task.partition("-")
    return f"{'close' if rest.startswith('open') else 'open'} the {thing}"


def write_vla_report(evaluation: Path, names: Sequence[str], action_error: Path, *, summary: Path, figure: Path) -> str:
    """Write the page, and plot success rates with their intervals.

    Args:
        evaluation: folder that `vla-foundry evaluate` wrote to.
        names: evaluations, in the order of the page.
        action_error: file with the table that `vla-foundry action-error` printed.
        summary: text file to write.
        figure: PNG to write.

    Returns:
        The page.
    """
    evaluations = {_LABELS[name]: read_summary(evaluation / name / SUMMARY_NAME) for name in names}
    text = "\n".join(
        (
            "Action stage: success in closed loop, with 95% Wilson intervals",
            *_format_rates(evaluations),
            f"  goal: {_GOAL:.0%} of all for the policy, at most 10% without one",
            *action_error.read_text(encoding="utf-8").rstrip("\n").split("\n"),
            f"  goal: at most {_ERROR_GOAL:.2f} in the last column",
            f"  figure                {figure}",
            f"  pictures of episodes  {evaluation / names[0] / 'contact_sheet.png'}",
        )
    )
    _draw_rates(evaluations, figure)
    summary.write_text(text + "\n", encoding="utf-8")
    return text


def _format_rates(evaluations: Mapping[str, Mapping[str, SuccessRate]]) -> list[str]:
    """Format a table: a row per policy, a column per task, and a column for all tasks with the interval."""
    tasks = list(next(iter(evaluations.values())))
    width = max(map(len, evaluations))
    heads = "".join(f"{task.partition('-v3')[0]:>{_COLUMN_WIDTH}}" for task in tasks)
    lines = [f"  {'':{width}}{heads}{'all':>25}"]
    for label, rates in evaluations.items():
        counts = (f"{rates[task].num_successes}/{rates[task].num_trials}" for task in tasks)
        cells = "".join(f"{count:>{_COLUMN_WIDTH}}" for count in counts)
        lines.append(f"  {label:{width}}{cells}{add_rates(rates.values()).format():>25}")
    return lines


def _draw_rates(evaluations: Mapping[str, Mapping[str, SuccessRate]], path: Path) -> None:
    """Plot success rates over all tasks, with their intervals, as a PNG."""
    from matplotlib.figure import Figure

    labels = list(evaluations)
    figure = Figure(figsize=(7, 0.6 + 0.5 * len(evaluations)), dpi=120, layout="tight")
    axes = figure.subplots()
    for place, label in enumerate(reversed(labels)):
        total = add_rates(evaluations[label].values())
        rate = total.num_successes / max(total.num_trials, 1)
        low, high = total.interval
        axes.barh(place, rate, color="#4878a8", height=0.6)
        axes.errorbar(rate, place, xerr=[[rate - low], [high - rate]], color="#222222", capsize=3)
    axes.set_yticks(range(len(evaluations)), labels[::-1])
    axes.set(xlim=(0, 1), xlabel="success rate over all tasks")
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path)
