"""Windows around anchors: frames, masks, padding; and from either layout: the same bits, only what is asked for."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_foundry.data.cache import ShardCache
from vla_foundry.data.pipelines.robotics import ReadWindow
from vla_foundry.data.reader import Dataset, ShardReader
from vla_foundry.data.robotics import complete_params, read_specs
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.robotics.fields import PaddingStrategy, Window, parse_pose_groups
from vla_foundry.robotics.transforms import RelativePoses
from vla_foundry.robotics.windows import RobotWindow, create_windows, image_frames
from vla_foundry.shards import parse_manifest

PAD_MODES: dict[PaddingStrategy, str] = {"copy": "edge", "zero": "constant", "reflect": "reflect"}


def naive_window(values: np.ndarray, anchor: int, window: Window, padding: PaddingStrategy) -> np.ndarray:
    """One window as the published data makes it: the valid slice, padded by numpy."""
    first, last = anchor - window.past, anchor + window.future
    valid = values[max(first, 0) : last + 1]
    left, right = max(0, -first), max(0, last - (len(values) - 1))
    return np.pad(valid, [(left, right)] + [(0, 0)] * (values.ndim - 1), mode=PAD_MODES[padding])  # pyright: ignore[reportCallIssue, reportArgumentType]


@pytest.mark.parametrize("padding", ["copy", "zero", "reflect"])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("window", [Window(0, 0), Window(1, 14), Window(5, 2), Window(6, 20)], ids=str)
def test_windows_equal_numpy_padding_of_the_valid_slice(
    padding: PaddingStrategy, num_frames: int, window: Window
) -> None:
    values = np.random.default_rng(0).normal(size=(num_frames, 2))
    windows = create_windows(np.arange(num_frames), num_frames, window, padding=padding)
    expected = np.stack([naive_window(values, anchor, window, padding) for anchor in range(num_frames)])
    np.testing.assert_array_equal(windows.apply(values), expected)


def test_exactly_one_of_the_three_masks_is_true_at_every_step() -> None:
    windows = create_windows(np.arange(10), 10, Window(3, 4))
    masks = np.stack([windows.past_mask, windows.future_mask, windows.is_padding])
    assert (masks.sum(axis=0) == 1).all()


def test_the_anchor_counts_as_future_and_padding_as_neither() -> None:
    windows = create_windows(np.array([1, 9]), 10, Window(3, 2))
    np.testing.assert_array_equal(windows.past_mask, [[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(windows.future_mask, [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(windows.is_padding, [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]])


def test_gathering_leaves_the_episode_alone_and_keeps_its_type() -> None:
    values = np.arange(1, 11)
    taken = create_windows(np.array([0, 9]), 10, Window(2, 1), padding="zero").apply(values)
    assert taken.dtype == values.dtype
    assert taken.tolist() == [[0, 0, 1, 2], [8, 9, 10, 0]]
    assert values.tolist() == list(range(1, 11))


def test_an_anchor_outside_the_episode_is_an_error() -> None:
    with pytest.raises(ValueError, match="anchor 10 lies outside the episode of 10 frames"):
        create_windows(np.array([3, 10]), 10, Window(1, 1))


def test_image_indices_are_clipped_to_the_episode() -> None:
    frames = image_frames(np.array([0, 4, 9]), [-5, -1, 0, 3], 10)
    assert frames.tolist() == [[0, 0, 0, 3], [0, 3, 4, 7], [4, 8, 9, 9]]


@pytest.mark.shared_data
def test_published_masks_and_relative_poses_are_reproduced(shared_data: Path) -> None:
    groups = parse_pose_groups(
        [
            {
                "name": f"{source} {side}",
                "position_key": f"robot__{source}__poses__{side}::panda__xyz",
                "rotation_key": f"robot__{source}__poses__{side}::panda__rot_6d",
            }
            for source in ("action", "desired", "actual")
            for side in ("left", "right")
        ]
    )
    num_samples = 0
    with tarfile.open(shared_data / "small_lbm_dataset" / "shard_000000.tar") as tar:
        samples: dict[str, dict[str, bytes]] = {}
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[suffix] = file.read()
    for members in samples.values():
        arrays = dict(np.load(io.BytesIO(members["lowdim.npz"])))
        metadata = json.loads(members["metadata.json"])
        windows = create_windows(
            np.array([metadata["anchor_timestep"]]), metadata["original_episode_length"], Window(1, 14)
        )
        np.testing.assert_array_equal(windows.past_mask[0], arrays["past_mask"])
        np.testing.assert_array_equal(windows.future_mask[0], arrays["future_mask"])
        images = image_frames(windows.anchors, [-1, 0], metadata["original_episode_length"])
        assert images[0].tolist() == metadata["image_timesteps"]
        relative = RelativePoses(groups, metadata["anchor_relative_idx"]).apply(arrays)
        assert len(relative) == 12
        for name, values in relative.items():
            np.testing.assert_allclose(values, arrays[name], atol=1e-9, err_msg=name)
        num_samples += 1
    assert num_samples == 5


Write = Callable[..., Path]
Create = Callable[..., Any]
Params = Callable[..., RoboticsDataParams]


def read_windows(manifest: Path, params: RoboticsDataParams) -> list[RobotWindow]:
    """All windows of a dataset, in the order of its shards."""
    entries = tuple(parse_manifest(manifest.read_text(encoding="utf-8"), str(manifest)))
    dataset = Dataset(manifest=str(manifest), modality="robotics", entries=entries)
    reader = ShardReader([dataset], ShardCache(str(manifest.parent / "cache"), 10**9))
    spec = complete_params(params).create_window_spec(read_specs([str(manifest)])[0])
    read, poses = ReadWindow([spec]), RelativePoses(spec.pose_groups, spec.window.anchor, spec.padding)
    windows = []
    for number, entry in enumerate(entries):
        shard = reader.open(0, number)
        for row in range(entry.num_sequences):
            window: RobotWindow = read(0, shard, row)["window"]
            windows.append(replace(window, fields=window.fields | poses.apply(window.fields, window.is_padding)))
    return windows


def assert_same(one: RobotWindow, other: RobotWindow) -> None:
    assert (one.episode_id, one.anchor, one.instructions) == (other.episode_id, other.anchor, other.instructions)
    assert one.images == other.images
    for mask in ("past_mask", "future_mask", "is_padding"):
        assert np.array_equal(getattr(one, mask), getattr(other, mask))
    for mine, theirs in ((one.fields, other.fields), (one.calibration, other.calibration)):
        assert mine.keys() >= theirs.keys() or theirs.keys() >= mine.keys()
        for name in mine.keys() & theirs.keys():
            assert mine[name].dtype == theirs[name].dtype
            assert np.array_equal(mine[name], theirs[name]), name


# what is reflected is the part of the window within the episode, which is another one in a part of the window
@pytest.mark.parametrize(
    ("padding", "window"),
    [("copy", (1, 3)), ("copy", (0, 2)), ("copy", (1, 0)), ("zero", (1, 3)), ("zero", (0, 2)), ("reflect", (1, 3))],
)
def test_both_layouts_give_the_same_bits(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, padding: str, window: Any
) -> None:
    recordings = [create_recording(number, 7 + number) for number in range(3)]
    found = []
    for layout in ("episodes", "samples"):
        manifest = write_robot_data(tmp_path / layout, recordings, layout=layout, padding=padding)
        params = create_params(
            manifest,
            lowdim_past_timesteps=window[0],
            lowdim_future_timesteps=window[1],
            intrinsics_fields=["intrinsics.wrist"],
        )
        found.append(read_windows(manifest, params))
    assert len(found[0]) == len(found[1]) == 7 + 8 + 9
    for one, other in zip(*found, strict=True):
        assert_same(one, other)
        assert {name for name in one.fields if name.endswith("_relative")} <= other.fields.keys()
        assert len(one.is_padding) == sum(window) + 1
        assert one.calibration["intrinsics.wrist"].shape == (3, 3)


def test_windows_are_what_numpy_makes_of_the_recording(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    recording = create_recording(4, 8)
    manifest = write_robot_data(tmp_path, [recording])
    params = create_params(
        manifest, lowdim_past_timesteps=2, lowdim_future_timesteps=5, image_indices=[-3, 2], camera_names=["wrist"]
    )
    for window in read_windows(manifest, params):
        steps = window.anchor + np.arange(-2, 6)
        frames = np.clip(steps, 0, 7)
        assert np.array_equal(window.is_padding, steps != frames)
        assert np.array_equal(window.past_mask, (steps < window.anchor) & (steps >= 0))
        assert np.array_equal(window.future_mask, (steps >= window.anchor) & (steps < 8))
        gripper = "robot__action__grippers__left::panda_hand"
        assert np.array_equal(window.fields[gripper], recording.fields[gripper][frames])
        near = np.clip([window.anchor - 3, window.anchor + 2], 0, 7)
        assert window.images == [recording.frames["wrist"][frame] for frame in near]


def test_relative_poses_are_seen_from_the_measured_pose_at_the_anchor(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    recording = create_recording(5, 6)
    manifest = write_robot_data(tmp_path, [recording])

    def transform(source: str, frame: int) -> np.ndarray:
        name = f"robot__{source}__poses__left::panda"
        rows = recording.fields[f"{name}__rot_6d"][frame].astype(np.float64).reshape(2, 3)
        matrix = np.eye(4)
        matrix[:3, :3] = [*rows, np.cross(rows[0], rows[1])]
        matrix[:3, 3] = recording.fields[f"{name}__xyz"][frame]
        return matrix

    for window in read_windows(manifest, create_params(manifest)):
        reference = np.linalg.inv(transform("actual", window.anchor))
        for step, frame in enumerate(np.clip(window.anchor + np.arange(-1, 4), 0, 5)):
            expected = reference @ transform("action", int(frame))
            name = "robot__action__poses__left::panda"
            assert np.allclose(window.fields[f"{name}__xyz_relative"][step], expected[:3, 3], atol=1e-5)
            rows = expected[:2, :3].reshape(6)
            assert np.allclose(window.fields[f"{name}__rot_6d_relative"][step], rows, atol=1e-5)


def test_an_instruction_holds_at_its_own_frames_only(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(2, 6)])
    texts = [window.instructions["original"] for window in read_windows(manifest, create_params(manifest))]
    assert texts == [["do task 2"]] * 3 + [["finish task 2"]] * 3


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Change the members of a tar; None leaves one out. Its index is made again."""
    with tarfile.open(path) as tar:
        members = []
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            members.append((member.name, file.read()))
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            changed = change(name, content)
            if changed is not None:
                entry = tarfile.TarInfo(name)
                entry.size = len(changed)
                tar.addfile(entry, io.BytesIO(changed))
    path.with_name(path.stem + ".index.json").unlink(missing_ok=True)


@pytest.mark.parametrize("layout", ["episodes", "samples"])
def test_what_is_not_asked_for_is_not_read(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, layout: str
) -> None:
    """Images of other cameras are rubbish, and other arrays damaged: it makes no difference."""
    recordings = [create_recording(1, 5)]
    params = create_params(
        write_robot_data(tmp_path / "whole", recordings, layout=layout),
        camera_names=["wrist"],
        action_fields=["robot__action__grippers__left::panda_hand"],
        proprioception_fields=[],
    )
    expected = read_windows(tmp_path / "whole" / "manifest.jsonl", params)
    manifest = write_robot_data(tmp_path / "damaged", recordings, layout=layout)

    def damage(name: str, content: bytes) -> bytes:
        if "scene.left" in name.lower():
            return b"rubbish"
        if name.endswith("npz"):
            place = content.index(b"robot__actual__poses__left::panda__rot_6d.npy") + 240
            return content[:place] + b"\xaa" * 4 + content[place + 4 :]
        return content

    rewrite(tmp_path / "damaged" / "shard_000000.tar", damage)
    found = read_windows(manifest, params)
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("layout", ["episodes", "samples"])
def test_a_missing_array_is_named(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, layout: str
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(1, 5)], layout=layout)

    def leave_out(name: str, content: bytes) -> bytes:
        if not name.endswith("npz"):
            return content
        with np.load(io.BytesIO(content)) as arrays:
            kept: dict[str, Any] = {key: arrays[key] for key in arrays if not key.endswith("panda_hand")}
        buffer = io.BytesIO()
        np.savez(buffer, **kept)
        return buffer.getvalue()

    rewrite(tmp_path / "shard_000000.tar", leave_out)
    with pytest.raises(ValueError, match=r"array 'robot__action__grippers__left::panda_hand' is unknown"):
        read_windows(manifest, create_params(manifest))
