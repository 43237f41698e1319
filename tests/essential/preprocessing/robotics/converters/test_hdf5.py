"""HDF5 files of robomimic, LIBERO and ALOHA read to what was written, and what is wrong is said in one line."""

import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from vla_foundry.params.commands.preprocessing_robotics import HDF5Params
from vla_foundry.preprocessing.command import main
from vla_foundry.preprocessing.robotics.converters.converter import create_converter
from vla_foundry.robotics.spec import parse_spec
from vla_foundry.storage.uri import upload

LENGTHS = {1: 7, 2: 9, 10: 8}
SIZE = (20, 28)


def params_of(source: Path | str, layout: str, **options: Any) -> HDF5Params:
    options = {"field_map": f"field_maps/{layout}.yaml", "output_dir": "unused", **options}
    return HDF5Params(source_episodes=[str(source)], **options)


def numbers(seed: int, length: int, width: int) -> np.ndarray:
    return np.random.default_rng([seed, width]).normal(size=(length, width))


def write_robomimic(path: Path, recordings: ModuleType) -> Path:
    """Demonstrations as robomimic's datasets hold them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})
        data.attrs["total"] = sum(LENGTHS.values())
        for demo, length in LENGTHS.items():
            group = data.create_group(f"demo_{demo}")
            group.attrs["num_samples"] = length
            group["actions"] = numbers(demo, length, 7)
            group["rewards"] = np.zeros(length)
            quaternion = numbers(demo, length, 4)
            group["obs/robot0_eef_pos"] = numbers(demo, length, 3)
            group["obs/robot0_eef_quat"] = quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)
            group["obs/robot0_gripper_qpos"] = numbers(demo, length, 2)
            group["obs/robot0_joint_pos"] = numbers(demo + 1, length, 7)
            group["obs/object"] = numbers(demo, length, 10)
            for number, camera in enumerate(("agentview", "robot0_eye_in_hand")):
                images = recordings.create_images(demo + number, length, SIZE)
                group.create_dataset(f"obs/{camera}_image", data=images, chunks=(3, *SIZE, 3), compression="gzip")
            group["obs/agentview_depth"] = (1 + numbers(demo, length, SIZE[0] * SIZE[1]) / 10).reshape(length, *SIZE, 1)
    return path


def write_libero(path: Path, recordings: ModuleType) -> Path:
    """Demonstrations as LIBERO's datasets hold them; images lie with their lowest row first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        data.attrs["problem_info"] = json.dumps({"language_instruction": "put the bowl on the plate"})
        for demo, length in LENGTHS.items():
            group = data.create_group(f"demo_{demo}")
            group["actions"] = numbers(demo, length, 7)
            for name, width in {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2, "joint_states": 7}.items():
                group[f"obs/{name}"] = numbers(demo, length, width)
            for number, camera in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                group[f"obs/{camera}"] = recordings.create_images(demo + number, length, SIZE)[:, ::-1]
    return path


def write_aloha(folder: Path, recordings: ModuleType, *, is_compressed: bool) -> Path:
    """Episodes as ALOHA records them: one a file, images as arrays or as padded JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for demo, length in LENGTHS.items():
        with h5py.File(folder / f"episode_{demo}.hdf5", "w") as file:
            file.attrs["sim"] = False
            file["action"] = numbers(demo, length, 14).astype(np.float32)
            for name in ("qpos", "qvel", "effort"):
                file[f"observations/{name}"] = numbers(demo + 1, length, 14)
            for number, camera in enumerate(("cam_high", "cam_left_wrist")):
                images = recordings.create_images(demo + number, length, SIZE)
                if not is_compressed:
                    file[f"observations/images/{camera}"] = images
                    continue
                encoded = [recordings.encode_image(image, "jpeg") for image in images]
                longest = max(len(data) for data in encoded)
                padded = [np.frombuffer(data.ljust(longest, b"\0"), np.uint8) for data in encoded]
                file[f"observations/images/{camera}"] = np.stack(padded)
    return folder


def test_robomimic_files_read_to_what_was_written(tmp_path: Path, recordings: ModuleType, read_all: Any) -> None:
    path = write_robomimic(tmp_path / "lift" / "ph.hdf5", recordings)
    found = read_all(params_of(tmp_path / "lift", "robomimic", instruction="lift the cube"))
    assert sorted(found) == ["lift_ph_demo_1", "lift_ph_demo_10", "lift_ph_demo_2"]
    with h5py.File(path) as file:
        for demo, length in LENGTHS.items():
            episode, group = found[f"lift_ph_demo_{demo}"], file[f"data/demo_{demo}"]
            assert episode.fps == 20
            np.testing.assert_allclose(episode.timestamps, np.arange(length) / 20)
            actions = [name for name in episode.fields if "__action__" in name]
            np.testing.assert_array_equal(
                np.concatenate([episode.fields[name] for name in actions], 1), group["actions"]
            )
            for name, source in {
                "poses__right::panda__xyz": "eef_pos",
                "poses__right::panda__quat": "eef_quat",
            }.items():
                np.testing.assert_array_equal(episode.fields[f"robot__actual__{name}"], group[f"obs/robot0_{source}"])
            for camera in ("agentview", "robot0_eye_in_hand"):
                np.testing.assert_array_equal(episode.metadata["images"][camera], group[f"obs/{camera}_image"])
            assert episode.instructions[0].texts == {"original": ["lift the cube"]}


def test_the_command_converts_robomimic(tmp_path: Path, recordings: ModuleType, read_tars: Any) -> None:
    path = write_robomimic(tmp_path / "lift" / "ph.hdf5", recordings)
    words = ["robotics", "--type", "hdf5", "--field_map", "field_maps/robomimic.yaml", "--num_workers", "0"]
    words += ["--source_episodes", str(path), "--output_dir", str(tmp_path / "out"), "--jpeg_quality", "100"]
    main([*words, "--camera_names", "[agentview]", "--future_lowdim_steps", "3"])
    spec = parse_spec((tmp_path / "out/robotics.json").read_text(encoding="utf-8"), "robotics.json")
    assert spec.fields["robot__action__poses__right::panda__xyz_delta"].representation == "delta"
    assert "robot__actual__poses__right::panda__quat_relative" in spec.fields
    members = read_tars(tmp_path / "out")
    for demo, length in LENGTHS.items():
        found = members[f"lift_ph_demo_{demo}"]
        np.testing.assert_array_equal(
            found["lowdim.npz"]["robot__actual__joint_position__right::panda"], numbers(demo + 1, length, 7)
        )
        images = recordings.create_images(demo, length, SIZE)
        for frame in range(length):
            image = np.array(Image.open(io.BytesIO(found[f"agentview.{frame:06d}.jpg"]))).astype(int)
            assert np.abs(image - images[frame]).mean() < 5


def test_libero_files_read_upright_with_their_instruction(
    tmp_path: Path, recordings: ModuleType, read_all: Any
) -> None:
    path = write_libero(tmp_path / "libero_spatial" / "put_the_bowl_demo.hdf5", recordings)
    found = read_all(params_of(path, "libero"))
    for demo, length in LENGTHS.items():
        episode = found[f"libero_spatial_put_the_bowl_demo_demo_{demo}"]
        assert episode.ref.task == "put the bowl on the plate"
        assert episode.instructions[0].texts == {"original": ["put the bowl on the plate"]}
        np.testing.assert_array_equal(
            episode.metadata["images"]["agentview"], recordings.create_images(demo, length, SIZE)
        )
        expected = numbers(demo, length, 7)[:, 6:]
        np.testing.assert_array_equal(episode.fields["robot__action__grippers__right::panda_hand"], expected)
    assert create_converter(params_of(path, "libero")).pose_groups()[0].rotation_format == "axis_angle"


@pytest.mark.parametrize("is_compressed", [False, True])
def test_aloha_files_read_to_what_was_written(
    tmp_path: Path, recordings: ModuleType, read_all: Any, is_compressed: bool
) -> None:
    folder = write_aloha(tmp_path / "cups_open", recordings, is_compressed=is_compressed)
    found = read_all(params_of(folder, "aloha", instruction="open the cup"))
    assert len(found) == 3
    for demo, length in LENGTHS.items():
        episode = found[f"cups_open_episode_{demo}"]
        assert (episode.fps, episode.ref.task) == (50, "open the cup")
        assert list(episode.cameras) == ["cam_high", "cam_left_wrist"]
        images = recordings.create_images(demo, length, SIZE)
        stored = list(episode.cameras["cam_high"])
        if is_compressed:
            jpegs = [recordings.encode_image(image, "jpeg") for image in images]
            assert stored == jpegs
            images = np.stack([np.array(Image.open(io.BytesIO(data))) for data in jpegs])
        else:
            np.testing.assert_array_equal(np.stack(stored), images)
        np.testing.assert_array_equal(episode.metadata["images"]["cam_high"], images)
        right = episode.fields["robot__action__joint_position__right::vx300s"]
        np.testing.assert_array_equal(right, numbers(demo, length, 14).astype(np.float32)[:, 7:13])
        assert right.dtype == np.float32


def test_depth_and_swapped_colours_are_told_by_the_map(tmp_path: Path, recordings: ModuleType, read_all: Any) -> None:
    path = write_robomimic(tmp_path / "lift" / "ph.hdf5", recordings)
    (tmp_path / "map.yaml").write_text(
        "episodes: data/demo_*\nfps: 20\nfields: {action: {source: actions}}\ncameras:\n"
        "  view: {source: obs/agentview_image, is_bgr: true}\n"
        "  depth: {source: obs/agentview_depth, depth_scale: 1000}\n",
        encoding="utf-8",
    )
    episode = read_all(params_of(path, "", field_map=str(tmp_path / "map.yaml")))["lift_ph_demo_2"]
    with h5py.File(path) as file:
        group = file["data/demo_2/obs"]
        np.testing.assert_array_equal(episode.metadata["images"]["view"], group["agentview_image"][()][..., ::-1])
        expected = np.round(group["agentview_depth"][..., 0] * 1000)
        np.testing.assert_array_equal(episode.metadata["images"]["depth"], expected)
        assert episode.metadata["images"]["depth"].dtype == np.uint16


def test_files_are_read_from_an_object_store(
    tmp_path: Path, recordings: ModuleType, s3_bucket: str, read_all: Any
) -> None:
    path = write_libero(tmp_path / "set" / "bowl.hdf5", recordings)
    upload(str(path), f"{s3_bucket}/set/bowl.hdf5")
    local, remote = read_all(params_of(path, "libero")), read_all(params_of(f"{s3_bucket}/set", "libero"))
    assert list(local) == list(remote)
    for one, other in zip(local.values(), remote.values(), strict=True):
        for camera, images in one.metadata["images"].items():
            np.testing.assert_array_equal(images, other.metadata["images"][camera])


def test_hidden_files_are_no_recordings(
    tmp_path: Path, recordings: ModuleType, read_all: Any, add_hidden_files: Any
) -> None:
    write_aloha(tmp_path / "set", recordings, is_compressed=False)
    params = params_of(tmp_path / "set", "aloha", instruction="open the cup")
    before = list(read_all(params)), create_converter(params).describe_source()
    add_hidden_files(tmp_path / "set")
    assert (list(read_all(params)), create_converter(params).describe_source()) == before


BREAKS: dict[str, Any] = {
    "obs/robot0_eef_pos is missing": lambda data: data.__delitem__("demo_2/obs/robot0_eef_pos"),
    "actions has 5 rows, but": lambda data: replace(data, "demo_2/actions", lambda values: values[:5]),
    "num_samples says 8": lambda data: data["demo_2"].attrs.modify("num_samples", 8),
    "actions has 6 columns, but field": lambda data: replace(data, "demo_2/actions", lambda values: values[:, :6]),
    "is float32": lambda data: replace(data, "demo_2/obs/robot0_eef_pos", lambda values: values.astype(np.float32)),
    "holds object of shape": lambda data: replace(
        data, "demo_2/actions", lambda values: values.astype(bytes).astype(object)
    ),
    "not images": lambda data: replace(data, "demo_2/obs/agentview_image", lambda values: values.astype(np.float32)),
    "camera 'agentview' is missing": lambda data: data.__delitem__("demo_2/obs/agentview_image"),
    "an image of 60000 x 60000 pixels is too large": lambda data: promise(
        data, "demo_2/obs/agentview_image", (9, 60_000, 60_000, 3), "u1", (1, 100, 100, 3)
    ),
    "demo_2/obs/agentview_image holds 3,600,000,000 bytes to read at once": lambda data: promise(
        data, "demo_2/obs/agentview_image", (9, 3_600_000_000), "u1", (1, 1000)
    ),
    "demo_2/actions holds 7,200,000,000,000 bytes to read at once": lambda data: promise(
        data, "demo_2/actions", (9, 100_000_000_000), "f8", (9, 1000)
    ),
    "demo_2/actions: a chunk holds 3,200,000,000 bytes": lambda data: promise(
        data, "demo_2/actions", (9, 7), "f8", (1, 400_000_000)
    ),
    "holds nan at frame 4": lambda data: replace(data, "demo_2/actions", lambda values: spoil(values, 4)),
    "camera 'agentview' has 8 frames, the episode 9": lambda data: replace(
        data, "demo_2/obs/agentview_image", lambda values: values[:8]
    ),
    "actions is stored in another file": lambda data: link_to_another_file(data, "demo_2/actions"),
    "actions is stored in another file (raw.bin)": lambda data: store_outside(data, "demo_2/actions"),
    "actions is stored in another file (other.hdf5)": lambda data: map_from_another_file(data, "demo_2/actions"),
    "demo_2/actions, of /data/part, is stored in another file (raw.bin)": lambda data: map_from_a_part(
        data, "demo_2/actions", lambda: store_outside(data, "part")
    ),
    "demo_2/actions, of /data/part, is stored in another file (other.hdf5)": lambda data: map_from_a_part(
        data, "demo_2/actions", lambda: map_from_another_file(data, "part")
    ),
    "/data/part is stored in another file": lambda data: map_from_a_part(
        data, "demo_2/actions", lambda: link_to_another_file(data, "part")
    ),
    "actions is virtual, and its part /data/part is missing": lambda data: map_from_a_part(
        data, "demo_2/actions", lambda: data.__delitem__("part")
    ),
    "demo_2/obs/robot0_eef_pos is stored in another file": lambda data: link_group_to_another_file(data, "demo_2/obs"),
    "demo_2/obs/agentview_image is stored in another file": lambda data: link_to_another_file(
        data, "demo_2/obs/agentview_image"
    ),
}


def map_from_a_part(data: h5py.Group, path: str, change: Any) -> None:
    """Make an array a virtual one of `part` of the same file, and change that."""
    values = data[path][()]
    data["part"] = values
    del data[path]
    layout = h5py.VirtualLayout(shape=values.shape, dtype=values.dtype)
    layout[:] = h5py.VirtualSource(".", "/data/part", shape=values.shape)
    data.create_virtual_dataset(path, layout)
    change()


def link_group_to_another_file(data: h5py.Group, path: str) -> None:
    other = Path(data.file.filename).parent / "other.h5.secret"
    with h5py.File(other, "w") as file:
        data.copy(path, file, "group")
    del data[path]
    data[path] = h5py.ExternalLink(str(other), "group")


def link_to_another_file(data: h5py.Group, path: str) -> None:
    other = Path(data.file.filename).parent / "other.h5.secret"
    with h5py.File(other, "w") as file:
        file["values"] = data[path][()]
    del data[path]
    data[path] = h5py.ExternalLink(str(other), "values")


def store_outside(data: h5py.Group, path: str) -> None:
    values = data[path][()]
    del data[path]
    external = [("raw.bin", 0, h5py.h5f.UNLIMITED)]
    data.create_dataset(path, shape=values.shape, dtype=values.dtype, external=external)


def map_from_another_file(data: h5py.Group, path: str) -> None:
    values = data[path][()]
    del data[path]
    layout = h5py.VirtualLayout(shape=values.shape, dtype=values.dtype)
    layout[:] = h5py.VirtualSource("other.hdf5", "values", shape=values.shape)
    data.create_virtual_dataset(path, layout)


def promise(data: h5py.Group, path: str, shape: tuple[int, ...], kind: str, chunks: tuple[int, ...]) -> None:
    """Make an array of a shape whose values were never written: the file stays small."""
    del data[path]
    most = tuple(max(size, chunk) for size, chunk in zip(shape, chunks, strict=True))
    data.create_dataset(path, shape=shape, dtype=kind, chunks=chunks, maxshape=most, compression="gzip")


def replace(data: h5py.Group, path: str, change: Any) -> None:
    values = change(data[path][()])
    del data[path]
    data[path] = values


def spoil(values: np.ndarray, row: int) -> np.ndarray:
    values[row, 1] = np.nan
    return values


@pytest.mark.parametrize("message", BREAKS)
def test_a_broken_episode_is_named_and_the_others_are_read(
    tmp_path: Path, recordings: ModuleType, read_all: Any, message: str
) -> None:
    path = write_robomimic(tmp_path / "lift" / "ph.hdf5", recordings)
    with h5py.File(path, "a") as file:
        BREAKS[message](file["data"])
    found = read_all(params_of(path, "robomimic"))
    assert message in str(found["lift_ph_demo_2"])
    assert f"{path} /data/demo_2: " in str(found["lift_ph_demo_2"])
    assert "\n" not in str(found["lift_ph_demo_2"])
    assert not isinstance(found["lift_ph_demo_1"], ValueError)


def test_a_file_that_is_cut_off_or_says_no_rate_is_named(tmp_path: Path, recordings: ModuleType) -> None:
    path = write_robomimic(tmp_path / "lift" / "ph.hdf5", recordings)
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_kwargs": {}})
    converter = create_converter(params_of(path, "robomimic"))
    ref = converter.discover_episodes()[0]
    with pytest.raises(ValueError, match=r"'env_args' of 'data' holds no 'env_kwargs\.control_freq'"):
        converter.read_episode(ref)
    assert create_converter(params_of(path, "robomimic", fps=15.0)).read_episode(ref).fps == 15
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"ph\.hdf5 is not a complete HDF5 file"):
        create_converter(params_of(path, "robomimic")).discover_episodes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no HDF5 file"):
        create_converter(params_of(tmp_path / "empty", "robomimic")).discover_episodes()


def test_an_array_may_be_virtual_within_its_file(tmp_path: Path, recordings: ModuleType, read_all: Any) -> None:
    path = write_robomimic(tmp_path / "lift" / "ph.hdf5", recordings)
    before = read_all(params_of(path, "robomimic"))["lift_ph_demo_2"]
    with h5py.File(path, "a") as file:
        map_from_a_part(file["data"], "demo_2/actions", lambda: None)
    after = read_all(params_of(path, "robomimic"))["lift_ph_demo_2"]
    for name, values in before.fields.items():
        np.testing.assert_array_equal(after.fields[name], values)


@pytest.mark.parametrize("layout", ["robomimic", "libero", "aloha"])
def test_transforms_and_their_inverses_give_the_fields_back(
    layout: str, tmp_path: Path, recordings: ModuleType, check_inverse: Any
) -> None:
    path = tmp_path / "set" / "demos.hdf5"
    if layout == "aloha":
        write_aloha(path.parent, recordings, is_compressed=False)
    else:
        {"robomimic": write_robomimic, "libero": write_libero}[layout](path, recordings)
    check_inverse(params_of(path.parent, layout, instruction="lift"))


@pytest.mark.slow
def test_the_example_converts_robomimic(tmp_path: Path, recordings: ModuleType, run_example: Any) -> None:
    write_robomimic(tmp_path / "lift" / "ph.hdf5", recordings)
    flags = ["--field_map", "field_maps/robomimic.yaml", "--instruction", "lift", "--validation_fraction", "0.4"]
    run_example("hdf5", tmp_path / "lift", tmp_path / "shards", *flags, "--future_lowdim_steps", "3")
