"""Each step of the quickstart is done once, again if it changed, and goes on after an interruption."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from vla_foundry.quickstart.steps import Step, StepFailedError, _Clock, count_trainers, run_steps


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


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["out.txt", "model.pt"])
def test_what_no_quickstart_made_stays(tmp_path: Path, console: Console, name: str, *, overwrite: bool) -> None:
    (first, calls), (second, _) = counting_step(tmp_path, "one"), counting_step(tmp_path, "two")
    mine = tmp_path / "two" / name
    mine.parent.mkdir()
    # an empty folder is nobody's
    run_steps([first], tmp_path / "done", console, overwrite=False)
    mine.write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match=r"two is not of an earlier quickstart, .*'two'.* another --output_dir"):
        run_steps([first, second], tmp_path / "done", console, overwrite=overwrite)
    assert calls == ["one"]
    assert mine.read_text(encoding="utf-8") == "precious"


def test_the_first_quickstart_overwrites_no_file(tmp_path: Path, console: Console) -> None:
    page = tmp_path / "report.html"
    step = Step(name="page", what="write", function=lambda: page.write_text("new", encoding="utf-8"), outputs=(page,))
    page.write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match=r"report.html is not of an earlier quickstart"):
        run_steps([step], tmp_path / "done", console, overwrite=False)
    page.unlink()
    run_steps([step], tmp_path / "done", console, overwrite=False)
    # a file that the earlier version's step of another name wrote
    run_steps([replace(step, name="page_2")], tmp_path / "done", console, overwrite=False)
    assert page.read_text(encoding="utf-8") == "new"


def test_a_full_disk_is_named(tmp_path: Path, console: Console) -> None:
    def fill() -> None:
        with Path("/dev/full").open("w", encoding="utf-8") as file:
            file.write("text")

    step = Step(name="one", what="fill", function=fill, outputs=(tmp_path / "a" / "x", tmp_path / "a" / "y"))
    with pytest.raises(OSError, match="No space left") as caught:
        run_steps([step], tmp_path / "done", console, overwrite=False)
    assert caught.value.filename == str(tmp_path / "a")


@pytest.mark.parametrize(("gpus", "cores", "trainers"), [(0, 4, 4), (0, 6, 4), (1, 16, 1), (8, 64, 8)])
def test_one_process_trains_per_gpu_or_else_per_core(
    monkeypatch: pytest.MonkeyPatch, gpus: int, cores: int, trainers: int
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("vla_foundry.quickstart.steps.num_cores", lambda: cores)
    assert count_trainers() == trainers


def test_the_progress_line_covers_all_steps(tmp_path: Path, console: Console) -> None:
    steps = [
        Step(name=name, what=name, seconds=seconds, function=lambda: None) for name, seconds in (("a", 30), ("b", 90))
    ]
    run_steps(steps, tmp_path / "done", console, overwrite=False)
    run_steps(
        [*steps, Step(name="c", what="c", seconds=120, function=lambda: None)],
        tmp_path / "done",
        console,
        overwrite=False,
    )
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    lines = [line.strip() for line in text.splitlines() if "[quickstart" in line]
    # the first two are skipped in the second run
    assert [line.split()[1] for line in lines] == ["0%", "25%", "50%"]
    assert lines[0] == "[quickstart 0% after 0.0 min, about 2 min left]"


def test_a_step_runs_again_if_what_it_writes_changes(tmp_path: Path, console: Console) -> None:
    step, calls = counting_step(tmp_path, "one")
    for text in ("a", "a", "b"):
        run_steps([replace(step, text=text)], tmp_path / "done", console, overwrite=False)
    assert calls == ["one", "one"]


def test_a_failed_command_stops_the_quickstart(tmp_path: Path, console: Console, capfd: pytest.CaptureFixture) -> None:
    later, calls = counting_step(tmp_path, "later")
    bad = Step(name="bad", what="fail", words=("no_such_command",))
    with pytest.raises(StepFailedError, match="'bad' ended with code 2"):
        run_steps([bad, later], tmp_path / "done", console, overwrite=False)
    assert calls == []
    assert "no_such_command" in capfd.readouterr().err


def test_training_says_itself_how_far_it_is(tmp_path: Path, console: Console) -> None:
    metrics = tmp_path / "metrics.jsonl"
    step = Step(name="train", what="train", seconds=600, metrics=metrics, last_step=100, words=("--help",))
    clock = _Clock([step], console)
    for number in (1, 50):
        metrics.write_text(f'{{"step": {number}}}\n', encoding="utf-8")
        clock.show()
    metrics.write_text('{"step": ', encoding="utf-8")
    clock.show()
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert [line.split()[1] for line in lines] == ["1%", "50%", "0%"]
    # half of ten minutes in no time: the rest takes little
    assert lines[1].endswith("less than a minute left]")
