"""The stages come in order, their steps are public commands, and a missing renderer is reported first."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from vla_foundry.cli import usage
from vla_foundry.params.commands.runs import QuickstartParams
from vla_foundry.quickstart.command import (
    create_llm_stage,
    create_vla_stage,
    create_vlm_stage,
    main,
    opening_command,
    require_renderer,
)
from vla_foundry.quickstart.steps import FULL, Sizes, Stage


def test_stages_come_in_order_from_the_first() -> None:
    assert QuickstartParams(stages=["llm"]).stages == ["llm"]
    for wrong in (["vlm"], ["vlm", "llm"], ["llm", "llm"]):
        with pytest.raises(ValueError, match=r"stages \[.*\] must begin \[llm"):
            QuickstartParams(stages=wrong)
    with pytest.raises(ValueError, match="stages 'policy' is unknown"):
        QuickstartParams(stages=["llm", "policy"])
    with pytest.raises(ValueError, match="stages is empty"):
        QuickstartParams(stages=[])


def test_the_output_is_on_this_machine() -> None:
    with pytest.raises(ValueError, match="output_dir s3://b/x must be a folder of this machine"):
        main(["--output_dir", "s3://b/x"])


def test_ablations_are_of_the_policy() -> None:
    with pytest.raises(ValueError, match="ablations is true, but stages has no vla"):
        QuickstartParams(stages=["llm", "vlm"], ablations=True)


def test_no_two_steps_share_a_marker_and_each_command_is_public(tmp_path: Path) -> None:
    stages = all_stages(tmp_path, Sizes())
    steps = [step for stage in stages for step in stage.steps]
    assert len({step.name for step in steps}) == len(steps)
    commands = {step.words[0] for step in steps if step.words}
    assert commands == {"preprocess", "train", "generate", "scenes", "caption", "demos", "evaluate", "action-error"} | {
        "report"
    }
    assert all(f"\n  {command} " in usage() for command in commands)


def all_stages(folder: Path, sizes: Sizes) -> list[Stage]:
    return [
        create_llm_stage(folder, sizes),
        create_vlm_stage(folder, sizes),
        create_vla_stage(folder, sizes, ablations=True),
    ]


def test_full_trains_each_model_on_more(tmp_path: Path) -> None:
    small, full = (
        {step.name: step.words for stage in all_stages(tmp_path, sizes) for step in stage.steps}
        for sizes in (Sizes(), FULL)
    )
    changed = {name: full[name] for name in full if full[name] != small[name]}
    samples = {
        name: words[words.index("--total_train_samples") + 1]
        for name, words in changed.items()
        if "--total_train_samples" in words
    }
    assert samples == {"train_llm": "2400", "train_vla": "45000", "train_from_nothing": "45000"}
    assert changed.keys() - samples.keys() == {"scenes", "demos"}


def test_the_command_that_opens_the_page_is_that_of_the_system() -> None:
    page = Path("my results/report.html")
    assert opening_command(page, "linux") == "xdg-open 'my results/report.html'"
    assert opening_command(page, "darwin").startswith("open ")


class System:
    """A system that has a renderer once a command was run."""

    def __init__(self, *, has_renderer: bool, exit_code: int = 0) -> None:
        self.has_renderer = has_renderer
        self.exit_code = exit_code
        self.commands: list[list[str]] = []

    def find(self) -> str:
        if not self.has_renderer:
            raise ValueError("neither EGL nor OSMesa")
        return "osmesa"

    def run(self, words: Sequence[str]) -> int:
        self.commands.append(list(words))
        self.has_renderer = self.exit_code == 0
        return self.exit_code


def test_nothing_is_installed_where_there_is_a_renderer() -> None:
    system = System(has_renderer=True)
    require_renderer(may_install=True, find=system.find, run=system.run)
    assert system.commands == []


def test_a_missing_renderer_is_asked_for_with_the_command_that_installs_it() -> None:
    system = System(has_renderer=False)
    with pytest.raises(
        ValueError, match=r"apt-get install --yes libosmesa6`, or let .* --install_system_packages true"
    ):
        require_renderer(may_install=False, find=system.find, run=system.run)
    assert system.commands == []


def test_it_is_installed_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    system = System(has_renderer=False)
    require_renderer(may_install=True, find=system.find, run=system.run)
    assert [words[-2:] for words in system.commands] == [["--yes", "libosmesa6"]]
    failing = System(has_renderer=False, exit_code=100)
    with pytest.raises(ValueError, match="failed"):
        require_renderer(may_install=True, find=failing.find, run=failing.run)
