"""Another rate: positions are linear, rotations turn evenly, switches hold, images are the nearest in time."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from vla_foundry.preprocessing.robotics.converters.converter import ArrayFrames, Episode, EpisodeRef
from vla_foundry.preprocessing.robotics.resampling import resample_episode
from vla_foundry.robotics.episode_blocks import InstructionSpan
from vla_foundry.robotics.spec import FieldDescription

FIELDS = {
    "xyz": FieldDescription(shape=(3,), dtype="float64"),
    "quaternion": FieldDescription(shape=(4,), dtype="float64", rotation="quaternion_xyzw"),
    "euler": FieldDescription(shape=(3,), dtype="float64", rotation="euler_xyz"),
    "switch": FieldDescription(shape=(1,), is_discrete=True),
}


def create_episode(times: np.ndarray) -> tuple[Episode, Rotation]:
    generator = np.random.default_rng(0)
    rotation = Rotation.from_rotvec(np.cumsum(generator.normal(size=(len(times), 3)) / 3, axis=0))
    episode = Episode(
        ref=EpisodeRef("a", "a"),
        fps=10.0,
        timestamps=times,
        fields={
            "xyz": generator.normal(size=(len(times), 3)),
            "quaternion": rotation.as_quat(),
            "euler": rotation.as_euler("xyz"),
            "switch": (np.arange(len(times))[:, None] // 3 % 2).astype(np.float32),
        },
        cameras={"front": ArrayFrames(np.zeros((len(times), 4, 4, 3), np.uint8))},
        instructions=[InstructionSpan(start=0, end=4, texts={}), InstructionSpan(start=4, end=len(times), texts={})],
        intrinsics={"front": np.arange(len(times))[:, None, None] * np.ones((1, 3, 3)), "static": np.eye(3)},
    )
    return episode, rotation


@pytest.mark.parametrize("fps", [4.0, 10.0, 27.0])
def test_each_kind_of_value_follows_its_rule(fps):
    times = 5.0 + np.arange(21) / 10 + np.random.default_rng(1).uniform(-0.03, 0.03, 21)
    episode, rotation = create_episode(times)
    resampled, sources = resample_episode(episode, fps, FIELDS, ())
    new = times[0] + np.arange(int((times[-1] - times[0]) * fps) + 1) / fps
    np.testing.assert_allclose(resampled.timestamps, new)
    assert resampled.fps == fps
    for column in range(3):
        expected = np.interp(new, times, episode.fields["xyz"][:, column])
        np.testing.assert_allclose(resampled.fields["xyz"][:, column], expected, atol=2e-3)
    expected_rotation = Slerp(times, rotation)(new)
    for name, found in (
        ("quaternion", Rotation.from_quat(resampled.fields["quaternion"])),
        ("euler", Rotation.from_euler("xyz", resampled.fields["euler"])),
    ):
        assert np.max((found.inv() * expected_rotation).magnitude()) < 2e-3, name
    before = np.array([np.flatnonzero(times <= time + 1e-4)[-1] for time in new])
    np.testing.assert_array_equal(resampled.fields["switch"], episode.fields["switch"][before])
    assert resampled.fields["switch"].dtype == np.float32
    distance = np.abs(times[None] - new[:, None])
    np.testing.assert_allclose(distance[np.arange(len(new)), sources], distance.min(axis=1))
    np.testing.assert_array_equal(resampled.intrinsics["front"][:, 0, 0], sources)
    assert resampled.intrinsics["static"].shape == (3, 3)
    first, second = resampled.instructions
    assert (first.start, first.end, second.end) == (0, second.start, len(new))
    assert first.end == int(np.argmax(before >= 4))


def test_the_same_rate_changes_nothing():
    episode, _ = create_episode(np.arange(11) / 10 + 3.7)
    resampled, sources = resample_episode(episode, 10.0, FIELDS, ())
    np.testing.assert_array_equal(sources, np.arange(11))
    for name, values in episode.fields.items():
        np.testing.assert_array_equal(resampled.fields[name], values, err_msg=name)


def test_half_the_rate_takes_every_second_frame():
    episode, _ = create_episode(np.arange(11) / 10)
    resampled, sources = resample_episode(episode, 5.0, FIELDS, ())
    np.testing.assert_array_equal(sources, np.arange(0, 11, 2))
    np.testing.assert_array_equal(resampled.fields["quaternion"], episode.fields["quaternion"][::2])


def test_a_job_resamples_images_and_numbers_together(tmp_path, rig, write_episodes, preprocess, read_tars):
    episodes = write_episodes(tmp_path / "raw", [21])
    folder = preprocess(tmp_path / "raw", tmp_path / "out", target_fps=20.0)
    members = read_tars(folder)["run_0"]
    assert members["episode.json"]["num_frames"] == 41
    assert members["episode.json"]["fps"] == 20.0
    np.testing.assert_allclose(
        members["lowdim.npz"][rig.ACTUAL_XYZ][::2], episodes["run_0"][f"field|{rig.ACTUAL_XYZ}"], atol=1e-12
    )
    # of two frames as near as each other, the earlier; each is stored for every new frame that shows it
    assert members["front.000005.jpg"] == members["front.000004.jpg"] != members["front.000006.jpg"]
