"""`vla-foundry quickstart`: run the stages and show what came of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.runs import QuickstartParams
from vla_foundry.quickstart.llm import generate_step, llm_steps
from vla_foundry.quickstart.report import write_llm_report
from vla_foundry.quickstart.stages import Step, count_trainers, run_steps, words_of
from vla_foundry.quickstart.system import require_renderer
from vla_foundry.quickstart.vla import ABLATIONS, BASELINES, ablation_steps, vla_steps
from vla_foundry.quickstart.vla_report import write_vla_report
from vla_foundry.quickstart.vlm import caption_step, vlm_steps
from vla_foundry.quickstart.vlm_report import write_vlm_report
from vla_foundry.world import num_cores


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some steps and the page that says what came of them."""

    steps: Sequence[Step]
    summary: Path


def create_llm_stage(output_dir: Path) -> Stage:
    """Text -> language model."""
    folder = output_dir / "llm"
    summary, figure = folder / "summary.txt", folder / "loss.png"
    report = Step(
        name="llm_report",
        what="Compare with a model that ignores context",
        function=lambda: write_llm_report(folder / "runs" / "llm", summary=summary, figure=figure),
        outputs=(summary, figure),
    )
    steps = llm_steps(folder, num_processes=num_cores(), num_trainers=count_trainers())
    return Stage(summary=summary, steps=(*steps, report, generate_step(folder)))


def create_vlm_stage(output_dir: Path) -> Stage:
    """Language model and captioned scenes -> vision-language model."""
    folder = output_dir / "vlm"
    summary, figure = folder / "summary.txt", folder / "captions.png"
    scenes = folder / "scenes" / "validation"
    report = Step(
        name="vlm_report",
        what="Caption the held-out scenes and count what is right",
        function=lambda: write_vlm_report(folder / "runs" / "vlm", scenes, summary=summary, figure=figure),
        outputs=(summary, figure),
    )
    steps = vlm_steps(folder, llm_run=output_dir / "llm" / "runs" / "llm", num_processes=count_trainers())
    return Stage(summary=summary, steps=(*steps, caption_step(folder), report))


def create_vla_stage(output_dir: Path, *, ablations: bool) -> Stage:
    """Vision-language model and demonstrations -> policy, in closed loop.

    Args:
        ablations: evaluate it, besides, without its pictures, its instruction and its training before.
    """
    folder, vlm_run = output_dir / "vla", output_dir / "vlm" / "runs" / "vlm"
    summary, figure, error = folder / "summary.txt", folder / "success.png", folder / "action_error.txt"
    run, names = folder / "runs" / "vla", ["vla", *BASELINES]
    steps = vla_steps(folder, vlm_run=vlm_run, num_processes=count_trainers())
    steps.append(
        Step(
            name="action_error",
            what="Compare predicted actions with those of held-out demonstrations",
            words=words_of("action-error", checkpoint=run),
            output=error,
            outputs=(error,),
        )
    )
    if ablations:
        steps += ablation_steps(folder, vlm_run=vlm_run, num_processes=count_trainers())
        names += ABLATIONS
    report = Step(
        name="vla_report_with_ablations" if ablations else "vla_report",
        what="Put the outcomes together",
        function=lambda: write_vla_report(folder / "evaluation", names, error, summary=summary, figure=figure),
        outputs=(summary, figure),
    )
    return Stage(summary=summary, steps=(*steps, report))


_STAGES: dict[str, Callable[[Path, QuickstartParams], Stage]] = {
    "llm": lambda output_dir, _: create_llm_stage(output_dir),
    "vlm": lambda output_dir, _: create_vlm_stage(output_dir),
    "vla": lambda output_dir, params: create_vla_stage(output_dir, ablations=params.ablations),
}


def main(argv: list[str]) -> None:
    """Run `vla-foundry quickstart`.

    Args:
        argv: the words after the command.

    Raises:
        ValueError: a word is wrong, or a step failed.
    """
    params = parse_command(QuickstartParams, argv, prog="vla-foundry quickstart")
    if len(params.stages) > 1:
        # before the first stage, whose minutes would else be for nothing
        require_renderer(may_install=params.install_system_packages)
    console = Console(soft_wrap=True, highlight=False)
    output_dir = Path(params.output_dir)
    stages = [_STAGES[name](output_dir, params) for name in params.stages]
    steps = [step for stage in stages for step in stage.steps]
    run_steps(steps, output_dir / "done", console, overwrite=params.overwrite)
    page = "\n".join(stage.summary.read_text(encoding="utf-8") for stage in stages)
    summary = output_dir / "summary.txt"
    summary.write_text(page, encoding="utf-8")
    console.print(f"\n{page}", markup=False)
    console.print(f"All done. Everything is in {output_dir}; this summary is in {summary}.")
