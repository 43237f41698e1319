"""Each step of the quickstart is done once, again if it changed, and goes on after an interruption."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from vla_foundry.quickstart.steps import Step, StepFailedError, run_steps


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def counting_step(folder: Path, name: str, what: str = "count") -> tuple[Step, list[str]]:
    calls: list[str] = []
    output = folder / name / "out.txt"

    def work() -> None:
        calls.append(name)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(name, encoding="utf-8")

    return Step(name=name, what=what, function=work, outputs=(output,), folder=output.parent), calls


def test_a_done_step_is_kept(tmp_path: Path, console: Console) -> None:
    step, calls = counting_step(tmp_path, "one")
    for _ in range(2):
        run_steps([step], tmp_path / "done", console, overwrite=False)
    assert calls == ["one"]
    assert "done before" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_step_whose_output_is_gone_is_done_again(tmp_path: Path, console: Console) -> None:
    step, calls = counting_step(tmp_path, "one")
    run_steps([step], tmp_path / "done", console, overwrite=False)
    step.outputs[0].unlink()
    run_steps([step], tmp_path / "done", console, overwrite=False)
    assert calls == ["one", "one"]


def test_overwrite_does_every_step_again_in_an_empty_folder(tmp_path: Path, console: Console) -> None:
    step, calls = counting_step(tmp_path, "one")
    run_steps([step], tmp_path / "done", console, overwrite=False)
    (tmp_path / "one" / "stale.txt").write_text("old", encoding="utf-8")
    run_steps([step], tmp_path / "done", console, overwrite=True)
    assert calls == ["one", "one"]
    assert not (tmp_path / "one" / "stale.txt").exists()


def test_a_changed_step_and_all_after_it_start_from_nothing(tmp_path: Path, console: Console) -> None:
    later, calls = counting_step(tmp_path, "later")
    first = Step(name="first", what="help", words=("--help",))
    run_steps([first, later], tmp_path / "done", console, overwrite=False)
    (tmp_path / "later" / "stale.txt").write_text("old", encoding="utf-8")
    changed = Step(name="first", what="help", words=("help",))
    run_steps([changed, later], tmp_path / "done", console, overwrite=False)
    assert calls == ["later", "later"]
    assert not (tmp_path / "later" / "stale.txt").exists()


def test_an_interrupted_step_keeps_what_it_had(tmp_path: Path, console: Console) -> None:
    partial = tmp_path / "one" / "partial.txt"

    def interrupted() -> None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if not partial.exists():
            partial.write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    step = Step(name="one", what="stop", function=interrupted, outputs=(partial,), folder=partial.parent)
    with pytest.raises(KeyboardInterrupt):
        run_steps([step], tmp_path / "done", console, overwrite=False)
    run_steps([step], tmp_path / "done", console, overwrite=False)
    assert partial.read_text(encoding="utf-8") == "half"


def test_a_failed_command_stops_the_quickstart(tmp_path: Path, console: Console, capfd: pytest.CaptureFixture) -> None:
    later, calls = counting_step(tmp_path, "later")
    bad = Step(name="bad", what="fail", words=("no_such_command",))
    with pytest.raises(StepFailedError, match="'bad' ended with code 2"):
        run_steps([bad, later], tmp_path / "done", console, overwrite=False)
    assert calls == []
    assert "no_such_command" in capfd.readouterr().err
