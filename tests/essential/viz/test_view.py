import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vla_foundry.cli import main
from vla_foundry.evaluation.pictures import Film

pytest.importorskip("rerun", reason="needs vla-foundry[viewer]")


def print_recording(path: Path) -> str:
    """What rerun itself reads in a recording: each chunk with its entity and columns."""
    program = Path(sys.executable).parent / "rerun"
    done = subprocess.run([program, "rrd", "print", "-vv", path], capture_output=True, text=True, check=True)
    return done.stdout


def test_episodes_hold_every_frame_and_field(robot_data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.rrd"
    main(["view", str(robot_data.folder), "--first", "1", "--count", "5", "--output", str(output)])
    assert capsys.readouterr().out == f"{output}: episodes episode_1; see it with: rerun {output}\n"
    text = print_recording(output)
    for entity in ("cameras/front", "cameras/wrist", "fields/action.arm", "fields/state", "instruction"):
        assert f"/episode_1/{entity}" in text
    assert "/episode_0/" not in text
    assert "8 rows" in text


def test_rollouts_are_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = Film(fps=10)
    for step in range(4):
        film.add(step, np.full((32, 48, 3), 40 * step, np.uint8))
    (tmp_path / "policy" / "open").mkdir(parents=True)
    (tmp_path / "policy" / "open" / "3.mp4").write_bytes(film.save())
    main(["view", str(tmp_path), "--output", str(tmp_path / "a.rrd")])
    assert "1 of 1 rollouts" in capsys.readouterr().out
    assert "/policy/open/3" in print_recording(tmp_path / "a.rrd")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist. Name a dataset, a training config, a run or rollouts."),
        ([".", "--output", "a.png"], "output 'a.png' must be a .rrd file."),
        (["."], ". holds no dataset, no run and no video."),
    ],
)
def test_errors_are_one_line_and_leave_no_file(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["view", *words])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--first", "9"], "has nothing from number 9 on. Give a smaller --first."),
        (["--output", "/proc/a.rrd"], "error: /proc/.a.rrd"),
    ],
)
def test_a_dataset_that_cannot_be_recorded_leaves_no_file(
    words: list[str], message: str, robot_data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["view", str(robot_data.folder), "--output", str(tmp_path / "a.rrd"), *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
