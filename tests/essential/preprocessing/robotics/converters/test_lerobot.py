"""LeRobot datasets of every version and kind of images read to what was written."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vla_foundry.params.commands.preprocessing_robotics import LeRobotParams
from vla_foundry.preprocessing.command import main
from vla_foundry.preprocessing.robotics.converters.converter import create_converter
from vla_foundry.robotics.spec import parse_spec
from vla_foundry.storage.uri import upload

LENGTHS = [11, 8, 14, 9, 10]
KINDS = ["v3-video", "v3-png", "v3-jpeg", "v2-video", "v2-png", "v2-files"]
FIELDS = ["observation.state", "observation.temperature", "observation.contact", "action"]
FIELD_MAP = """
fields:
  robot__actual__poses__right::arm__xyz: {source: observation.state, columns: [0, 3], unit: m, frame: base}
  robot__actual__poses__right::arm__quat: {source: observation.state, columns: [3, 7], rotation: quaternion_xyzw}
  robot__actual__grippers__right::arm: {source: observation.state, columns: [7, 8], gripper: {open: 0.08, closed: 0}}
  robot__action__poses__right::arm__xyz: {source: action, columns: [0, 3], unit: m, frame: base}
  robot__action__poses__right::arm__quat: {source: action, columns: [3, 7], rotation: quaternion_xyzw}
  observation.temperature: {unit: degC}
pose_groups:
  - name: action
    position_key: robot__action__poses__right::arm__xyz
    rotation_key: robot__action__poses__right::arm__quat
"""


@pytest.fixture(scope="module")
def episodes(recordings: ModuleType) -> list[dict[str, Any]]:
    return recordings.create_episodes(LENGTHS)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, recordings: ModuleType, episodes: list[dict[str, Any]]) -> Any:
    """A function that writes the episodes as one kind of dataset, once."""
    folder, written = tmp_path_factory.mktemp("lerobot"), {}

    def write_kind(kind: str) -> Path:
        if kind not in written:
            version, _, images = kind.partition("-")
            writer = recordings.write_v3 if version == "v3" else recordings.write_v2
            written[kind] = writer(folder / kind, episodes, images=images)
        return written[kind]

    return write_kind


def params_of(*roots: Path | str, **options: Any) -> LeRobotParams:
    return LeRobotParams(source_episodes=[str(root) for root in roots], output_dir="unused", **options)


def expected_images(recordings: ModuleType, root: Path, number: int, camera: str, episodes: list[Any]) -> np.ndarray:
    """The images of an episode as an independent reader finds them: by number, never by time."""
    images = episodes[number][camera]
    if "video" in root.name:
        if root.name.startswith("v2"):
            return recordings.read_video(root / f"videos/chunk-{number // 2:03d}/{camera}/episode_{number:06d}.mp4")
        first = sum(LENGTHS[number // 3 * 3 : number])
        video = recordings.read_video(root / f"videos/{camera}/chunk-000/file-{number // 3:03d}.mp4")
        return video[first : first + LENGTHS[number]]
    if "jpeg" in root.name:
        return np.stack([np.array(Image.open(io.BytesIO(recordings.encode_image(image, "jpeg")))) for image in images])
    return images


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_to_what_was_written(
    kind: str, write: Any, episodes: list[Any], recordings: ModuleType, read_all: Callable[[Any], dict[str, Any]]
) -> None:
    root = write(kind)
    found = read_all(params_of(root))
    assert list(found) == [f"{kind}_episode_{number:06d}" for number in range(len(LENGTHS))]
    for number, episode in enumerate(found.values()):
        assert not isinstance(episode, ValueError), episode
        expected = episodes[number]
        assert list(episode.fields) == FIELDS
        for name in FIELDS:
            assert episode.fields[name].dtype == np.float32
            np.testing.assert_array_equal(episode.fields[name], expected[name].astype(np.float32))
        np.testing.assert_array_equal(episode.timestamps, expected["timestamp"].astype(np.float64))
        assert list(episode.cameras) == list(recordings.CAMERAS)
        for camera, frames in episode.cameras.items():
            images = expected_images(recordings, root, number, camera, episodes)
            assert frames.size == images.shape[2:0:-1]
            np.testing.assert_array_equal(episode.metadata["images"][camera], images)
        texts = [""] * LENGTHS[number]
        for span in episode.instructions:
            texts[span.start : span.end] = span.texts["original"] * (span.end - span.start)
        assert texts == [recordings.TASKS[index] for index in expected["task_index"]]


@pytest.mark.parametrize("kind", ["v3-video", "v3-jpeg", "v2-video"])
def test_the_command_writes_what_an_independent_reader_finds(
    kind: str, write: Any, tmp_path: Path, episodes: list[Any], recordings: ModuleType, read_tars: Any
) -> None:
    root, output = write(kind), tmp_path / "out"
    words = ["robotics", "--type", "lerobot", "--source_episodes", str(root), "--output_dir", str(output)]
    main([*words, "--num_workers", "0", "--future_lowdim_steps", "3", "--jpeg_quality", "100"])
    members = read_tars(output)
    assert len(members) == len(LENGTHS)
    for number, expected in enumerate(episodes):
        found = members[f"{kind}_episode_{number:06d}"]
        assert found["episode.json"]["num_frames"] == LENGTHS[number]
        for name in FIELDS:
            np.testing.assert_array_equal(found["lowdim.npz"][name], expected[name].astype(np.float32))
        for camera in recordings.CAMERAS:
            images = expected_images(recordings, root, number, camera, episodes)
            for frame in range(LENGTHS[number]):
                data = found[f"{camera}.{frame:06d}.jpg"]
                if kind == "v3-jpeg":  # kept byte by byte
                    assert data == recordings.encode_image(expected[camera][frame], "jpeg")
                decoded = np.array(Image.open(io.BytesIO(data))).astype(int)
                assert np.abs(decoded - images[frame]).mean() < 5, (camera, frame)
    spec = parse_spec((output / "robotics.json").read_text(encoding="utf-8"), "robotics.json")
    assert spec.fps == recordings.FPS
    assert spec.fields["action"].role == "action"
    assert spec.fields["observation.contact"].is_discrete


def test_a_task_may_hold_any_separator_of_lines_but_the_newline(
    write: Any, recordings: ModuleType, tmp_path: Path, read_all: Any
) -> None:
    root = tmp_path / "set"
    shutil.copytree(write("v2-png"), root)
    texts = [f"{text}\u2028now\u0085or\x1cnever" for text in recordings.TASKS]
    lines = [json.dumps({"task_index": n, "task": text}, ensure_ascii=False) for n, text in enumerate(texts)]
    (root / "meta/tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    episodes = [
        json.loads(line) for line in (root / "meta/episodes.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ]
    for episode in episodes:
        episode["tasks"] = [texts[recordings.TASKS.index(text)] for text in episode["tasks"]]
    (root / "meta/episodes.jsonl").write_text(
        "".join(json.dumps(episode, ensure_ascii=False) + "\n" for episode in episodes), encoding="utf-8"
    )
    found = read_all(params_of(root))
    spoken = {text for episode in found.values() for span in episode.instructions for text in span.texts["original"]}
    assert spoken <= set(texts)
    assert spoken


WIDTH_FIRST = ["width", "height", "channel"]


def edit_info(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change meta/info.json."""
    path = root / "meta/info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    change(info)
    path.write_text(json.dumps(info), encoding="utf-8")


@pytest.mark.parametrize(
    "names", [None, ["c", "h", "w"], ["rgb", "height", "width"], [["channels", "h", "w"]], {"a": "x"}, WIDTH_FIRST]
)
@pytest.mark.parametrize("is_first", [False, True])
def test_images_may_be_declared_with_their_channels_first_or_last_under_any_names(
    names: Any, is_first: bool, write: Any, recordings: ModuleType, tmp_path: Path, read_all: Any
) -> None:
    root = tmp_path / "set"
    shutil.copytree(write("v2-png"), root)

    def redeclare(info: dict[str, Any]) -> None:
        for camera, (height, width) in recordings.CAMERAS.items():
            sizes = [width, height] if names == WIDTH_FIRST else [height, width]
            shape = [3, *sizes] if is_first else [*sizes, 3]
            info["features"][camera] |= {"names": names, "shape": shape}

    edit_info(root, redeclare)
    found = read_all(params_of(root))
    for episode in found.values():
        assert {name: frames.size[::-1] for name, frames in episode.cameras.items()} == recordings.CAMERAS


def test_whole_numbers_may_be_stored_as_floats(write: Any, tmp_path: Path, read_all: Any, episodes: list[Any]) -> None:
    for kind in ("v2-png", "v3-png"):
        root = tmp_path / kind
        shutil.copytree(write(kind), root)
        tables = [*root.glob("data/**/*.parquet"), *root.glob("meta/**/*.parquet")]
        for path in tables:
            table = pq.read_table(path)
            for number, field in enumerate(table.schema):
                if pa.types.is_integer(field.type):
                    table = table.set_column(number, field.name, table.column(number).cast(pa.float64()))
            pq.write_table(table, path)
        for path in root.glob("meta/*.jsonl"):
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub(r'("\w+": \d+)([,}])', r"\1.0\2", text), encoding="utf-8")
        found = read_all(params_of(root))
        assert list(found) == [f"{kind}_episode_{number:06d}" for number in range(len(LENGTHS))]
        for expected, episode in zip(episodes, found.values(), strict=True):
            np.testing.assert_array_equal(episode.fields["action"], expected["action"])
    path = next((tmp_path / "v2-png").glob("data/*/episode_000000.parquet"))
    table = pq.read_table(path)
    place = table.schema.get_field_index("frame_index")
    halves = pa.array(np.arange(len(table)) + 0.5)
    pq.write_table(table.set_column(place, "frame_index", halves), path)
    error = read_all(params_of(tmp_path / "v2-png"))["v2-png_episode_000000"]
    assert "column 'frame_index' holds float64, but meta/info.json says int64" in str(error)


def test_numbers_that_the_declared_type_cannot_hold_are_no_field(write: Any, tmp_path: Path, read_all: Any) -> None:
    root = tmp_path / "set"
    shutil.copytree(write("v2-png"), root)
    path = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    place, name = table.schema.get_field_index("observation.contact"), "observation.contact"
    for value, is_read in ((1, True), (-1, False), (2, False)):
        values = pa.array(np.full(len(table), value))
        pq.write_table(table.set_column(place, name, values), path)
        found = read_all(params_of(root))["set_episode_000000"]
        if is_read:
            assert found.fields[name].min() == 1
        else:
            assert f"column '{name}' holds int64, but meta/info.json says bool" in str(found)


@pytest.mark.parametrize(
    ("columns", "index"),
    [
        ({"task": None, "note": "other"}, "task"),
        ({"note": "other", "task": None}, None),
        ({"task": "short", "__index_level_0__": None}, "__index_level_0__"),
        ({"text": None, "difficulty": 3}, None),
    ],
)
def test_a_table_of_tasks_may_have_other_columns(
    columns: dict[str, Any], index: str | None, write: Any, recordings: ModuleType, tmp_path: Path, read_all: Any
) -> None:
    root, num_tasks = tmp_path / "set", len(recordings.TASKS)
    shutil.copytree(write("v3-png"), root)
    values = {name: recordings.TASKS if value is None else [value] * num_tasks for name, value in columns.items()}
    notes = {} if index is None else {"pandas": json.dumps({"index_columns": [index]})}
    table = pa.table({"task_index": list(range(num_tasks)), **values}).replace_schema_metadata(notes)
    pq.write_table(table, root / "meta/tasks.parquet")
    spoken = {
        text
        for each in read_all(params_of(root)).values()
        for span in each.instructions
        for text in span.texts["original"]
    }
    assert spoken == set(recordings.TASKS)


def test_a_task_that_is_not_utf8_is_named(write: Any, tmp_path: Path, texts_not_utf8: pa.Array) -> None:
    root = tmp_path / "set"
    shutil.copytree(write("v3-png"), root)
    pq.write_table(pa.table({"task_index": [0, 1], "task": texts_not_utf8}), root / "meta/tasks.parquet")
    with pytest.raises(ValueError, match=r"meta/tasks\.parquet row 1: 'task' is not UTF-8 text\."):
        create_converter(params_of(root)).discover_episodes()


def test_names_may_have_dots_and_spaces(
    write: Any, recordings: ModuleType, tmp_path: Path, preprocess_with: Any, read_tars: Any
) -> None:
    root = tmp_path / "my set v1.2"
    shutil.copytree(write("v3-video"), root)
    new = {"observation.images.top": "images.top left v1.0", "observation.state": "arm state v1.0"}

    def rename(info: dict[str, Any]) -> None:
        info["features"] = {new.get(name, name): feature for name, feature in info["features"].items()}

    edit_info(root, rename)
    for path in root.rglob("*.parquet"):
        table = pq.read_table(path)
        names = [name for name in table.column_names]
        for old, name in new.items():
            names = [each.replace(old, name) for each in names]
        pq.write_table(table.rename_columns(names), path)
    (root / "videos/observation.images.top").rename(root / "videos" / new["observation.images.top"])
    for layout in ("episodes", "samples"):
        options = {"output_dir": str(tmp_path / layout), "num_workers": 0, "future_lowdim_steps": 3, "layout": layout}
        preprocess_with(LeRobotParams(source_episodes=[str(root)], **options))
        members = read_tars(tmp_path / layout)
        assert all(key.startswith("my_set_v1_2_episode_") for key in members)
        first = next(iter(members.values()))
        assert "arm state v1.0" in first["lowdim.npz"]
        assert any(name.startswith("images.top left v1.0") for name in first)


JOINTS = [f"joint_{number}" for number in range(7)] + ["gripper"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (JOINTS, JOINTS),
        ([JOINTS], JOINTS),
        ({"motors": JOINTS}, JOINTS),
        ({"arm": JOINTS[:7], "hand": ["gripper"]}, JOINTS),
        ({name: 7 - place for place, name in enumerate(JOINTS)}, JOINTS[::-1]),
        (
            {side: JOINTS[:4] for side in ("left", "right")},
            [f"{side}.{name}" for side in ("left", "right") for name in JOINTS[:4]],
        ),
        (JOINTS[:3], []),
        (None, []),
    ],
)
def test_the_names_of_joints_are_kept_in_every_form(
    names: Any, expected: list[str], write: Any, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    shutil.copytree(write("v2-png"), root)
    edit_info(root, lambda info: info["features"]["action"].update(names=names))
    assert create_converter(params_of(root)).describe_fields()["action"].names == tuple(expected)


def test_joints_are_named_in_messages_the_spec_and_parts_of_features(
    write: Any, tmp_path: Path, read_all: Any, preprocess_with: Any
) -> None:
    root, swapped = tmp_path / "set", tmp_path / "swapped"
    shutil.copytree(write("v2-png"), root)
    edit_info(root, lambda info: info["features"]["action"].update(names={"motors": JOINTS}))
    shutil.copytree(root, swapped)
    options = {"source_episodes": [str(root)], "output_dir": str(tmp_path / "out"), "num_workers": 0}
    preprocess_with(LeRobotParams(**options, future_lowdim_steps=3))
    spec = parse_spec((tmp_path / "out/robotics.json").read_text(encoding="utf-8"), "robotics.json")
    assert (spec.fields["action"].names, spec.fields["observation.state"].names) == (tuple(JOINTS), ())
    (tmp_path / "map.yaml").write_text("fields: {hand: {source: action, columns: [6, 8]}}", encoding="utf-8")
    mapped = create_converter(params_of(root, field_map=str(tmp_path / "map.yaml"))).describe_fields()
    assert mapped["hand"].names == ("joint_6", "gripper")
    path = root / "data/chunk-000/episode_000000.parquet"
    columns = pq.read_table(path).to_pydict()
    columns["action"][3][7] = float("nan")
    pq.write_table(pa.table(columns), path)
    error = read_all(params_of(root))["set_episode_000000"]
    assert "field 'action' holds nan at frame 3, column 7 (gripper)." in str(error)
    edit_info(swapped, lambda info: info["features"]["action"].update(names=JOINTS[::-1]))
    with pytest.raises(ValueError, match=r"field 'action' differs between .*gripper"):
        create_converter(params_of(root, swapped)).describe_fields()


def test_a_dataset_of_the_hub_is_pointed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"lerobot/pusht is not a LeRobot .* hub is hf://datasets/lerobot/pusht\."):
        create_converter(params_of("lerobot/pusht")).discover_episodes()
    (tmp_path / "lerobot/pusht").mkdir(parents=True)
    (tmp_path / "lerobot/pusht/notes.txt").write_text("here", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no meta/info\.json\.$"):
        create_converter(params_of("lerobot/pusht")).discover_episodes()


def test_the_command_takes_the_last_part_of_a_camera(write: Any, tmp_path: Path, read_tars: Any) -> None:
    words = ["robotics", "--type", "lerobot", "--source_episodes", str(write("v2-video"))]
    words += ["--output_dir", str(tmp_path / "out"), "--num_workers", "0", "--future_lowdim_steps", "3"]
    main([*words, "--camera_names", "[wrist]"])
    names = {name for members in read_tars(tmp_path / "out").values() for name in members if name.endswith(".jpg")}
    assert {name.rpartition(".0")[0] for name in names} == {"observation.images.wrist"}


def test_hidden_files_are_no_tables(write: Any, tmp_path: Path, read_all: Any, add_hidden_files: Any) -> None:
    root = tmp_path / "set"
    shutil.copytree(write("v3-png"), root)
    before = list(read_all(params_of(root))), create_converter(params_of(root)).describe_source()
    add_hidden_files(root)
    assert (list(read_all(params_of(root))), create_converter(params_of(root)).describe_source()) == before


def test_bookkeeping_is_no_field_unless_it_is_asked_for(write: Any, read_all: Any) -> None:
    params = params_of(write("v2-png"), observation_keys=["observation.state", "next.reward"], action_keys=[])
    assert list(create_converter(params).describe_fields()) == ["observation.state", "next.reward"]
    episode = next(iter(read_all(params).values()))
    assert list(episode.fields) == ["observation.state", "next.reward"]
    message = r"observation_keys 'observation\.stat' is unknown. Did you mean 'observation\.state'\?"
    with pytest.raises(ValueError, match=message):
        create_converter(params_of(write("v2-png"), observation_keys=["observation.stat"])).describe_fields()


def test_a_field_map_splits_features_and_makes_poses_relative(
    write: Any, tmp_path: Path, episodes: list[Any], preprocess_with: Any, read_tars: Any
) -> None:
    path = tmp_path / "arm.yaml"
    path.write_text(FIELD_MAP, encoding="utf-8")
    output = tmp_path / "out"
    options = {"field_map": str(path), "num_workers": 0, "future_lowdim_steps": 3, "layout": "samples"}
    preprocess_with(LeRobotParams(source_episodes=[str(write("v3-png"))], output_dir=str(output), **options))
    spec = parse_spec((output / "robotics.json").read_text(encoding="utf-8"), "robotics.json")
    gripper = spec.fields["robot__actual__grippers__right::arm"].gripper
    assert gripper is not None
    assert (gripper.open, gripper.closed) == (0.08, 0)
    assert spec.fields["robot__action__poses__right::arm__quat_relative"].representation == "relative"
    assert spec.fields["robot__actual__poses__right::arm__xyz"].frame == "base"
    assert spec.pose_groups[0].rotation_format == "quaternion_xyzw"
    from scipy.spatial.transform import Rotation

    for key, sample in read_tars(output).items():
        episode, frame = int(key[-11:-8]), int(key[-6:])
        state, action = (episodes[episode][name].astype(np.float64) for name in ("observation.state", "action"))
        turn = Rotation.from_quat(state[frame, 3:7]).inv()
        relative = sample["lowdim.npz"]["robot__action__poses__right::arm__xyz_relative"][1]  # at the anchor
        np.testing.assert_allclose(relative, turn.apply(action[frame, :3] - state[frame, :3]), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("columns: [7, 8]|columns: [7, 9]", r"takes columns 7 to 9 of 'observation\.state', which has 8"),
        ("quaternion_xyzw}|rot_6d_rows}", "has 4 columns, but a rotation written as rot_6d_rows has 6"),
        ("{source: action, columns: [3|{source: actoin, columns: [3", "source 'actoin' is unknown. Did you mean"),
        (
            "rotation_key: robot__action|rotation_key: robot__desired",
            "'robot__desired__poses__right::arm__quat' is unk",
        ),
        (", rotation: quaternion_xyzw}|}", "must be a rotation written as rot_6d_rows, but its field says None"),
    ],
)
def test_a_field_map_that_does_not_fit_is_one_line(write: Any, tmp_path: Path, change: str, message: str) -> None:
    before, after = change.split("|")
    assert before in FIELD_MAP
    path = tmp_path / "arm.yaml"
    path.write_text(FIELD_MAP.replace(before, after), encoding="utf-8")
    converter = create_converter(params_of(write("v3-png"), field_map=str(path)))
    with pytest.raises(ValueError, match=message) as error:
        converter.pose_groups()
    assert "\n" not in str(error.value)


def test_several_sources_keep_their_episodes_apart(write: Any, tmp_path: Path, read_all: Any) -> None:
    first, second = tmp_path / "a" / "set", tmp_path / "b" / "set"
    shutil.copytree(write("v2-png"), first)
    shutil.copytree(write("v3-png"), second)
    found = read_all(params_of(first, second))
    assert len(found) == 2 * len(LENGTHS)
    assert {name.rpartition("_episode_")[0] for name in found} == {"a_set", "b_set"}
    for number in range(len(LENGTHS)):
        one, other = (found[f"{name}_set_episode_{number:06d}"] for name in "ab")
        np.testing.assert_array_equal(one.fields["observation.state"], other.fields["observation.state"])
    with pytest.raises(ValueError, match="is given twice"):
        read_all(params_of(first, first))
    info = json.loads((second / "meta/info.json").read_text(encoding="utf-8"))
    info["features"]["observation.temperature"]["dtype"] = "float64"
    (second / "meta/info.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(ValueError, match=r"field 'observation\.temperature' differs between"):
        read_all(params_of(first, second))


def test_only_the_chosen_cameras_are_opened(write: Any, tmp_path: Path, read_all: Any) -> None:
    root = tmp_path / "set"
    shutil.copytree(write("v2-video"), root)
    (root / "videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    found = read_all(params_of(root, camera_names=["observation.images.wrist"]))
    assert all(list(episode.cameras) == ["observation.images.wrist"] for episode in found.values())
    error = read_all(params_of(root))["set_episode_000001"]
    assert "observation.images.top/episode_000001.mp4 is missing" in str(error)


def test_an_episode_without_a_video_is_left_out_if_asked(
    write: Any, tmp_path: Path, preprocess_with: Any, read_tars: Any
) -> None:
    root, output = tmp_path / "set", tmp_path / "out"
    shutil.copytree(write("v2-video"), root)
    (root / "videos/chunk-001/observation.images.top/episode_000002.mp4").unlink()
    options = {"skip_episodes_missing_cameras": True, "num_workers": 0, "future_lowdim_steps": 3}
    preprocess_with(LeRobotParams(source_episodes=[str(root)], output_dir=str(output), **options))
    assert sorted(read_tars(output)) == [f"set_episode_{number:06d}" for number in (0, 1, 3, 4)]


def test_a_dataset_is_read_from_an_object_store(write: Any, s3_bucket: str, read_all: Any) -> None:
    root = write("v3-video")
    for path in filter(Path.is_file, root.rglob("*")):
        upload(str(path), f"{s3_bucket}/set/{path.relative_to(root)}")
    local, remote = read_all(params_of(root)), read_all(params_of(f"{s3_bucket}/set"))
    for one, other in zip(local.values(), remote.values(), strict=True):
        np.testing.assert_array_equal(one.fields["action"], other.fields["action"])
        for camera, images in one.metadata["images"].items():
            np.testing.assert_array_equal(images, other.metadata["images"][camera])


def test_only_the_row_groups_of_an_episode_are_read(
    tmp_path: Path, recordings: ModuleType, read_all: Any, write: Any
) -> None:
    root = tmp_path / "set"
    shutil.copytree(write("v3-png"), root)
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=7, compression="NONE", use_dictionary=False)
    metadata = pq.ParquetFile(path).metadata
    last = metadata.row_group(metadata.num_row_groups - 1)
    data = bytearray(path.read_bytes())
    for number in range(last.num_columns):  # what is there can not be read any more
        column = last.column(number)
        data[column.data_page_offset : column.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(data)
    found = read_all(params_of(root))
    assert not isinstance(found["set_episode_000000"], ValueError)
    assert "is not a complete parquet file" in str(found["set_episode_000002"])


def test_transforms_and_their_inverses_give_the_fields_back(write: Any, tmp_path: Path, check_inverse: Any) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(FIELD_MAP, encoding="utf-8")
    check_inverse(params_of(write("v3-png"), field_map=str(path)))
