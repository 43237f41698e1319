"""Frames out of video files, matched to the times that they were recorded at.

A frame is found by its time, never by its number: rows of a recording and frames of its video may begin at different
places, and one file may hold many episodes. Decoding starts at the key frame before the first time and goes on frame by
frame, so that every frame is exact and memory holds two of them. A file is read with one thread, because episodes are
what runs side by side.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.storage.uri import open_input

if TYPE_CHECKING:
    import av
    import av.container

# a frame this near to a time, in frames, is taken without looking at the next one
_EXACT = 1e-3


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """The frames of an episode in a video file, one for each of its times; see `CameraFrames`."""

    # the file
    uri: str
    # (W, H)
    size: tuple[int, int]
    # float64 (L,) ascending: when each frame is shown, seconds from the beginning of the file
    times: np.ndarray
    # rate of the episode, frames a second: the unit of `tolerance`
    fps: float
    # how far a frame may be from its time, in frames
    tolerance: float
    is_depth: bool = False

    @property
    def num_frames(self) -> int:
        """Frames of the episode (L)."""
        return len(self.times)

    def encoded(self) -> Iterator[bytes] | None:
        """None: a video holds no JPEG."""
        return None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 (H, W, 3) RGB.

        Raises:
            ValueError: the file is broken, ends early, has no frame at a time, or frames of another size.
        """
        for number, frame in enumerate(self._matched()):
            if (frame.width, frame.height) != self.size:
                raise ValueError(
                    f"{self.uri}: frame {number} is {frame.width} x {frame.height} pixels, "
                    f"expected {self.size[0]} x {self.size[1]}."
                )
            yield frame.to_ndarray(format="rgb24")

    def _matched(self) -> "Iterator[av.VideoFrame]":
        """Yield for each time the frame that is nearest to it."""
        frames = self._decode(from_key_frame=True)
        before: tuple[float, Any] | None = None
        after = next(frames, None)
        if after is not None and after[0] > self.times[0] and self.times[0] > 0:
            # the container's index led behind the first time
            frames = self._decode(from_key_frame=False)
            after = next(frames, None)
        for number, time in enumerate(self.times):
            while after is not None and (after[0] - time) * self.fps < -_EXACT:
                before, after = after, next(frames, None)
            near = [shown for shown in (after, before) if shown is not None]
            if not near:
                raise ValueError(f"{self.uri}: no frame can be decoded.")
            shown = min(near, key=lambda shown: abs(shown[0] - time))
            if abs(shown[0] - time) * self.fps > self.tolerance:
                raise ValueError(self._no_frame_message(number, shown[0], is_over=after is None))
            yield shown[1]

    def _no_frame_message(self, number: int, nearest: float, *, is_over: bool) -> str:
        time = self.times[number]
        where = (
            f"ends at {nearest:.3f} s, before" if is_over and nearest < time else f"has {nearest:.3f} s as nearest to"
        )
        distance = abs(nearest - time) * self.fps
        return (
            f"{self.uri}: the video {where} frame {number} of the episode at {time:.3f} s: {distance:.2f} frames away, "
            f"allowed are {self.tolerance:g} (timestamp_tolerance)."
        )

    def _decode(self, *, from_key_frame: bool) -> "Iterator[tuple[float, av.VideoFrame]]":
        """Yield (seconds, frame) in order, from the last key frame before the first time or from the beginning."""
        import av.error

        with _open_stream(self.uri) as (container, stream):
            decoded, time_base = 0, float(stream.time_base or 0)
            try:
                if from_key_frame and self.times[0] > 0:
                    start = self.times[0] - self.tolerance / self.fps
                    container.seek(int(start / time_base), stream=stream, backward=True)
                for frame in container.decode(stream):
                    decoded += 1
                    if frame.pts is None:
                        raise ValueError(f"{self.uri}: a frame has no time (the {decoded}th that is decoded).")
                    seconds = frame.pts * time_base
                    if frame.is_corrupt:
                        raise ValueError(f"{self.uri}: the frame at {seconds:.3f} s is damaged.")
                    yield seconds, frame
            except (av.error.FFmpegError, OSError) as error:
                _raise_unless_broken(error)
                raise ValueError(
                    f"{self.uri}: the video is damaged: after {decoded} frames nothing more can be decoded "
                    f"({_reason(error)})."
                ) from None


def read_video_size(uri: str) -> tuple[int, int]:
    """Return (W, H) of a video, of which only the header is read.

    Raises:
        ValueError: it is no video, or its header is damaged.
        FileNotFoundError: it is not there.
    """
    with _open_stream(uri) as (_, stream):
        return stream.width, stream.height


@contextmanager
def _open_stream(uri: str) -> "Iterator[tuple[av.container.InputContainer, av.VideoStream]]":
    try:
        import av
        import av.error
    except ImportError:
        raise ValueError(
            "videos need PyAV, which is not installed: uv pip install 'vla-foundry[preprocessing]'"
        ) from None
    # a file object rather than a name, because a name could be a protocol of FFmpeg's
    with open_input(uri) as file:
        try:
            container = av.open(file, mode="r")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            _raise_unless_broken(error)
            raise ValueError(f"{uri} is no video that can be opened, or is cut off ({_reason(error)}).") from None
        with container:
            if not container.streams.video:
                raise ValueError(f"{uri} holds no video.")
            stream = container.streams.video[0]
            if stream.time_base is None or not stream.width or not stream.height:
                raise ValueError(f"{uri}: the header of the video is damaged.")
            stream.codec_context.thread_count = 1
            yield container, stream


def _raise_unless_broken(error: Exception) -> None:
    """Raise again what is trouble of the machine or the network, rather than of the bytes."""
    import av.error

    # broken offsets lead to EINVAL, when the file is asked for what lies before its beginning
    if not isinstance(error, av.error.FFmpegError) and getattr(error, "errno", None) not in (None, errno.EINVAL):
        raise error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
