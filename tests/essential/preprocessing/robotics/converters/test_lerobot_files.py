"""Frames of videos are found by their times, exactly, wherever decoding starts, and a few at a time."""

import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest

from vla_foundry.images import video
from vla_foundry.preprocessing.robotics.converters.lerobot_files import VideoFrames

NUM_FRAMES, RATE = 47, 10
FPS = float(RATE)
SIZE = (48, 64)


def frames_at(path: Path, times: np.ndarray, *, fps: float = FPS, tolerance: float = 0.1) -> np.ndarray:
    """Decode the frames at these times."""
    return np.stack(list(VideoFrames(str(path), times=times, fps=fps, tolerance=tolerance).read()))


@pytest.fixture(scope="module")
def images(recordings: ModuleType) -> np.ndarray:
    return recordings.create_images(0, NUM_FRAMES, SIZE)


@pytest.mark.parametrize(
    "options",
    [{"g": "10", "bf": "2"}, {"g": "250", "bf": "3"}, {"g": "7", "x264-params": "open-gop=1:keyint=7:bframes=3"}],
)
def test_every_start_gives_exactly_the_frames_from_there_on(
    tmp_path: Path, images: np.ndarray, recordings: ModuleType, options: dict[str, str]
) -> None:
    path = tmp_path / "video.mp4"
    recordings.write_video(path, images, **options)
    whole = recordings.read_video(path)
    for start in range(NUM_FRAMES - 2):
        times = start / FPS + np.arange(2) / FPS
        np.testing.assert_array_equal(frames_at(path, times), whole[start : start + 2])


def test_times_choose_among_the_frames_of_a_faster_video(
    tmp_path: Path, images: np.ndarray, recordings: ModuleType
) -> None:
    path = tmp_path / "video.mp4"
    recordings.write_video(path, images, fps=30)
    whole = recordings.read_video(path)
    numbers = np.array([4, 7, 10, 13])
    # float32 times, as rows hold them, and some of them a little late
    times = np.float32(numbers / 30 + [0.001, -0.002, 0.004, 0.0]).astype(np.float64)
    np.testing.assert_array_equal(frames_at(path, times), whole[numbers])


@pytest.mark.parametrize(("suffix", "options"), [(".mkv", {}), (".mkv", {"bf": "0"}), (".ts", {})])
def test_times_count_from_the_first_frame_of_a_video_that_begins_late(
    tmp_path: Path, images: np.ndarray, recordings: ModuleType, suffix: str, options: dict[str, str]
) -> None:
    path = tmp_path / f"video{suffix}"
    recordings.write_video(path, images, first_pts=25, **options)
    with av.open(str(path)) as container:
        assert (container.streams.video[0].start_time or 0) > 0
    whole = recordings.read_video(path)
    for start in (0, 3, 14):
        np.testing.assert_array_equal(frames_at(path, (start + np.arange(6)) / FPS), whole[start : start + 6])
    with pytest.raises(ValueError, match=r"the video ends at 4\.600 s, before frame 22 of the episode at 4\.700 s"):
        frames_at(path, (25 + np.arange(30)) / FPS)


def write_coloured(path: Path, image: np.ndarray, *, options: dict[str, str] | None = None, **reformat: Any) -> None:
    """Encode one image three times; `reformat` says how RGB becomes YUV."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "1", **(options or {})})
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = reformat.get("format", "yuv420p")
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(**{"format": "yuv420p", **reformat})
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dst_colorspace": "itu709", "options": {"x264-params": "colormatrix=bt709"}},
        {"dst_color_range": "JPEG", "options": {"x264-params": "fullrange=on"}},
        {"format": "yuvj420p"},
    ],
)
def test_colours_follow_the_matrix_and_range_that_a_video_states(tmp_path: Path, options: dict[str, Any]) -> None:
    image = np.full((*SIZE, 3), (200, 60, 30), np.uint8)
    write_coloured(tmp_path / "video.mp4", image, **options)
    found = frames_at(tmp_path / "video.mp4", np.array([0.0]))[0]
    assert np.abs(found.astype(int) - image).max() <= 3


# (a, b, c, d) of a display matrix: a point (x, y) of the frame is shown at (a x + c y, b x + d y); what a player shows
TURNS: dict[tuple[int, int, int, int], Any] = {
    (1, 0, 0, 1): lambda image: image,
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),
    (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
    (0, -1, 1, 0): lambda image: np.rot90(image),
    (-1, 0, 0, 1): lambda image: image[:, ::-1],
    (1, 0, 0, -1): lambda image: image[::-1],
    (0, 1, 1, 0): lambda image: image.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda image: np.rot90(image, 2).transpose(1, 0, 2),
}


def set_matrix(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Write a display matrix to the first track of an mp4 file, as phones do."""
    data, (a, b, c, d) = bytearray(path.read_bytes()), (round(value * 65536) for value in matrix)
    place = data.index(b"tkhd") + 44
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_are_turned_and_mirrored_as_a_player_shows_them(
    tmp_path: Path, images: np.ndarray, recordings: ModuleType, matrix: tuple[int, int, int, int]
) -> None:
    path = tmp_path / "video.mp4"
    recordings.write_video(path, images[:8])
    expected = [TURNS[matrix](image) for image in recordings.read_video(path)]
    set_matrix(path, matrix)
    np.testing.assert_array_equal(frames_at(path, np.arange(8) / FPS), np.stack(expected))
    size = VideoFrames(str(path), times=np.zeros(1), fps=FPS, tolerance=0.1).first_size()
    assert size == (expected[0].shape[1], expected[0].shape[0])


def test_other_rotations_and_oblong_pixels_are_refused(
    tmp_path: Path, images: np.ndarray, recordings: ModuleType
) -> None:
    path = tmp_path / "video.mp4"
    recordings.write_video(path, images[:3])
    set_matrix(path, (0.7071, 0.7071, -0.7071, 0.7071))
    with pytest.raises(
        ValueError, match=r"video\.mp4: the display matrix \[0\.70.* is not a rotation by quarter turns"
    ):
        frames_at(path, np.zeros(1))
    write_coloured(path, images[0], options={"x264-params": "sar=4/3"})
    with pytest.raises(ValueError, match=r"video\.mp4: its pixels are not square \(4/3\)\. Scale the video: ffmpeg"):
        frames_at(path, np.zeros(1))


@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_the_tolerance_counts_frames(tmp_path: Path, images: np.ndarray, recordings: ModuleType, shift: float) -> None:
    path = tmp_path / "video.mp4"
    recordings.write_video(path, images)
    times = (np.arange(5, 12) + shift) / FPS
    np.testing.assert_array_equal(frames_at(path, times, tolerance=0.4), recordings.read_video(path)[5:12])
    with pytest.raises(ValueError, match=r"0\.30 frames away, allowed are 0\.2 \(timestamp_tolerance\)"):
        frames_at(path, times, tolerance=0.2)


def test_a_frame_that_was_dropped_is_named(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"bf": "0"})
        stream.height, stream.width = SIZE
        stream.time_base = stream.codec_context.time_base = Fraction(1, RATE)
        for number in [*range(6), *range(7, 12)]:
            frame = av.VideoFrame.from_ndarray(images[number], format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"frame 6 of the episode at 0\.600 s: 1\.00 frames away"):
        frames_at(path, np.arange(12) / FPS)


def test_a_frame_too_large_to_decode_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: np.ndarray, recordings: ModuleType
) -> None:
    path = tmp_path / "video.mp4"
    recordings.write_video(path, images)
    monkeypatch.setattr(video, "_DECODER_OPTIONS", {"max_pixels": str(images[0, ..., 0].size - 1)})
    with pytest.raises(
        ValueError,
        match=r"video\.mp4.*(or its frames have more than|can be decoded)",
    ):
        frames_at(path, np.arange(3) / FPS)


def test_memory_holds_a_few_frames_of_a_long_video(tmp_path: Path, recordings: ModuleType) -> None:
    path = tmp_path / "video.mp4"
    recordings.write_video(path, np.tile(recordings.create_images(1, 10, (240, 320)), (12, 1, 1, 1)))
    frames = VideoFrames(str(path), times=np.arange(120) / FPS, fps=FPS, tolerance=0.1)
    assert frames.first_size() == (320, 240)
    tracemalloc.start()
    assert sum(image.shape == (240, 320, 3) for image in frames.read()) == 120
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 240 * 320 * 3
