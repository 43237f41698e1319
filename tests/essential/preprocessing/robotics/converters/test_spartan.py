"""LBM's raw recordings read to what was written, wherever they lie, and nothing of them is unpickled."""

import io
import json
import pickle
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from vla_foundry.params.commands.preprocessing_robotics import SpartanParams
from vla_foundry.preprocessing.command import main
from vla_foundry.preprocessing.robotics.converters.converter import create_converter
from vla_foundry.robotics.spec import parse_spec
from vla_foundry.storage.uri import upload

CAMERAS = {"4117": "scene_right_0", "4202": "Wrist_Left_Plus"}
TASK, TIME = "PutMugInBowl", "2024-11-14T15-59-59-08-00"
LENGTHS = {0: 9, 2: 12, 11: 8}
SIDES = ("left", "right")
BODY = {side: f"{side}::panda" for side in SIDES}
LANGUAGE = {
    "language_dict": {
        TASK: {"original": ["Put the mug in the bowl."], "randomized": ["mug, bowl", "x"], "nonsense": ["?"]}
    }
}


def rot_6d(generator: np.random.Generator, length: int) -> np.ndarray:
    """The first two rows of rotations."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec(generator.normal(size=(length, 3))).as_matrix()[:, :2].reshape(length, 6)


def create_arrays(seed: int, length: int, recordings: ModuleType) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of the .npz files of an episode."""
    generator = np.random.default_rng(seed)
    observations: dict[str, np.ndarray] = {
        camera: recordings.create_images(seed + number, length, (30, 40)) for number, camera in enumerate(CAMERAS)
    }
    for source in ("actual", "desired"):
        for side in SIDES:
            observations[f"robot__{source}__poses__{BODY[side]}__xyz"] = generator.normal(size=(length, 3))
            observations[f"robot__{source}__poses__{BODY[side]}__rot_6d"] = rot_6d(generator, length)
            observations[f"robot__{source}__joint_position__{BODY[side]}"] = generator.normal(size=(length, 7))
    observations["robot__actual__grippers__left::panda_hand"] = generator.uniform(0, 0.1, length)
    observations["robot__version"] = np.ones((length, 1), np.int64)
    observations["language_instruction"] = np.array(
        ["Put the mug."] * (length // 2) + ["Go home."] * (length - length // 2)
    )
    right, left = (np.concatenate([generator.normal(size=(length, 3)), rot_6d(generator, length)], 1) for _ in SIDES)
    actions = np.concatenate([right, left, generator.uniform(0, 0.1, (length, 2))], 1)
    return {
        "observations": observations,
        "actions": {"actions": actions},
        "intrinsics": {camera: np.diag([50.0, 51, 1]) for camera in CAMERAS},
        "extrinsics": {camera: np.tile(np.eye(4), (length, 1, 1)) for camera in CAMERAS},
    }


def write_episode(folder: Path, arrays: dict[str, dict[str, np.ndarray]], *, is_compressed: bool = True) -> None:
    """Write `processed/` of an episode."""
    folder = folder / "processed"
    folder.mkdir(parents=True)
    (folder / "metadata.yaml").write_text(
        yaml.safe_dump({"camera_id_to_semantic_name": CAMERAS, "other": [1]}), encoding="utf-8"
    )
    for name, values in arrays.items():
        (np.savez_compressed if is_compressed else np.savez)(folder / f"{name}.npz", **values)


@pytest.fixture(scope="module")
def arrays(recordings: ModuleType) -> dict[int, dict[str, dict[str, np.ndarray]]]:
    return {number: create_arrays(number, length, recordings) for number, length in LENGTHS.items()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, arrays: Any) -> Path:
    """A folder as the published archives unpack to."""
    root = tmp_path_factory.mktemp("spartan") / "raw_data"
    for number, values in arrays.items():
        folder = root / "tasks" / TASK / "cabot/sim/bc/teleop" / TIME / "diffusion_spartan" / f"episode_{number}"
        write_episode(folder, values, is_compressed=number != 2)
    return root


def params_of(*sources: Path | str, **options: Any) -> SpartanParams:
    return SpartanParams(source_episodes=[str(source) for source in sources], output_dir="unused", **options)


def numbers_of(found: dict[str, Any]) -> list[int]:
    return sorted(int(name.rpartition("_")[2]) for name in found)


def test_episodes_read_to_what_was_written(raw: Path, arrays: Any, read_all: Any) -> None:
    found = read_all(params_of(raw))
    assert numbers_of(found) == sorted(LENGTHS)
    for name, episode in found.items():
        assert not isinstance(episode, ValueError), episode
        values = arrays[int(name.rpartition("_")[2])]
        length = len(values["actions"]["actions"])
        assert name.startswith(f"{TASK}_{TIME}_")
        assert (episode.ref.task, episode.fps, len(episode.timestamps)) == (TASK, 10, length)
        assert list(episode.cameras) == list(CAMERAS.values())
        for camera_id, camera in CAMERAS.items():
            np.testing.assert_array_equal(episode.metadata["images"][camera], values["observations"][camera_id])
            np.testing.assert_array_equal(episode.intrinsics[camera], values["intrinsics"][camera_id])
            np.testing.assert_array_equal(episode.extrinsics[camera], values["extrinsics"][camera_id])
        for field, expected in values["observations"].items():
            if field.startswith("robot__"):
                np.testing.assert_array_equal(episode.fields[field], expected.reshape(length, -1))
        # the order of the 20 columns, as published
        actions = values["actions"]["actions"]
        action = {
            name.removeprefix("robot__action__"): array for name, array in episode.fields.items() if "action" in name
        }
        np.testing.assert_array_equal(action["poses__right::panda__xyz"], actions[:, :3])
        np.testing.assert_array_equal(action["poses__right::panda__rot_6d"], actions[:, 3:9])
        np.testing.assert_array_equal(action["poses__left::panda__xyz"], actions[:, 9:12])
        np.testing.assert_array_equal(action["poses__left::panda__rot_6d"], actions[:, 12:18])
        np.testing.assert_array_equal(action["grippers__right::panda_hand"], actions[:, 18:19])
        np.testing.assert_array_equal(action["grippers__left::panda_hand"], actions[:, 19:20])
        texts = [(span.start, span.end, span.texts["original"]) for span in episode.instructions]
        assert texts == [(0, length // 2, ["Put the mug."]), (length // 2, length, ["Go home."])]


@pytest.mark.parametrize(
    "below", ["", "tasks", f"tasks/{TASK}", f"tasks/{TASK}/cabot/sim/bc/teleop/{TIME}/diffusion_spartan"]
)
def test_a_source_may_lie_at_any_height(raw: Path, below: str) -> None:
    refs = create_converter(params_of(raw / below)).discover_episodes()
    assert [ref.task for ref in refs] == [TASK] * 3
    assert [ref.episode_id for ref in refs] == [
        ref.episode_id for ref in create_converter(params_of(raw)).discover_episodes()
    ]


def test_recordings_are_read_from_an_object_store(raw: Path, s3_bucket: str, read_all: Any) -> None:
    for path in filter(Path.is_file, raw.rglob("episode_2/*/*")):
        upload(str(path), f"{s3_bucket}/raw/{path.relative_to(raw)}")
    found = read_all(params_of(f"{s3_bucket}/raw"))
    local = read_all(params_of(raw))
    assert set(found) < set(local)
    for name, episode in found.items():
        np.testing.assert_array_equal(
            episode.metadata["images"]["scene_right_0"], local[name].metadata["images"]["scene_right_0"]
        )


def test_hidden_files_are_no_recordings(raw: Path, tmp_path: Path, add_hidden_files: Any) -> None:
    shutil.copytree(raw, tmp_path / "raw")
    converter = create_converter(params_of(tmp_path / "raw"))
    before = converter.discover_episodes(), converter.describe_source()
    add_hidden_files(tmp_path / "raw")
    converter = create_converter(params_of(tmp_path / "raw"))
    assert (converter.discover_episodes(), converter.describe_source()) == before


def test_recordings_of_one_second_have_ids_of_their_own(raw: Path, tmp_path: Path) -> None:
    source = raw / "tasks" / TASK / "cabot"
    for other in (f"{TASK}/riverway", "TurnCup/cabot"):
        shutil.copytree(source, tmp_path / "tasks" / other)
    shutil.copytree(source, tmp_path / "tasks" / TASK / "cabot")
    refs = create_converter(params_of(tmp_path)).discover_episodes()
    assert len({ref.episode_id for ref in refs}) == len(refs) == 9
    assert {ref.task for ref in refs} == {TASK, "TurnCup"}


def test_the_command_writes_relative_actions_and_instructions(
    raw: Path, tmp_path: Path, arrays: Any, read_tars: Any
) -> None:
    (tmp_path / "language.yaml").write_text(yaml.safe_dump(LANGUAGE), encoding="utf-8")
    words = ["robotics", "--type", "spartan", "--source_episodes", f"{raw}/tasks/{TASK}/", "--num_workers", "0"]
    words += ["--language_annotations_path", str(tmp_path / "language.yaml"), "--output_dir", str(tmp_path / "out")]
    main([*words, "--future_lowdim_steps", "3", "--layout", "samples", "--jpeg_quality", "100"])
    spec = parse_spec((tmp_path / "out/robotics.json").read_text(encoding="utf-8"), "robotics.json")
    assert spec.fields["robot__actual__joint_position__left::panda"].unit == "rad"
    assert spec.fields["robot__action__poses__left::panda__rot_6d"].rotation == "rot_6d_rows"
    assert spec.language_types == ("original", "randomized")
    samples = read_tars(tmp_path / "out")
    for key, sample in samples.items():
        name, _, anchor = key.rpartition("_t")
        values, frame = arrays[int(name.rpartition("_")[2])], int(anchor)
        assert sample["language_instructions.json"] == {
            kind: LANGUAGE["language_dict"][TASK][kind] for kind in ("original", "randomized")
        }
        rows = values["observations"]["robot__actual__poses__right::panda__rot_6d"][frame].reshape(2, 3)
        rotation = np.stack([*rows, np.cross(*rows)])
        position = values["observations"]["robot__actual__poses__right::panda__xyz"][frame]
        expected = rotation.T @ (values["actions"]["actions"][frame, :3] - position)
        found = sample["lowdim.npz"]["robot__action__poses__right::panda__xyz_relative"][1]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        image = np.array(Image.open(io.BytesIO(sample["wrist_left_plus_t0.jpg"])))
        assert np.abs(image.astype(int) - values["observations"]["4202"][frame]).mean() < 5


def test_episodes_that_validate_and_fields_that_are_discarded_are_left_out(
    raw: Path, tmp_path: Path, read_all: Any
) -> None:
    path = tmp_path / "validation.json"
    path.write_text(json.dumps({TASK: [2], "OtherTask": [0]}), encoding="utf-8")
    discarded = "robot__desired__joint_position__left::panda"
    found = read_all(params_of(raw, validation_episodes_path=str(path), data_discard_keys=[discarded]))
    assert numbers_of(found) == [0, 11]
    assert all(discarded not in episode.fields for episode in found.values())
    path.write_text(json.dumps({TASK: sorted(LENGTHS)}), encoding="utf-8")
    with pytest.raises(ValueError, match="except the 3 of validation_episodes_path"):
        read_all(params_of(raw, validation_episodes_path=str(path)))


def test_missing_calibration_is_said_and_allowed(
    raw: Path, tmp_path: Path, read_all: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(raw, tmp_path / "raw")
    for path in (tmp_path / "raw").rglob("intrinsics.npz"):
        path.unlink()
    found = read_all(params_of(tmp_path / "raw"))
    assert "3 of 3 episodes have no intrinsics.npz, and are converted without." in capsys.readouterr().out
    assert all(not episode.intrinsics and len(episode.extrinsics) == 2 for episode in found.values())


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


BREAKS = {
    "metadata.yaml is missing": lambda folder, _: (folder / "metadata.yaml").unlink(),
    "metadata.yaml has no camera_id_to_semantic_name": lambda folder, _: (
        (folder / "metadata.yaml").write_text("a: 1", encoding="utf-8")
    ),
    "metadata.yaml:2: not valid": lambda folder, _: (folder / "metadata.yaml").write_text("a: [1", encoding="utf-8"),
    "observations.npz is missing": lambda folder, _: (folder / "observations.npz").unlink(),
    "observations.npz is not a complete .npz": lambda folder, _: cut(folder / "observations.npz"),
    "actions are float64 (12, 19), expected floats (12, 20)": lambda folder, values: np.savez(
        folder / "actions.npz", actions=values["actions"]["actions"][:, :19]
    ),
    "actions are float64 (11, 20), expected floats (12, 20)": lambda folder, values: np.savez(
        folder / "actions.npz", actions=values["actions"]["actions"][1:]
    ),
    "actions.npz has no array 'actions'": lambda folder, _: np.savez(folder / "actions.npz", other=np.zeros(3)),
    "camera '4117' holds float32": lambda folder, values: np.savez(
        folder / "observations.npz", **values["observations"] | {"4117": np.zeros((12, 3, 3, 3), np.float32)}
    ),
    "camera 'scene_right_0' has 11 frames": lambda folder, values: np.savez(
        folder / "observations.npz", **values["observations"] | {"4117": values["observations"]["4117"][1:]}
    ),
    "holds inf at frame 0, column 0": lambda folder, values: np.savez(
        folder / "observations.npz", **values["observations"] | {"robot__version": np.full((12, 1), np.inf)}
    ),
    "array 'robot__version' holds pickled Python objects": lambda folder, values: np.savez(
        folder / "observations.npz",
        **values["observations"] | {"robot__version": np.array([Bomb(folder / "exploded")] * 12, dtype=object)},
    ),
    "intrinsics of camera 'scene_right_0' must be 3 x 3": lambda folder, _: np.savez(
        folder / "intrinsics.npz", **{"4117": np.eye(4)}
    ),
}  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("message", BREAKS)
def test_a_broken_episode_is_named_and_the_others_are_read(
    raw: Path, tmp_path: Path, arrays: Any, read_all: Any, message: str
) -> None:
    shutil.copytree(raw, tmp_path / "raw")
    folder = next((tmp_path / "raw").rglob("episode_2/processed"))
    BREAKS[message](folder, arrays[2])
    found = read_all(params_of(tmp_path / "raw"))
    error = next(found[name] for name in found if name.endswith("_episode_2"))
    assert message in str(error)
    assert str(folder.parent) in str(error)
    assert "\n" not in str(error)
    assert sum(isinstance(episode, ValueError) for episode in found.values()) == 1
    assert not (folder / "exploded").exists()


def test_the_bomb_explodes_where_pickle_is_allowed(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_transforms_and_their_inverses_give_the_fields_back(raw: Path, check_inverse: Any) -> None:
    check_inverse(params_of(raw))


@pytest.mark.slow
def test_the_example_converts_spartan(tmp_path: Path, raw: Path, run_example: Any) -> None:
    flags = ("--validation_fraction", "0.4", "--future_lowdim_steps", "3")
    run_example("spartan", raw, tmp_path / "shards", *flags)
