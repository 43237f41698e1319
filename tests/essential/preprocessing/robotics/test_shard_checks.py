"""`manifest verify` names what is wrong with a shard of whole episodes."""

import io
import tarfile
import tempfile
from typing import BinaryIO, cast

import numpy as np
import pytest

from vla_foundry.preprocessing.manifest import find_faults
from vla_foundry.robotics.episode_blocks import EpisodeCamera, EpisodeInfo, format_arrays, format_episode
from vla_foundry.shards import ManifestEntry

CAMERA = EpisodeCamera(original_size=(2, 2), size=(2, 2), extension="jpg")
INFO = EpisodeInfo(episode_id="a", task=None, num_frames=2, fps=1.0, anchors=(0, 1), cameras={"top": CAMERA})
ARRAYS = {"state": np.zeros((2, 3)), "timestamp": np.arange(2.0), "extrinsics.top": np.eye(4)}
WHOLE = {
    "a.episode.json": format_episode(INFO).encode(),
    "a.lowdim.npz": format_arrays(ARRAYS),
    "a.top.000000.jpg": b"one",
    "a.top.000001.jpg": b"two",
}


def faults_of(members: list[tuple[str, bytes]], num_sequences: int = 2) -> list[str]:
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        entry = ManifestEntry(shard="s", num_sequences=num_sequences)
        return list(find_faults(cast(BinaryIO, file), entry))


def test_a_whole_shard_has_no_faults():
    assert faults_of(list(WHOLE.items())) == []


def without(arrays: dict[str, np.ndarray], name: str) -> bytes:
    return format_arrays({key: value for key, value in arrays.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"a.lowdim.npz": b"PK"}, "member 'a.lowdim.npz': the .npz is truncated or not an .npz"),
        ({"a.lowdim.npz": without(ARRAYS, "timestamp")}, "episode 'a' has no array 'timestamp'"),
        (
            {"a.lowdim.npz": format_arrays(ARRAYS | {"state": np.zeros((3, 3))})},
            "the arrays and cameras of episode 'a' have different lengths: [2, 3]",
        ),
        ({"a.top.000001.jpg": b""}, "1 members of episode 'a' are empty"),
        ({"a.top.000002.jpg": b"x"}, "member 'a.top.000002.jpg' is of no camera or frame of its episode"),
    ],
)
def test_each_fault_of_an_episode_is_named(changes, fault):
    assert faults_of(list((WHOLE | changes).items())) == [fault]


def test_missing_arrays_and_episodes_that_stand_twice_are_named():
    members = [(name, content) for name, content in WHOLE.items() if name != "a.lowdim.npz"]
    assert faults_of(members) == ["episode 'a' has no member .lowdim.npz"]
    other = [(f"b{name[1:]}", content) for name, content in WHOLE.items()]
    twice = [*WHOLE.items(), *other, *WHOLE.items()]
    assert faults_of(twice, num_sequences=6) == ["episode 'a' appears 2 times"]


def test_the_manifest_counts_anchors():
    assert faults_of(list(WHOLE.items()), num_sequences=3) == ["it has 2 samples, and 3 in the manifest"]
