"""Every way to break a dataset is found and named in one line, by file or episode and what is wrong; none is silent."""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_foundry.params.commands.preprocessing_robotics import LeRobotParams

LENGTHS = [12, 9, 15, 10]
NUM_SEEDS = 10


@dataclass
class Broken:
    """A dataset that is being broken, and what is said of it."""

    root: Path
    random: random.Random
    recordings: ModuleType
    # the episode that is broken
    episode: int
    # flags of the command
    options: dict[str, Any]

    @property
    def camera(self) -> str:
        return sorted(self.recordings.CAMERAS)[self.random.randrange(2)]

    @property
    def frame(self) -> int:
        """A frame of the episode, not the first or the last."""
        return self.random.randrange(2, LENGTHS[self.episode] - 2)

    @property
    def rows(self) -> Path:
        return next(self.root.glob(f"data/*/episode_{self.episode:06d}.parquet"))

    def video(self, camera: str) -> Path:
        return next(self.root.glob(f"videos/*/{camera}/episode_{self.episode:06d}.mp4"))

    def edit_rows(self, change: Callable[[dict[str, list[Any]]], None], path: Path | None = None) -> None:
        """Change the rows of the episode as Python lists."""
        path = path or self.rows
        columns = pq.read_table(path).to_pydict()
        change(columns)
        pq.write_table(pa.table(columns), path)

    def edit_json(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change meta/info.json."""
        path = self.root / "meta/info.json"
        info = json.loads(path.read_text(encoding="utf-8"))
        change(info)
        path.write_text(json.dumps(info), encoding="utf-8")

    def edit_lines(self, name: str, change: Callable[[list[str]], None]) -> None:
        """Change the lines of a table in meta."""
        path = self.root / "meta" / name
        lines = path.read_text(encoding="utf-8").splitlines()
        change(lines)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# each breaks a dataset (the prefix says which kind) and returns a pattern of what must be said
Break = Callable[[Broken], str]
BREAKS: dict[str, Break] = {}


def breaks(function: Break) -> Break:
    BREAKS[function.__name__] = function
    return function


@breaks
def v2_missing_column(broken: Broken) -> str:
    name = broken.random.choice(["observation.state", "action", "timestamp", "task_index", "frame_index"])
    broken.edit_rows(lambda columns: columns.pop(name))
    return rf"{broken.rows}.* has no column '{name}'"


@breaks
def v2_wrong_dtype(broken: Broken) -> str:
    name = broken.random.choice(["observation.state", "action"])
    value = broken.random.choice([1, "one"])
    broken.edit_rows(lambda columns: columns.update({name: [[value] * 8 for _ in columns[name]]}))
    return (
        rf"{broken.rows}: episode {broken.episode}: column '{name}' holds (int64, but .* float32|string, not numbers)"
    )


@breaks
def v2_wrong_shape(broken: Broken) -> str:
    name, width = broken.random.choice(["observation.state", "action"]), broken.random.choice([1, 7, 9])
    broken.edit_rows(lambda columns: columns.update({name: [[0.5] * width for _ in columns[name]]}))
    return rf"{broken.rows}: episode {broken.episode}: column '{name}' holds {width} numbers a row, expected 8"


@breaks
def v2_ragged_rows(broken: Broken) -> str:
    frame = broken.frame
    broken.edit_rows(lambda columns: columns["action"][frame].pop())
    return rf"{broken.rows}: episode {broken.episode}: column 'action' holds rows of 7 to 8 numbers"


@breaks
def v2_null_value(broken: Broken) -> str:
    name, frame = broken.random.choice(["action", "timestamp", "task_index"]), broken.frame
    broken.edit_rows(lambda columns: columns[name].__setitem__(frame, None))
    return rf"{broken.rows}: episode {broken.episode}: column '{name}' holds null"


@breaks
def v2_nan(broken: Broken) -> str:
    frame, column = broken.frame, broken.random.randrange(8)
    broken.edit_rows(lambda columns: columns["observation.state"][frame].__setitem__(column, float("nan")))
    return rf"episode {broken.episode}: field 'observation.state' holds nan at frame {frame}, column {column}"


@breaks
def v2_inf(broken: Broken) -> str:
    frame, column, value = broken.frame, broken.random.randrange(8), broken.random.choice([np.inf, -np.inf])
    broken.edit_rows(lambda columns: columns["action"][frame].__setitem__(column, value))
    return rf"episode {broken.episode}: field 'action' holds {value} at frame {frame}, column {column}"


@breaks
def v2_timestamp_not_finite(broken: Broken) -> str:
    frame = broken.frame
    broken.edit_rows(lambda columns: columns["timestamp"].__setitem__(frame, float("nan")))
    return rf"episode {broken.episode}: the timestamp of frame {frame} is not finite"


@breaks
def v2_duplicate_timestamp(broken: Broken) -> str:
    frame = broken.frame
    broken.edit_rows(lambda columns: columns["timestamp"].__setitem__(frame, columns["timestamp"][frame - 1]))
    return rf"episode {broken.episode}: the timestamp of frame {frame} .* repeats that of the frame before"


@breaks
def v2_reversed_timestamps(broken: Broken) -> str:
    broken.edit_rows(lambda columns: columns["timestamp"].reverse())
    return rf"episode {broken.episode}: the timestamp of frame 1 .* lies before the frame before it"


@breaks
def v2_jittered_timestamps(broken: Broken) -> str:
    frame, jitter = broken.frame, broken.random.choice([-0.07, 0.07, 0.09])
    broken.edit_rows(lambda columns: columns["timestamp"].__setitem__(frame, columns["timestamp"][frame] + jitter))
    return rf"episode {broken.episode}: frame ({frame}|{frame + 1}) comes \d\.\d+ frames after the one before it"


@breaks
def v2_wrong_rate(broken: Broken) -> str:
    rate = broken.random.choice([3, 5, 12, 30, 10.5])
    broken.edit_json(lambda info: info.update(fps=rate))
    return r"episode \d: (frame \d+ comes [\d.]+ frames after the one before it at|its timestamps are at 10 frames)"


@breaks
def v2_rate_of_nothing(broken: Broken) -> str:
    rate = broken.random.choice([0, -10, None, "fast", float("inf"), 1e300, True])
    broken.edit_json(lambda info: info.update(fps=rate))
    return r"meta/info\.json is not as LeRobot writes it \(fps must be a number above 0"


@breaks
def v2_absurd_counts(broken: Broken) -> str:
    key = broken.random.choice(["total_episodes", "chunks_size"])
    value = broken.random.choice([float("inf"), -1, 10**39, 2.5, "9", [1]])
    broken.edit_json(lambda info: info.update({key: value}))
    return rf"meta/info\.json is not as LeRobot writes it \({key} must be a whole number from"


@breaks
def v2_path_as_wide_as_the_memory(broken: Broken) -> str:
    form = broken.random.choice(
        ["{episode_index:099999999999d}", "{episode_index:{episode_index}}", "{episode_index.real}"]
    )
    broken.edit_json(lambda info: info.update(data_path=f"data/{form}.parquet"))
    return r"info\.json has the path 'data/.*', which cannot be filled in \(.* is not a number's name and width"


@breaks
def v2_short_video(broken: Broken) -> str:
    camera, frames = broken.camera, broken.frame
    path = broken.video(camera)
    broken.recordings.write_video(path, broken.recordings.read_video(path)[:frames])
    return rf"{path}: the video ends at [\d.]+ s, before frame {frames} of the episode"


@breaks
def v2_truncated_video(broken: Broken) -> str:
    path = broken.video(broken.camera)
    data = path.read_bytes()
    path.write_bytes(data[: broken.random.randrange(1, len(data) - 1)])
    return rf"{path}( is not a readable video, or is cut off|: no frame can be decoded|: the video ends at)"


@breaks
def v2_undecodable_video_frame(broken: Broken) -> str:
    path = broken.video(broken.camera)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    first = start + broken.random.randrange(length // 3, length * 2 // 3)
    data[first : first + length // 5] = broken.random.randbytes(length // 5)
    path.write_bytes(data)
    return rf"{path}: the (video is damaged|frame at [\d.]+ s is damaged|video (ends|has))"


@breaks
def v2_video_of_another_size(broken: Broken) -> str:
    camera = broken.camera
    path = broken.video(camera)
    broken.recordings.write_video(path, broken.recordings.create_images(1, 15, (36, 40)))
    return rf"{path} is 40 x 36 pixels, but meta/info\.json says"


@breaks
def v2_video_that_is_none(broken: Broken) -> str:
    path = broken.video(broken.camera)
    path.write_bytes(broken.random.choice([b"", b"no video", broken.random.randbytes(5000)]))
    return rf"{path} is not a readable video"


@breaks
def v2_missing_video(broken: Broken) -> str:
    camera = broken.camera
    path = broken.video(camera)
    path.unlink()
    return rf"{path} is missing: the video of camera '{camera}'"


@breaks
def v2_unknown_camera(broken: Broken) -> str:
    broken.options["camera_names"] = ["observation.images.topp"]
    return r"camera_names: camera 'observation\.images\.topp' is unknown. Did you mean 'observation\.images\.top'"


@breaks
def v2_missing_task(broken: Broken) -> str:
    frame, task = broken.frame, broken.random.choice([2, 77, -1])
    broken.edit_rows(lambda columns: columns["task_index"].__setitem__(frame, task))
    return rf"{broken.rows}: episode {broken.episode} has task_index {task} at frame {frame}, which is not among the 2"


@breaks
def v2_broken_task_table(broken: Broken) -> str:
    line = broken.random.choice(
        ['{"task_index": 0}', '{"task_index": "0", "task": "x"}', "{", "[1]", '{"task_index": 0, "task": "other"}']
    )
    broken.edit_lines("tasks.jsonl", lambda lines: lines.append(line))
    return r"meta/tasks\.jsonl (line 3|row 2)"


@breaks
def v2_empty_episode(broken: Broken) -> str:
    broken.edit_lines("episodes.jsonl", lambda lines: set_lengths(lines, {broken.episode: 0}))
    pq.write_table(pq.read_table(broken.rows).slice(0, 0), broken.rows)
    return rf"{broken.rows}: episode {broken.episode} has 0 rows"


@breaks
def v2_another_length(broken: Broken) -> str:
    length = LENGTHS[broken.episode] + broken.random.choice([-2, -1, 1, 5])
    broken.edit_lines("episodes.jsonl", lambda lines: set_lengths(lines, {broken.episode: length}))
    return rf"{broken.rows}: episode {broken.episode} has {LENGTHS[broken.episode]} rows, but length {length}"


@breaks
def v2_missing_rows(broken: Broken) -> str:
    path = broken.rows
    path.unlink()
    return rf"{path} is missing"


@breaks
def v2_frames_in_another_order(broken: Broken) -> str:
    first, second = sorted(broken.random.sample(range(LENGTHS[broken.episode]), 2))
    table = pq.read_table(broken.rows)
    order = np.arange(len(table))
    order[[first, second]] = order[[second, first]]
    pq.write_table(table.take(order), broken.rows)
    return rf"{broken.rows}: episode {broken.episode}: row {first} has frame_index {second}, expected {first}"


@breaks
def v2_truncated_rows(broken: Broken) -> str:
    path = broken.rows
    data = path.read_bytes()
    path.write_bytes(data[: broken.random.randrange(len(data) - 1)])
    return rf"{path} is not a complete parquet file"


@breaks
def v2_missing_meta_file(broken: Broken) -> str:
    name = broken.random.choice(["info.json", "episodes.jsonl", "tasks.jsonl"])
    (broken.root / "meta" / name).unlink()
    return r"it has no meta/info\.json" if name == "info.json" else rf"meta/{name} is missing"


@breaks
def v2_bad_json(broken: Broken) -> str:
    name = broken.random.choice(["info.json", "episodes.jsonl", "tasks.jsonl"])
    path = broken.root / "meta" / name
    data = path.read_text(encoding="utf-8")
    path.write_text(data[: broken.random.randrange(1, len(data) - 3)], encoding="utf-8")
    # what is left of a table may be whole lines, of which some are missing
    return rf"meta/({name}( line \d+)? is not JSON|episodes.* holds \d episodes, but|tasks)"


@breaks
def v2_another_version(broken: Broken) -> str:
    version = broken.random.choice(["v1.6", "v3.1", "4", "", None])
    broken.edit_json(lambda info: info.update(codebase_version=version))
    return rf"info\.json: codebase_version '{version}' cannot be read, only 2\.0, 2\.1, 3\.0"


@breaks
def v2_missing_key(broken: Broken) -> str:
    key = broken.random.choice(["fps", "features", "data_path", "total_episodes"])
    broken.edit_json(lambda info: info.pop(key))
    return rf"info\.json lacks the key '{key}'"


@breaks
def v2_path_out_of_the_dataset(broken: Broken) -> str:
    path = broken.random.choice(["../{episode_index}.parquet", "/etc/{episode_index}", "data/../../{episode_index}"])
    broken.edit_json(lambda info: info.update(data_path=path))
    return r"info\.json has the path '.*', which leads out of the dataset"


@breaks
def v2_bad_template(broken: Broken) -> str:
    path = broken.random.choice(["data/{episode}.parquet", "data/{0}.parquet", "data/{episode_index", "{a.b}"])
    broken.edit_json(lambda info: info.update(data_path=path))
    return r"info\.json has the path '.*', which cannot be filled in"


@breaks
def v2_episode_listed_twice(broken: Broken) -> str:
    def repeat(lines: list[str]) -> None:
        lines[:] = [line for line in lines if f'"episode_index": {(broken.episode + 1) % 4},' not in line]
        lines.append(next(line for line in lines if f'"episode_index": {broken.episode},' in line))

    broken.edit_lines("episodes.jsonl", repeat)
    return rf"meta/episodes\.jsonl: episode_index {broken.episode} appears twice"


@breaks
def v3_episode_not_listed(broken: Broken) -> str:
    path = broken.root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([row for row in table if row["episode_index"] != broken.episode]), path)
    return r"meta/episodes holds 3 episodes, but info\.json says total_episodes 4"


@breaks
def v3_bad_rows_in_the_table(broken: Broken) -> str:
    shift = broken.random.choice([-1, 1, 3])
    edit_table(broken, "dataset_to_index", lambda value: value + shift)
    return rf"file-000\.parquet row \d: episode {broken.episode} has length \d+, but dataset_from_index"


@breaks
def v3_shifted_rows_in_the_table(broken: Broken) -> str:
    shift = broken.random.choice([1, 4])
    edit_table(broken, "dataset_from_index", lambda value: value + shift)
    edit_table(broken, "dataset_to_index", lambda value: value + shift)
    return rf"episode {broken.episode}: row 0 has index \d+, expected \d+"


@breaks
def v3_bad_times_in_the_table(broken: Broken) -> str:
    shift, camera = broken.random.choice([-0.5, 0.5, 100, float("nan")]), broken.camera
    edit_table(broken, f"videos/{camera}/to_timestamp", lambda value: value + shift)
    return rf"file-000\.parquet row \d: episode {broken.episode} has length .* its video of '{camera}' goes from"


@breaks
def v3_times_beyond_the_video(broken: Broken) -> str:
    camera = broken.camera
    for name in ("from_timestamp", "to_timestamp"):
        edit_table(broken, f"videos/{camera}/{name}", lambda value: value + 100)
    return rf"videos/{camera}/chunk-000/file-00\d\.mp4: the video ends at [\d.]+ s, before frame 0 of the episode"


@breaks
def v3_another_file(broken: Broken) -> str:
    edit_table(broken, "data/file_index", lambda value: 1 - value)
    return rf"file-00\d\.parquet: episode {broken.episode} has 0 rows, but length {LENGTHS[broken.episode]}"


@breaks
def v3_null_in_the_table(broken: Broken) -> str:
    name = broken.random.choice(["length", "data/file_index", "dataset_from_index"])
    edit_table(broken, name, lambda value: None)
    return rf"file-000\.parquet row \d: '{name}' is null"


@breaks
def v3_missing_column_in_the_table(broken: Broken) -> str:
    path = broken.root / "meta/episodes/chunk-000/file-000.parquet"
    name = broken.random.choice(["length", "tasks", "data/chunk_index", f"videos/{broken.camera}/from_timestamp"])
    pq.write_table(pq.read_table(path).drop_columns([name]), path)
    return rf"{path} has no column '{name}'"


@breaks
def png_undecodable_image(broken: Broken) -> str:
    frame, camera = broken.frame, broken.camera
    how = broken.random.randrange(3)

    def spoil(columns: dict[str, list[Any]]) -> None:
        data = columns[camera][frame]["bytes"]
        columns[camera][frame]["bytes"] = [data[: len(data) // 2], b"", broken.random.randbytes(500)][how]

    broken.edit_rows(spoil)
    return rf"{broken.rows}: '{camera}' in episode {broken.episode}: image {frame}: "


@breaks
def png_image_of_another_size(broken: Broken) -> str:
    frame, camera = broken.frame, broken.camera
    data = broken.recordings.encode_image(broken.recordings.create_images(3, 1, (18, 16))[0], "png")
    broken.edit_rows(lambda columns: columns[camera][frame].update(bytes=data))
    return rf"'{camera}' in episode {broken.episode}: image {frame} is 16 x 18 pixels, expected"


@breaks
def png_missing_image(broken: Broken) -> str:
    frame, camera = broken.frame, broken.camera
    change = broken.random.choice([{"bytes": None, "path": None}, {"bytes": None}])
    broken.edit_rows(lambda columns: columns[camera][frame].update(change))
    return rf"'{camera}' in episode {broken.episode}: image {frame} is (null|the file .* which is missing)"


def set_lengths(lines: list[str], lengths: dict[int, int]) -> None:
    for number, line in enumerate(lines):
        row = json.loads(line)
        row["length"] = lengths.get(row["episode_index"], row["length"])
        lines[number] = json.dumps(row)


def edit_table(broken: Broken, column: str, change: Callable[[Any], Any]) -> None:
    """Change a cell of the episode in the table of version 3."""
    path = broken.root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[broken.episode][column] = change(rows[broken.episode][column])
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, recordings: ModuleType) -> dict[str, Path]:
    """Datasets in which nothing is wrong."""
    folder, episodes = tmp_path_factory.mktemp("sound"), recordings.create_episodes(LENGTHS)
    return {
        "v2": recordings.write_v2(folder / "v2", episodes),
        "png": recordings.write_v2(folder / "png", episodes, images="png"),
        "v3": recordings.write_v3(folder / "v3", episodes, per_file=2),
    }


def read_broken(
    name: str, seed: int, sound: dict[str, Path], folder: Path, recordings: ModuleType, read_all: Any
) -> None:
    """Break a dataset in one way at a place that the seed chooses, and check what is said."""
    root = folder / f"{name}_{seed}"
    shutil.copytree(sound[name.partition("_")[0]], root)
    chosen = random.Random(f"{name} {seed}")
    broken = Broken(root, chosen, recordings, chosen.randrange(len(LENGTHS)), {})
    pattern = BREAKS[name](broken)
    try:
        found = read_all(LeRobotParams(source_episodes=[str(root)], output_dir="unused", **broken.options))
        errors = {episode: str(error) for episode, error in found.items() if isinstance(error, ValueError)}
    except ValueError as error:
        errors = {"": str(error)}
    assert errors, "nothing is said"
    for line in errors.values():
        assert re.search(pattern, line), line
        assert "\n" not in line
        assert len(line) < 700
    shutil.rmtree(root)


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_named(
    name: str, sound: dict[str, Path], tmp_path: Path, recordings: ModuleType, read_all: Any
) -> None:
    read_broken(name, 0, sound, tmp_path, recordings, read_all)


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_anywhere_is_named(
    name: str, sound: dict[str, Path], tmp_path: Path, recordings: ModuleType, read_all: Any
) -> None:
    for seed in range(1, NUM_SEEDS):
        read_broken(name, seed, sound, tmp_path, recordings, read_all)


@pytest.mark.parametrize("kind", ["v2", "png", "v3"])
def test_nothing_is_said_of_sound_datasets(kind: str, sound: dict[str, Path], read_all: Any) -> None:
    found = read_all(LeRobotParams(source_episodes=[str(sound[kind])], output_dir="unused"))
    assert not [error for error in found.values() if isinstance(error, ValueError)]


def test_the_job_leaves_a_broken_episode_out_whole_and_reports_it(
    sound: dict[str, Path], tmp_path: Path, recordings: ModuleType, preprocess_with: Any, read_tars: Any
) -> None:
    root, output = tmp_path / "set", tmp_path / "out"
    shutil.copytree(sound["v2"], root)
    broken = Broken(root, random.Random(3), recordings, 2, {})
    pattern = v2_short_video(broken)
    options = {"source_episodes": [str(root)], "output_dir": str(output), "num_workers": 0, "future_lowdim_steps": 3}
    with pytest.raises(ValueError, match="1 of 4 episodes"):
        preprocess_with(LeRobotParams(**options))
    assert not (output / "manifest.jsonl").exists()
    preprocess_with(LeRobotParams(**options, max_failed_fraction=0.3))
    assert sorted(read_tars(output)) == [f"set_episode_{number:06d}" for number in (0, 1, 3)]
    report = (output / "report.json").read_text(encoding="utf-8")
    assert re.search(pattern.replace(f"{tmp_path}/", ""), report)
    assert str(tmp_path) not in report
    counts = json.loads((output / "stats.json").read_text(encoding="utf-8"))["action"]["count"]
    assert max(counts) == LENGTHS[0] + LENGTHS[1] + LENGTHS[3]
