"""Demonstrations: labelled by the expert, independent of processes, resumed without a trace, refused in one line."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from gymnasium.spaces import Box
from PIL import Image
from pyarrow import parquet

from tests.essential.processes import is_group_running
from vla_foundry.datagen import demos
from vla_foundry.datagen.demos import main, record_demos, record_episode
from vla_foundry.params.commands.datagen import DemosParams
from vla_foundry.params.commands.preprocessing_robotics import LeRobotParams
from vla_foundry.preprocessing.robotics.converters.lerobot import LeRobotConverter
from vla_foundry.run_folder import lock_folder
from vla_foundry.simulators import Simulator, register_simulator
from vla_foundry.simulators.metaworld_tasks import INSTRUCTIONS, instructions_of

TASKS = ["drawer-close-v3@half", "button-press-topdown-v3"]
IMAGE = "observation.images.workspace"
PARTS = ("displacement", "gripper")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_rows(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob(pattern)) for row in parquet.read_table(path).to_pylist()]


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta/demos.json").read_text(encoding="utf-8"))


class Slider(Simulator):
    """A point on a line that is to be brought to 1; some starts stop it half-way for good."""

    instruction, instructions = "slide up", ("slide up", "move to the top")
    robot, fps, action_names = "slider", 10, ("dx", "gripper")
    action_space = Box(-1, 1, (2,), np.float32)
    field_names = {"place": ("x",), "seed": ("low", "high")}
    max_steps = 30

    @classmethod
    def defaults(cls, **source: str) -> tuple[tuple[str, ...], str]:
        return (), "front"

    def __init__(self, task: str, *, cameras: Sequence[str], image_size: tuple[int, int]) -> None:
        if task not in ("easy", "hard", "impossible"):
            raise ValueError(f"slider task '{task}' is unknown.")
        self.task, self.cameras, self.image_size = task, tuple(cameras), image_size
        self.applied: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        assert seed is not None
        self.place, self.seed = np.float32(seed % 7 / 20), seed
        self.is_stuck = self.task == "impossible" or (self.task == "hard" and seed % 2 == 0)
        return self.observe(), {"success": False}

    def sense(self) -> dict[str, np.ndarray]:
        return {
            "place": np.array([self.place], np.float32),
            "seed": np.array([self.seed % 1024, self.seed // 1024 % 1024], np.float32),
        }

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.applied.append(action)
        if not (self.is_stuck and self.place > 0.5):
            self.place = np.float32(self.place + 0.1 * np.clip(action[0], -1, 1))
        return self.observe(), 0.0, False, False, {"success": bool(self.place >= 1)}

    def render(self, camera: str | None = None) -> np.ndarray:
        return np.full((*self.image_size, 3), int(np.clip(self.place, 0, 1) * 200), np.uint8)

    def expert(self) -> np.ndarray:
        return np.array([1.0 if self.place < 1 else 0.0, -1.0], np.float32)


register_simulator("test-slider")(Slider)


def slider_params(folder: Path, **values: Any) -> DemosParams:
    given: dict[str, Any] = {"tasks": ["easy", "hard"], "episodes": 4, "image_size": 16, "cameras": ["front"]}
    given |= {"simulator": "test-slider", "num_workers": 0, "output_dir": str(folder)}
    return DemosParams(**given | values)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of two episodes, recorded in this process."""
    pytest.importorskip("metaworld", reason="needs vla-foundry[simulators]")
    folder = tmp_path_factory.mktemp("demos") / "set"
    record_demos(metaworld_params(folder))
    return folder


def metaworld_params(folder: Path, **values: Any) -> DemosParams:
    given: dict[str, Any] = {"tasks": TASKS, "episodes": 2, "image_size": 48, "num_workers": 0}
    return DemosParams(**given | {"output_dir": str(folder)} | values)


def test_the_set_holds_frames_of_all_episodes_task_by_turn(made: Path) -> None:
    report, rows = read_report(made), read_rows(made, "data/*/*.parquet")
    table = read_rows(made, "meta/episodes/*/*.parquet")
    texts = [row["__index_level_0__"] for row in read_rows(made, "meta/tasks.parquet")]
    variants = json.loads((made / "meta/instructions.json").read_text(encoding="utf-8"))["variants"]
    assert [episode["task"] for episode in report["episodes"]] == TASKS * 2
    start = 0
    for number, (row, episode) in enumerate(zip(table, report["episodes"], strict=True)):
        frames = rows[start : start + row["length"]]
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (start, start + len(frames))
        assert row["length"] == episode["frames"] > 20
        assert {frame["episode_index"] for frame in frames} == {number}
        assert [frame["frame_index"] for frame in frames] == list(range(len(frames)))
        assert {texts[frame["task_index"]] for frame in frames} == {episode["instruction"]} == set(row["tasks"])
        assert tuple(variants[episode["instruction"]]) == instructions_of(episode["task"].partition("@")[0])
        start += len(frames)
    assert start == len(rows)


def test_frames_show_what_the_robot_saw_and_felt(made: Path) -> None:
    info = json.loads((made / "meta/info.json").read_text(encoding="utf-8"))
    assert (info["fps"], info["robot_type"]) == (80, "sawyer")
    assert info["features"]["action"]["names"] == ["dx", "dy", "dz", "gripper"]
    rows = read_rows(made, "data/*/*.parquet")
    for row in rows:
        state = np.array(row["observation.state"], np.float32)
        np.testing.assert_array_equal(state[:3], np.array(row["observation.end_effector_position"], np.float32))
        assert state[3] == np.float32(row["observation.gripper_opening"])
        assert np.abs(row["action"]).max() <= 1
        # metres, within the robot's reach
        assert -0.6 < state[0] < 0.6
        assert 0.3 < state[1] < 1.1
        assert 0 <= state[3] <= 1
    first = [row for row in rows if row["episode_index"] == 0]
    images = [np.array(Image.open(io.BytesIO(row[IMAGE]["bytes"]))) for row in first]
    assert images[0].shape == (48, 48, 3)
    assert images[0].std() > 20
    assert (images[0] != images[-1]).any()


@pytest.mark.slow
def test_processes_do_not_change_a_byte(made: Path, tmp_path: Path) -> None:
    record_demos(metaworld_params(tmp_path / "set", num_workers=4))
    assert contents(tmp_path / "set") == contents(made)


def test_an_episode_does_not_depend_on_which_others_there_are(made: Path, tmp_path: Path) -> None:
    record_demos(metaworld_params(tmp_path / "set", tasks=[TASKS[1]], episodes=1))
    columns = (IMAGE, "observation.state", "action")
    alone = [[row[name] for name in columns] for row in read_rows(tmp_path / "set", "data/*/*.parquet")]
    among = read_rows(made, "data/*/*.parquet")
    assert alone == [[row[name] for name in columns] for row in among if row["episode_index"] == 1]


def test_a_video_shows_the_same_frames(made: Path, tmp_path: Path) -> None:
    record_demos(metaworld_params(tmp_path / "set", tasks=[TASKS[0]], episodes=1, video=True))
    (path,) = (tmp_path / "set").glob(f"videos/{IMAGE}/*/*.mp4")
    with av.open(str(path)) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    rows = [row for row in read_rows(made, "data/*/*.parquet") if row["episode_index"] == 0]
    assert len(found) == len(rows)
    for image, row in zip(found, rows, strict=True):
        expected = np.array(Image.open(io.BytesIO(row[IMAGE]["bytes"]))).astype(float)
        # colour is kept at half the resolution
        assert np.abs(image.mean(axis=2) - expected.mean(axis=2)).mean() < 5
        assert np.abs(image - expected).mean() < 10


@pytest.mark.parametrize("field_map", [None, "field_maps/metaworld.yaml"])
def test_the_converter_of_lerobot_sets_reads_the_same(made: Path, tmp_path: Path, field_map: str | None) -> None:
    params = LeRobotParams(source_episodes=[str(made)], output_dir=str(tmp_path), field_map=field_map)
    converter = LeRobotConverter(params)
    refs = converter.discover_episodes()
    rows = read_rows(made, "data/*/*.parquet")
    assert [ref.num_frames for ref in refs] == [episode["frames"] for episode in read_report(made)["episodes"]]
    for number, ref in enumerate(refs):
        episode = converter.read_episode(ref)
        own = [row for row in rows if row["episode_index"] == number]
        np.testing.assert_allclose(episode.timestamps, np.arange(len(own)) / 80, atol=1e-6)
        actions = np.array([row["action"] for row in own], np.float32)
        fields = episode.fields
        found = fields["action"] if field_map is None else np.hstack([fields[f"action.{n}"] for n in PARTS])
        np.testing.assert_array_equal(found, actions)
        positions = np.array([row["observation.end_effector_position"] for row in own], np.float32)
        np.testing.assert_array_equal(fields["observation.end_effector_position"], positions)
        assert list(episode.cameras[IMAGE].read()) == [row[IMAGE]["bytes"] for row in own]
        (span,) = episode.instructions
        assert (span.start, span.end, span.texts["original"]) == (0, len(own), [ref.task])
    representations = {name: one.representation for name, one in converter.describe_fields().items()}
    assert field_map is None or representations["action.displacement"] == "delta"


def wait_for_episode(folder: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until one episode is finished, of several."""
    while not list(folder.glob("_progress/episodes/episode-*")):
        assert process.poll() is None
        time.sleep(0.02)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    command = [sys.executable, "-m", "vla_foundry.cli", "demos", "--tasks", ",".join(TASKS), "--episodes", "2"]
    command += ["--image_size", "48", "--num_workers", "1", "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_episode(folder, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "meta").exists()
    # the process that records does not outlive its parent
    deadline = time.monotonic() + 20
    while is_group_running(process.pid):
        assert time.monotonic() < deadline, "a recording process lives on"
        time.sleep(0.05)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("_progress/episodes/episode-*")}
    assert 0 < len(kept) < 4
    assert sum(numbers["episodes"] for numbers in record_demos(metaworld_params(folder))["tasks"].values()) == 4
    assert contents(folder) == contents(made)


@pytest.mark.parametrize("function", ["os.rename", "os.replace", "shutil.rmtree"])
def test_a_run_that_ends_at_any_call_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Every call that changes names is the last one of a run, in turn, before and after it is made."""
    record_demos(slider_params(tmp_path / "whole", episodes=1))
    expected = contents(tmp_path / "whole")
    module, _, name = function.partition(".")
    original = getattr(sys.modules[module], name)
    is_whole = False
    for stop in range(40):
        folder = tmp_path / f"set-{stop}"
        calls = iter(range(1000))

        def call(*words: Any, calls: Any = calls, stop: int = stop, **options: Any) -> Any:
            is_last = next(calls) == stop // 2
            if is_last and stop % 2:
                raise KeyboardInterrupt
            result = original(*words, **options)
            if is_last:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(sys.modules[module], name, call)
        try:
            record_demos(slider_params(folder, episodes=1))
            is_whole = True
        except KeyboardInterrupt:
            is_whole = False
        monkeypatch.setattr(sys.modules[module], name, original)
        if not is_whole:
            record_demos(slider_params(folder, episodes=1))
        assert contents(folder) == expected
        if is_whole:
            break
    assert is_whole
    assert stop > 2


def test_the_label_is_what_the_expert_wanted_and_noise_is_what_it_got(tmp_path: Path) -> None:
    record_demos(slider_params(tmp_path / "set", tasks=["easy"], episodes=8))
    rows = read_rows(tmp_path / "set", "data/*/*.parquet")
    assert {tuple(row["action"]) for row in rows} == {(1.0, -1.0), (0.0, -1.0)}
    places = [row["observation.place"] for row in rows]
    moves = [b - a for a, b, row in zip(places, places[1:], rows, strict=False) if row["frame_index"] == 0]
    assert np.std(moves) > 0
    # five frames past the first one that succeeds
    for number in range(8):
        of_episode = [row["observation.place"] for row in rows if row["episode_index"] == number]
        assert [place >= 1 for place in of_episode].index(True) == len(of_episode) - 5


def test_noise_has_the_asked_deviation_and_lasts_a_while(tmp_path: Path) -> None:
    simulator = Slider("impossible", cameras=("front",), image_size=(16, 16))
    simulator.max_steps = 2000
    params = slider_params(tmp_path / "set", action_noise=0.3, max_attempts=1)
    with pytest.raises(ValueError, match="failed in all 1 attempts"):
        record_episode(simulator, params, task="impossible", number=0, path=tmp_path / "episode")
    noise = np.stack(simulator.applied) - np.array([1, -1])
    assert noise.std(axis=0) == pytest.approx([0.3, 0.09], rel=0.1)
    assert np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1] == pytest.approx(0.7, abs=0.05)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.1


def test_failed_episodes_are_tried_from_other_starts_and_counted(tmp_path: Path) -> None:
    report = record_demos(slider_params(tmp_path / "set", episodes=8))
    for episode in report["episodes"]:
        stuck = [seed for seed in (*episode["failed_seeds"], episode["seed"]) if seed % 2 == 0]
        assert episode["failed_seeds"] == (stuck if episode["task"] == "hard" else [])
    hard = report["tasks"]["hard"]
    assert hard["episodes"] == 8
    assert hard["attempts"] == 8 + sum(len(episode["failed_seeds"]) for episode in report["episodes"]) > 8
    rows = read_rows(tmp_path / "set", "data/*/*.parquet")
    seeds = {row["episode_index"]: row["observation.seed"] for row in rows}
    assert [seeds[n] for n in range(16)] == [[e["seed"] % 1024, e["seed"] // 1024 % 1024] for e in report["episodes"]]


def test_instructions_are_drawn_by_seed(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        folder = tmp_path / f"set-{len(drawn)}"
        report = record_demos(slider_params(folder, tasks=["easy"], episodes=12, seed=seed))
        drawn.append([(episode["instruction"], episode["seed"]) for episode in report["episodes"]])
        assert {text for text, _ in drawn[-1]} == {"slide up", "move to the top"}
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_two_tasks_share_an_instruction() -> None:
    told = [text for name in INSTRUCTIONS for text in instructions_of(name)]
    assert len(set(told)) == len(told) == 6 * 50
    assert all(instructions_of(name)[0] == text for name, text in INSTRUCTIONS.items())


def test_a_whole_set_is_left_alone_and_another_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    words = ["--simulator", "test-slider", "--tasks", "easy,hard", "--cameras", "front", "--image_size", "16"]
    words += ["--output_dir", str(folder), "--num_workers", "0", "--episodes", "2"]
    main(words)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("easy: 2 of 2 attempts succeeded (100%), ")
    assert "4 episodes" in printed[2]
    assert "frames/s" in printed[2]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    main(words)
    assert "recorded before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    with pytest.raises(ValueError, match=r"made with other settings \(episodes 2 -> 3; seed 0 -> 5\)"):
        main([*words[:-1], "3", "--seed", "5"])


def test_an_unfinished_set_of_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demos, "_publish", stop)
        with pytest.raises(KeyboardInterrupt):
            record_demos(slider_params(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"made with other settings \(action_noise 0.2 -> 0.1\)"):
        record_demos(slider_params(tmp_path / "set", action_noise=0.1))


def test_a_set_that_another_process_records_is_left_alone(tmp_path: Path) -> None:
    held = lock_folder(tmp_path / "set", what="dataset", flag="--output_dir")
    message = rf"dataset .*set is in use by process {os.getpid()} on .*choose another --output_dir"
    with held, pytest.raises(ValueError, match=message):
        record_demos(slider_params(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds other files\. Choose a new folder"):
        record_demos(slider_params(tmp_path))
    assert (tmp_path / "data" / "mine.txt").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unknown_names_are_said_before_anything_is_written(tmp_path: Path, num_workers: int) -> None:
    pytest.importorskip("metaworld", reason="needs vla-foundry[simulators]")
    folder = tmp_path / "set"
    params = metaworld_params(folder, tasks=["drawer-open-v4"], num_workers=num_workers)
    with pytest.raises(ValueError, match=r"metaworld task 'drawer-open-v4' is unknown\. Did you mean 'drawer-open-v3'"):
        record_demos(params)
    if num_workers == 0:
        with pytest.raises(ValueError, match=r"camera 'workplace' is unknown\. Did you mean 'workspace'"):
            record_demos(metaworld_params(folder, cameras=["workplace"]))
        with pytest.raises(ValueError, match="simulator 'metawold' is unknown"):
            record_demos(metaworld_params(folder, simulator="metawold"))
    assert not folder.exists()


def test_an_expert_that_never_succeeds_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    params = slider_params(tmp_path / "set", tasks=["easy", "impossible"], max_attempts=2)
    with pytest.raises(ValueError, match=r"expert of 'impossible' failed in all 2 attempts at episode 0\. Lower"):
        record_demos(params)
    assert len(list((tmp_path / "set").glob("_progress/episodes/episode-*"))) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"episodes": 0}, r"episodes \(0\) must be at least 1"),
        ({"tasks": ["easy", "easy"]}, "tasks must hold each name once"),
        ({"cameras": ["front", "front"]}, "each name once, got"),
        ({"action_noise": 1.5}, r"action_noise \(1.5\) must be at least 0 and at most 1"),
        ({"output_dir": "s3://bucket/demos"}, "output_dir must be a local folder"),
        ({"num_workers": -1}, r"num_workers \(-1\) must be at least 0"),
        ({"image_size": 8}, r"image_size \(8\) must be at least 16"),
    ],
)
def test_params_that_cannot_be_are_one_line(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    good = asdict(slider_params(tmp_path))
    with pytest.raises(ValueError, match=message):
        DemosParams(**good | values)


def test_a_video_of_odd_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="17 x 17 pixels: a video's width and height must be even"):
        record_demos(slider_params(tmp_path / "set", image_size=17, video=True))
    assert not (tmp_path / "set").exists()
