import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.essential.viz.test_inspection import TRAINING
from vla_foundry.cli import main
from vla_foundry.evaluation.pictures import Film

pytest.importorskip("rerun", reason="needs vla-foundry[viewer]")


def print_recording(path: Path, verbosity: str = "-vv") -> str:
    """What rerun itself reads in a recording: each chunk with its entity and columns (-vvv: and values)."""
    program = Path(sys.executable).parent / "rerun"
    done = subprocess.run([program, "rrd", "print", verbosity, path], capture_output=True, text=True, check=True)
    return done.stdout


def read_samples(path: Path) -> dict[int, dict[str, list[str]]]:
    """What a recording holds of each sample: entity -> values, as text."""
    samples: dict[int, dict[str, list[str]]] = defaultdict(dict)
    entity = ""
    for line in print_recording(path, "-vvv").splitlines():
        if line.startswith("Chunk("):
            entity = line.split(" - ")[1]
        cells = [cell.strip(" │") for cell in line.split("┆")]
        if entity.startswith("/robotics/") and cells[0].startswith("row_"):
            samples[int(cells[2])][entity] = cells[3:]
    return samples


def test_episodes_hold_every_frame_and_field(robot_data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.rrd"
    main(["view", str(robot_data.folder), "--first", "1", "--count", "5", "--output", str(output)])
    assert capsys.readouterr().out == f"{output}: episodes episode_1; see it with: rerun {output}\n"
    text = print_recording(output)
    for entity in ("cameras/front", "cameras/wrist", "fields/action.arm", "fields/state", "instruction"):
        assert f"/episode_1/{entity}" in text
    assert "/episode_0/" not in text
    assert "8 rows" in text


def test_samples_from_a_number_on_are_those_of_a_recording_from_the_start(robot_data, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        TRAINING.replace("MANIFEST", str(robot_data.folder / "manifest.jsonl")), encoding="utf-8"
    )
    found = []
    for first, count in ((0, 7), (5, 2)):
        output = tmp_path / f"from_{first}.rrd"
        main(["view", str(tmp_path), "--first", str(first), "--count", str(count), "--output", str(output)])
        found.append(read_samples(output))
    everything, part = found
    assert [sorted(samples) for samples in found] == [list(range(7)), [5, 6]]
    assert {number: everything[number] for number in part} == part
    assert len({str(values["/robotics/actions/0"]) for values in everything.values()}) == 7


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
