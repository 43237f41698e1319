"""`vla-foundry quickstart`: run the stages and show their results."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.runs import QuickstartParams
from vla_foundry.quickstart.llm import create_llm_stage
from vla_foundry.quickstart.report import PAGE_NAME, write_page
from vla_foundry.quickstart.steps import FULL, Sizes, Stage, Step, run_steps
from vla_foundry.quickstart.vla import create_vla_stage
from vla_foundry.quickstart.vlm import create_vlm_stage
from vla_foundry.run_folder import lock_folder
from vla_foundry.simulators.mujoco_renderer import choose_opengl
from vla_foundry.storage.uri import is_remote

# installs a renderer that needs no GPU, on Debian and Ubuntu
_INSTALL = ("apt-get", "install", "--yes", "libosmesa6")
# the results of all stages as text
_SUMMARY_NAME = "summary.txt"

_STAGES: dict[str, Callable[[Path, Sizes, QuickstartParams], Stage]] = {
    "llm": lambda output_dir, sizes, _: create_llm_stage(output_dir, sizes),
    "vlm": lambda output_dir, sizes, _: create_vlm_stage(output_dir, sizes),
    "vla": lambda output_dir, sizes, params: create_vla_stage(output_dir, sizes, ablations=params.ablations),
}


def main(argv: list[str]) -> None:
    """Run `vla-foundry quickstart`.

    Raises:
        ValueError: an argument is wrong, a step failed, or another process uses the output folder.
    """
    params = parse_command(QuickstartParams, argv, prog="vla-foundry quickstart")
    if is_remote(params.output_dir):
        raise ValueError(f"output_dir {params.output_dir} must be a folder of this machine. Give its path.")
    if len(params.stages) > 1:
        # check first, because the stages before it take minutes
        require_renderer(may_install=params.install_system_packages)
    console = Console(soft_wrap=True, highlight=False)
    output_dir = Path(params.output_dir)
    sizes = FULL if params.full else Sizes()
    stages = [_STAGES[name](output_dir, sizes, params) for name in params.stages]
    markers = output_dir / "done"
    with lock_folder(output_dir, what="quickstart folder", flag="--output_dir"):
        run_steps(with_pages(stages, output_dir, markers), markers, console, overwrite=params.overwrite)
    summary = output_dir / _SUMMARY_NAME
    console.print(f"\n{summary.read_text(encoding='utf-8')}", markup=False)
    console.print(f"All done. Everything is in {output_dir}; this summary is in {summary}.")
    page = output_dir / PAGE_NAME
    console.print(
        f"The report, on one page: curves, captions, episodes, times.\nOpen it: {opening_command(page)}", markup=False
    )


def with_pages(stages: Sequence[Stage], output_dir: Path, markers: Path) -> list[Step]:
    """Return the steps of all stages, each followed by one that writes the report of what is there so far.

    The last step joins the stages' summaries.
    """
    steps: list[Step] = []
    for stage in stages:
        steps += stage.steps
        page = Step(
            name=f"page_{stage.summary.parent.name}",
            what=f"Write the report so far: {output_dir / PAGE_NAME}",
            seconds=3,
            function=partial(write_page, output_dir, tuple(steps), markers),
            outputs=(output_dir / PAGE_NAME,),
            is_repeated=True,
        )
        steps.append(page)
    summary = output_dir / _SUMMARY_NAME
    last = Step(
        name="summary",
        what=f"Join the summaries: {summary}",
        function=lambda: summary.write_text(
            "\n".join(stage.summary.read_text(encoding="utf-8") for stage in stages), encoding="utf-8"
        ),
        outputs=(summary,),
        is_repeated=True,
    )
    return [*steps, last]


def opening_command(page: Path, platform: str = sys.platform) -> str:
    """Return the command that opens a page in this system's browser."""
    opener = {"darwin": "open", "win32": "start"}.get(platform, "xdg-open")
    return shlex.join((opener, str(page)))


def require_renderer(
    *,
    may_install: bool,
    find: Callable[[], str] = lambda: choose_opengl(dict(os.environ)),
    run: Callable[[Sequence[str]], int] = lambda words: subprocess.run(words, check=False).returncode,
) -> None:
    """Make sure that simulators can render.

    Args:
        may_install: install a missing renderer as root.
        find: returns the name of a renderer, or raises ValueError.
        run: runs a command and returns its exit code.

    Raises:
        ValueError: no renderer is installed, and installing one is not allowed or failed.
    """
    try:
        find()
        return
    except ValueError as error:
        command = _INSTALL if os.geteuid() == 0 or shutil.which("sudo") is None else ("sudo", *_INSTALL)
        if not may_install:
            raise ValueError(
                f"No OpenGL renderer was found to draw the simulator. Install one with `{' '.join(command)}`, or let "
                "the quickstart do that: --install_system_packages true."
            ) from error
    if shutil.which(_INSTALL[0]) is None or run(command) != 0:
        raise ValueError(f"`{' '.join(command)}` failed. Install OSMesa or EGL by hand.")
    find()
