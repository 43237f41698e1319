"""`vla-foundry quickstart`: run the stages and show what came of them."""

import os
from pathlib import Path

from rich.console import Console

from vla_foundry.params.command_line import parse_command
from vla_foundry.params.quickstart import QuickstartParams
from vla_foundry.quickstart.llm import generate_step, llm_steps
from vla_foundry.quickstart.report import write_llm_report
from vla_foundry.quickstart.stages import Step, run_steps


def main(argv: list[str]) -> None:
    """Run `vla-foundry quickstart`.

    Args:
        argv: the words after the command.

    Raises:
        ValueError: a word is wrong, or a step failed.
    """
    params = parse_command(QuickstartParams, argv, prog="vla-foundry quickstart")
    console = Console(soft_wrap=True, highlight=False)
    output_dir = Path(params.output_dir)
    llm = output_dir / "llm"
    summary, figure = llm / "summary.txt", llm / "loss.png"
    report = Step(
        name="report",
        what="Compare with a model that ignores context",
        function=lambda: write_llm_report(llm / "runs" / "llm", summary=summary, figure=figure),
        outputs=(summary, figure),
    )
    steps = [*llm_steps(llm, num_processes=os.cpu_count() or 1), report, generate_step(llm)]
    run_steps(steps, llm / "done", console, overwrite=params.overwrite)
    console.print(f"\n{summary.read_text(encoding='utf-8')}", markup=False)
    console.print(f"All done. Everything is in {output_dir}; this summary is in {summary}.")
