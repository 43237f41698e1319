"""LeRobot sets as we write them: every table points where it says, and a reader that knows only the format agrees."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from vla_foundry.preprocessing.robotics.lerobot_recording import EpisodeRecorder, LeRobotFeatures, delete_leftovers
from vla_foundry.preprocessing.robotics.lerobot_writer import LeRobotWriter

CAMERA, STATE, OPENING, ACTION = "observation.images.top", "observation.state", "observation.opening", "action"
VECTORS = {STATE: ("x", "y", "z"), OPENING: ("opening",), ACTION: ("dx", "grip")}
TASKS = ["open the drawer", "close the drawer"]
SIZE = (16, 24)

Frames = list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


def features_of(*, video: bool = False) -> LeRobotFeatures:
    return LeRobotFeatures(fps=20, robot_type="arm", vectors=VECTORS, cameras={CAMERA: SIZE}, video=video)


def draw_frames(number: int, length: int) -> Frames:
    generator = np.random.default_rng(number)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    frames: Frames = []
    for time in range(length):
        # smooth, so that a video can keep it, and another in each frame
        grey = 128 + 100 * np.sin(rows / 5 + number) * np.cos(columns / 7 + time)
        image = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
        vectors = {name: generator.standard_normal(len(parts)).astype(np.float32) for name, parts in VECTORS.items()}
        frames.append((vectors, {CAMERA: image}))
    return frames


def record(folder: Path, features: LeRobotFeatures, episodes: list[Frames]) -> list[Path]:
    parts = []
    for number, frames in enumerate(episodes):
        parts.append(folder / f"episode-{number}")
        with EpisodeRecorder(parts[-1], features) as recorder:
            for vectors, images in frames:
                recorder.add(vectors, images)
            recorder.finish(TASKS[number % 2])
    return parts


def write(folder: Path, features: LeRobotFeatures, parts: list[Path], **options: int) -> Path:
    writer = LeRobotWriter(folder, features, **options)
    for part in parts:
        writer.add_episode(part)
    writer.finish()
    return folder


def read_rows(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob(pattern)) for row in parquet.read_table(path).to_pylist()]


def decode_video(path: Path) -> dict[float, np.ndarray]:
    """Frames by their time in seconds."""
    with av.open(str(path)) as container:
        return {round(float(f.time or 0), 6): f.to_ndarray(format="rgb24") for f in container.decode(video=0)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def episodes() -> list[Frames]:
    return [draw_frames(number, 4 + number) for number in range(5)]


@pytest.fixture(scope="module")
def pictures_set(tmp_path_factory: pytest.TempPathFactory, episodes: list[Frames]) -> Path:
    folder = tmp_path_factory.mktemp("lerobot")
    return write(folder / "set", features_of(), record(folder, features_of(), episodes))


def test_rows_hold_what_was_recorded(pictures_set: Path, episodes: list[Frames]) -> None:
    rows = read_rows(pictures_set, "data/*/*.parquet")
    texts = {row["task_index"]: row["__index_level_0__"] for row in read_rows(pictures_set, "meta/tasks.parquet")}
    expected = [(number, time, *frame) for number, one in enumerate(episodes) for time, frame in enumerate(one)]
    assert len(rows) == len(expected)
    for index, (row, (number, time, vectors, images)) in enumerate(zip(rows, expected, strict=True)):
        assert (row["index"], row["episode_index"], row["frame_index"]) == (index, number, time)
        assert row["timestamp"] == np.float32(time / 20)
        assert texts[row["task_index"]] == TASKS[number % 2]
        assert row[STATE] == vectors[STATE].tolist()
        assert row[ACTION] == vectors[ACTION].tolist()
        assert row[OPENING] == vectors[OPENING][0]
        assert row[CAMERA]["path"] == f"frame-{time:06d}.png"
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(row[CAMERA]["bytes"]))), images[CAMERA])


def test_info_describes_the_columns(pictures_set: Path) -> None:
    info = json.loads((pictures_set / "meta/info.json").read_text(encoding="utf-8"))
    assert {key: info[key] for key in ("codebase_version", "robot_type", "fps", "splits", "video_path")} == {
        "codebase_version": "v3.0",
        "robot_type": "arm",
        "fps": 20,
        "splits": {"train": "0:5"},
        "video_path": None,
    }
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (5, 30, 2)
    schema = parquet.read_schema(pictures_set / info["data_path"].format(chunk_index=0, file_index=0))
    assert list(info["features"]) == schema.names
    assert info["features"][CAMERA] == {
        "dtype": "image",
        "shape": [16, 24, 3],
        "names": ["height", "width", "channels"],
    }
    assert info["features"][ACTION] == {"dtype": "float32", "shape": [2], "names": ["dx", "grip"]}
    assert str(schema.field(STATE).type).startswith("fixed_size_list<")
    assert str(schema.field(OPENING).type) == "float"
    assert b'"_type": "Image"' in (schema.metadata or {})[b"huggingface"]


def test_the_table_of_episodes_points_to_rows_in_several_files(tmp_path: Path) -> None:
    """Files are so small that two episodes do not fit into one: pictures of noise take a third of it each."""
    generator = np.random.default_rng(0)
    size = (256, 512)
    features = LeRobotFeatures(fps=20, robot_type="arm", vectors={ACTION: ("dx",)}, cameras={CAMERA: size})
    frames: Frames = [
        ({ACTION: np.ones(1, np.float32)}, {CAMERA: generator.integers(0, 256, (*size, 3), np.uint8)}) for _ in range(2)
    ]
    parts = record(tmp_path, features, [frames] * 3)
    folder = write(tmp_path / "set", features, parts, data_megabytes=1)
    assert len(list(folder.glob("data/*/*.parquet"))) == 3
    check_table_of_episodes(folder, [2, 2, 2])


def check_table_of_episodes(folder: Path, lengths: list[int]) -> None:
    info = json.loads((folder / "meta/info.json").read_text(encoding="utf-8"))
    table = read_rows(folder, "meta/episodes/*/*.parquet")
    assert [row["length"] for row in table] == lengths
    start = 0
    files: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for number, row in enumerate(table):
        assert row["episode_index"] == number
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (start, start + lengths[number])
        start += lengths[number]
        place = row["data/chunk_index"], row["data/file_index"]
        if place not in files:
            path = folder / info["data_path"].format(chunk_index=place[0], file_index=place[1])
            files[place] = parquet.read_table(path).to_pylist()
        own = [one["index"] for one in files[place] if one["episode_index"] == number]
        assert own == list(range(row["dataset_from_index"], row["dataset_to_index"]))
    assert start == info["total_frames"]


def test_many_episodes_share_a_file_and_a_table(tmp_path: Path) -> None:
    features = LeRobotFeatures(fps=20, robot_type="arm", vectors={ACTION: ("dx",)}, cameras={})
    frames: Frames = [({ACTION: np.full(1, time, np.float32)}, {}) for time in range(2)]
    (part,) = record(tmp_path, features, [frames])
    folder = write(tmp_path / "set", features, [part] * 205)
    assert len(list(folder.glob("data/*/*.parquet"))) == 1
    (path,) = folder.glob("meta/episodes/*/*.parquet")
    assert parquet.ParquetFile(path).num_row_groups == 3
    check_table_of_episodes(folder, [2] * 205)


def expected_statistics(frames: Frames, column: str) -> dict[str, Any]:
    if column == CAMERA:
        # every value of a colour in all frames
        values = np.stack([images[CAMERA] for _, images in frames]).reshape(-1, 3) / 255
        method, shape = "inverted_cdf", (3, 1, 1)
    else:
        values = np.stack([vectors[column] for vectors, _ in frames]).astype(float)
        method, shape = "linear", (-1,)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    for name, share in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        found[name] = np.quantile(values, share, axis=0, method=method)
    return {name: value.reshape(shape) for name, value in found.items()} | {"count": [len(frames)]}


@pytest.mark.parametrize("column", [CAMERA, STATE, OPENING])
def test_statistics_are_those_of_the_frames(pictures_set: Path, episodes: list[Frames], column: str) -> None:
    table = read_rows(pictures_set, "meta/episodes/*/*.parquet")
    for frames, row in zip(episodes, table, strict=True):
        for name, value in expected_statistics(frames, column).items():
            np.testing.assert_allclose(row[f"stats/{column}/{name}"], value, atol=1e-6, err_msg=name)
    found = json.loads((pictures_set / "meta/stats.json").read_text(encoding="utf-8"))[column]
    whole = expected_statistics([frame for frames in episodes for frame in frames], column)
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(found[name], whole[name], atol=1e-6, err_msg=name)
    # by LeRobot's definition
    weights = [len(frames) for frames in episodes]
    medians = [row[f"stats/{column}/q50"] for row in table]
    np.testing.assert_allclose(found["q50"], np.average(medians, axis=0, weights=weights), atol=1e-6)


def test_videos_hold_the_pictures_where_the_table_says(tmp_path: Path, episodes: list[Frames]) -> None:
    features = features_of(video=True)
    parts = record(tmp_path, features, episodes)
    folder = write(tmp_path / "set", features, parts)
    info = json.loads((folder / "meta/info.json").read_text(encoding="utf-8"))
    assert info["features"][CAMERA]["dtype"] == "video"
    assert info["features"][CAMERA]["info"]["video.codec"] == "h264"
    assert CAMERA not in parquet.read_schema(folder / "data/chunk-000/file-000.parquet").names
    videos = list(folder.glob("videos/*/*/*.mp4"))
    assert len(videos) == 1
    decoded = decode_video(videos[0])
    assert len(decoded) == 30
    end = 0.0
    for frames, row in zip(episodes, read_rows(folder, "meta/episodes/*/*.parquet"), strict=True):
        place = {key: row[f"videos/{CAMERA}/{key}"] for key in ("chunk_index", "file_index")}
        assert folder / info["video_path"].format(video_key=CAMERA, **place) == videos[0]
        start = row[f"videos/{CAMERA}/from_timestamp"]
        assert start == pytest.approx(end)
        end = row[f"videos/{CAMERA}/to_timestamp"]
        assert end - start == pytest.approx(len(frames) / 20)
        for time, (_, images) in enumerate(frames):
            found = decoded[round(start + time / 20, 6)]
            assert np.abs(found.astype(int) - images[CAMERA]).mean() < 3
    # as a set of pictures says
    whole = expected_statistics([frame for one in episodes for frame in one], CAMERA)
    stats = json.loads((folder / "meta/stats.json").read_text(encoding="utf-8"))[CAMERA]
    np.testing.assert_allclose(stats["mean"], whole["mean"], atol=1e-6)


def test_a_full_video_file_is_followed_by_the_next(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    size = (256, 256)
    features = LeRobotFeatures(fps=20, robot_type="arm", vectors={ACTION: ("dx",)}, cameras={CAMERA: size}, video=True)
    frames: Frames = [
        ({ACTION: np.ones(1, np.float32)}, {CAMERA: generator.integers(0, 256, (*size, 3), np.uint8)})
        for _ in range(16)
    ]
    parts = record(tmp_path, features, [frames] * 3)
    assert (parts[0] / f"{CAMERA}.mp4").stat().st_size > 1 << 19
    folder = write(tmp_path / "set", features, parts, video_megabytes=1)
    table = read_rows(folder, "meta/episodes/*/*.parquet")
    assert [row[f"videos/{CAMERA}/file_index"] for row in table] == [0, 1, 2]
    assert [row[f"videos/{CAMERA}/from_timestamp"] for row in table] == [0, 0, 0]
    assert all(len(decode_video(path)) == 16 for path in folder.glob("videos/*/*/*.mp4"))


@pytest.mark.parametrize("video", [False, True])
def test_the_same_episodes_give_the_same_bytes(tmp_path: Path, episodes: list[Frames], video: bool) -> None:
    features = features_of(video=video)
    sets = [write(tmp_path / n / "set", features, record(tmp_path / n, features, episodes)) for n in "ab"]
    assert contents(sets[0]) == contents(sets[1])


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("num_frames", [0, 2])
def test_an_episode_that_is_not_finished_leaves_nothing(
    tmp_path: Path, episodes: list[Frames], video: bool, num_frames: int
) -> None:
    with EpisodeRecorder(tmp_path / "episode", features_of(video=video)) as recorder:
        for vectors, images in episodes[0][:num_frames]:
            recorder.add(vectors, images)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_go_and_finished_episodes_stay(tmp_path: Path, episodes: list[Frames]) -> None:
    (part,) = record(tmp_path, features_of(), episodes[:1])
    killed = EpisodeRecorder(tmp_path / "episode-1", features_of())
    killed.add(*episodes[1][0])
    assert len(list(tmp_path.iterdir())) == 2
    delete_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [part]


def test_of_two_who_record_the_same_episode_the_first_stays(tmp_path: Path, episodes: list[Frames]) -> None:
    with EpisodeRecorder(tmp_path / "episode-0", features_of()) as late:
        late.add(*episodes[1][0])
        (part,) = record(tmp_path, features_of(), episodes[:1])
        before = contents(part)
        late.finish("too late")
    assert contents(tmp_path) == {f"episode-0/{name}": data for name, data in before.items()}


def changed(column: str, value: Any) -> Any:
    def change(vectors: Mapping[str, np.ndarray], images: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        if column in images:
            return vectors, {**images, column: value}
        return {**vectors, column: value}, images

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(STATE, np.zeros(2, np.float32)), r"'observation.state' must be floats \(3,\), got float32"),
        (changed(STATE, np.zeros(3, np.int64)), r"must be floats \(3,\), got int64"),
        (changed(STATE, np.array([0, np.nan, 0])), r"episode-0, frame 1: 'observation.state' must be finite"),
        (changed(ACTION, np.array([np.inf, 0])), r"'action' must be finite"),
        (changed(CAMERA, np.zeros((24, 16, 3), np.uint8)), r"must be uint8 \(16, 24, 3\), got uint8"),
        (changed(CAMERA, np.zeros((16, 24, 3))), r"must be uint8 \(16, 24, 3\), got float64"),
        (
            changed("reward", np.zeros(1)),
            r"vectors must match the features; missing: \[\], unknown: \['reward'\]",
        ),
        (lambda vectors, images: (vectors, {}), r"missing: \['observation.images.top'\]"),
    ],
)
def test_a_wrong_frame_is_named_in_one_line(tmp_path: Path, episodes: list[Frames], change: Any, message: str) -> None:
    with EpisodeRecorder(tmp_path / "episode-0", features_of()) as recorder:
        recorder.add(*episodes[0][0])
        with pytest.raises(ValueError, match=message) as caught:
            recorder.add(*change(*episodes[0][1]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fps": 0}, "fps must be at least 1"),
        ({"vectors": {"index": ("i",)}}, "column 'index' must be unique"),
        ({"vectors": {"a/b": ("i",)}}, "column 'a/b'"),
        ({"vectors": {CAMERA: ("i",)}}, "column 'observation.images.top' must be unique"),
        ({"vectors": {ACTION: ()}}, "'action' must have at least one number"),
        ({"cameras": {CAMERA: (16, 15)}, "video": True}, "15 x 16 pixels: a video's width and height must be even"),
    ],
)
def test_features_that_cannot_be_are_named(values: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"fps": 20, "robot_type": "arm", "vectors": VECTORS, "cameras": {CAMERA: SIZE}}
    with pytest.raises(ValueError, match=message):
        LeRobotFeatures(**good | values)


def test_what_was_not_recorded_or_otherwise_is_refused(tmp_path: Path, episodes: list[Frames]) -> None:
    with (
        EpisodeRecorder(tmp_path / "empty", features_of()) as recorder,
        pytest.raises(ValueError, match="needs frames"),
    ):
        recorder.finish("open the drawer")
    with EpisodeRecorder(tmp_path / "mute", features_of()) as recorder:
        recorder.add(*episodes[0][0])
        with pytest.raises(ValueError, match="and a task"):
            recorder.finish(" ")
    (part,) = record(tmp_path, features_of(), episodes[:1])
    other = LeRobotFeatures(fps=20, robot_type="arm", vectors={ACTION: ("dx", "grip")}, cameras={CAMERA: SIZE})
    with pytest.raises(ValueError, match=r"recorded with other columns than \['action', 'observation.images.top'\]"):
        LeRobotWriter(tmp_path / "set", other).add_episode(part)
    with pytest.raises(ValueError, match="at least one episode"):
        LeRobotWriter(tmp_path / "none", features_of()).finish()
    with pytest.raises(FileNotFoundError):
        LeRobotWriter(tmp_path / "set", features_of()).add_episode(tmp_path / "nowhere")
