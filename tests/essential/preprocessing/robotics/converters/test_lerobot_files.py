"""Frames of videos are found by their times, exactly, wherever decoding starts, and a few at a time."""

import tracemalloc
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest

from vla_foundry.preprocessing.robotics.converters.lerobot_files import VideoFrames, read_video_size

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


def test_a_video_that_begins_late_is_read_by_its_own_times(
    tmp_path: Path, images: np.ndarray, recordings: ModuleType
) -> None:
    path = tmp_path / "video.mkv"
    recordings.write_video(path, images, first_pts=25)
    whole = recordings.read_video(path)
    times = (25 + np.arange(3, 9)) / FPS
    np.testing.assert_array_equal(frames_at(path, times), whole[3:9])
    with pytest.raises(
        ValueError, match=r"has 2\.500 s as nearest to frame 0 of the episode at 0\.000 s: 25\.00 frames"
    ):
        frames_at(path, np.arange(4) / FPS)


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


def test_memory_holds_a_few_frames_of_a_long_video(tmp_path: Path, recordings: ModuleType) -> None:
    path = tmp_path / "video.mp4"
    recordings.write_video(path, np.tile(recordings.create_images(1, 10, (240, 320)), (12, 1, 1, 1)))
    assert read_video_size(str(path)) == (320, 240)
    frames = VideoFrames(str(path), times=np.arange(120) / FPS, fps=FPS, tolerance=0.1).read()
    tracemalloc.start()
    assert sum(image.shape == (240, 320, 3) for image in frames) == 120
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 240 * 320 * 3
