"""Whole episodes in a shard: what is written is read back, the index finds every frame, and what is wrong is named."""

import io
import json
import tarfile
import tempfile
from dataclasses import replace
from typing import BinaryIO, cast

import numpy as np
import pytest

from vla_foundry.robotics.episode_blocks import (
    EPISODE_SUFFIX,
    LOWDIM_SUFFIX,
    EpisodeCamera,
    EpisodeInfo,
    InstructionSpan,
    format_episode,
    frame_suffix,
    is_episode_id,
    parse_episode,
)
from vla_foundry.shards import ShardIndex, format_index, index_shard, parse_index
from vla_foundry.storage.npz import format_arrays

INFO = EpisodeInfo(
    episode_id="run_1",
    task="größer",
    num_frames=3,
    fps=9.5,
    anchors=(0, 2),
    cameras={
        "observation.images.Top": EpisodeCamera(original_size=(8, 6), size=(4, 3), extension="jpg"),
        "depth": EpisodeCamera(original_size=(8, 6), size=(8, 6), extension="png"),
    },
    instructions=(
        InstructionSpan(start=0, end=3, texts={"original": ["a"], "verbose": ["b", "c"]}),
        InstructionSpan(start=2, end=3, texts={"original": ["d"]}),
    ),
    metadata={"success": True},
)


def members(info: EpisodeInfo) -> list[tuple[str, bytes]]:
    """The members of an episode; each frame holds its own name."""
    names = [
        f"{info.episode_id}.{frame_suffix(camera, frame, description.extension)}"
        for frame in range(info.num_frames)
        for camera, description in info.cameras.items()
    ]
    head = [
        (f"{info.episode_id}.{EPISODE_SUFFIX}", format_episode(info).encode()),
        (f"{info.episode_id}.{LOWDIM_SUFFIX}", format_arrays({"state": np.zeros((info.num_frames, 2))})),
    ]
    return head + [(name, name.encode()) for name in names]


def create_tar(content: list[tuple[str, bytes]]) -> BinaryIO:
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    file.seek(0)
    return file


def index_of(content: list[tuple[str, bytes]]) -> ShardIndex:
    with create_tar(content) as file:
        return index_shard(file)


def test_an_episode_is_read_back():
    assert parse_episode(format_episode(INFO), "here") == INFO


def test_instructions_hold_from_their_start_up_to_their_end():
    assert INFO.instructions_at(1) == {"original": ["a"], "verbose": ["b", "c"]}
    assert INFO.instructions_at(2) == {"original": ["a", "d"], "verbose": ["b", "c"]}
    assert replace(INFO, instructions=()).instructions_at(0) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, not 1"),
        ({"anchors": [2, 0]}, "'anchors' do not ascend"),
        ({"anchors": [0, 3]}, "anchors do not ascend within its 3 frames"),
        ({"anchors": [-1]}, "each of 'anchors' must be a whole number from 0"),
        ({"anchors": ["0"]}, "each of 'anchors' must be a whole number from 0"),
        ({"cameras": {"a": {"original_size": [1, 1], "size": [1, 1], "extension": "gif"}}}, "extension 'gif'"),
        ({"fps": 0}, "'fps' must be a finite number above 0, not 0"),
        ({"fps": -1}, "'fps' must be a finite number above 0, not -1"),
        ({"fps": float("inf")}, "is not an episode of version 1"),
        ({"num_frames": None}, "is not an episode of version 1"),
    ],
)
def test_a_broken_episode_is_named(change, message):
    values = json.loads(format_episode(INFO)) | change
    with pytest.raises(ValueError, match=message):
        parse_episode(json.dumps(values), "here")


def test_an_episode_that_is_no_json_is_named():
    with pytest.raises(ValueError, match="here is not an episode"):
        parse_episode("{", "here")


def test_ids_are_plain():
    assert is_episode_id("a_B-9")
    assert not any(is_episode_id(text) for text in ("", "a.b", "a/b", "ä", "a b"))


def test_the_index_finds_every_frame_of_every_camera():
    second = replace(INFO, episode_id="run_2", anchors=(1,))
    with create_tar(members(INFO) + members(second)) as file:
        check_index(file)


def check_index(file: BinaryIO) -> None:
    index = index_shard(file)
    assert index.num_sequences == 3
    assert [(episode.key, episode.anchors) for episode in index.episodes] == [("run_1", (0, 2)), ("run_2", (1,))]
    assert index.samples == ()
    for episode in index.episodes:
        assert episode.members.keys() == {EPISODE_SUFFIX, LOWDIM_SUFFIX}
        assert episode.frames.keys() == INFO.cameras.keys()
        for camera, spans in episode.frames.items():
            for frame, span in enumerate(spans):
                file.seek(span.offset)
                ending = INFO.cameras[camera].extension
                assert file.read(span.size).decode() == f"{episode.key}.{camera.lower()}.{frame:06d}.{ending}"
    assert parse_index(format_index(index), "here") == index


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([m for m in members(INFO) if not m[0].endswith("depth.000001.png")], r"has no member \.depth\.000001\.png"),
        ([*members(INFO), ("run_2.lowdim.npz", b"")], r"episode 'run_2' has no member \.episode\.json"),
        ([("run_1.episode.json", b"{}")], "'run_1.episode.json' is not an episode"),
    ],
)
def test_a_shard_that_lacks_something_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        index_of(content)


def test_an_index_of_odd_spans_is_refused():
    values = json.loads(format_index(index_of(members(INFO))))
    values["episodes"][0][3]["depth"].pop()
    with pytest.raises(ValueError, match="is not a shard index"):
        parse_index(json.dumps(values), "here")
