"""Decode videos with PyAV: evenly spaced frames of short ones, and what every reader of a video checks."""

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vla_foundry.images.codec import MAX_PIXELS, MAX_SAMPLE_PIXELS, check_size, image_from_array

if TYPE_CHECKING:
    from typing import IO

    import av
    import av.container

# |a|, |b|, |c|, |d| of display matrices, and how far they may be from whole numbers
_QUARTER_TURNS = ((1, 0, 0, 1), (0, 1, 1, 0))
_MATRIX_ROUNDING = 1e-3
_DECODER_OPTIONS = {"max_pixels": str(MAX_PIXELS)}
# MP4, WebM, GIF and MPEG-TS: no playlists and the like, which name other files, and no protocols
_FILE_OPTIONS = {"format_whitelist": "mov,matroska,gif,mpegts", "protocol_whitelist": "none"}
# a short video: 9 minutes at 30 frames a second, of 1920 x 1080 pixels a minute
_MAX_FRAMES = 1 << 14
_MAX_VIDEO_PIXELS = 1 << 32
# seconds that a video without a count of its frames may end before its duration
_DURATION_TOLERANCE = 0.5


def check_installed() -> None:
    """Check that PyAV is installed.

    Raises:
        ValueError: it is not.
    """
    if find_spec("av") is None:
        raise ValueError("videos need PyAV, which is not installed: uv pip install 'vla-foundry[preprocessing]'")


@contextmanager
def open_video(file: "IO[bytes]", name: str) -> "Iterator[tuple[av.container.InputContainer, av.VideoStream]]":
    """Open a video, given as a file object because FFmpeg takes some names for protocols; `name` is for errors.

    Raises:
        ValueError: PyAV is not installed, or it is no video, broken, too large, or of pixels that are not square.
    """
    check_installed()
    import av
    import av.error

    try:
        # opening decodes a frame, and the header of the file may say less than that has
        container = av.open(file, mode="r", options={**_DECODER_OPTIONS, **_FILE_OPTIONS})
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise_unless_broken(error)
        raise ValueError(f"{name} is not a readable video, or is cut off ({reason_of(error)}).") from None
    with container:
        if not container.streams.video:
            raise ValueError(f"{name} is not a readable video, or is cut off (no video stream in it).")
        stream = container.streams.video[0]
        if stream.time_base is None or not stream.width or not stream.height:
            raise ValueError(
                f"{name}: the header of the video is damaged, or its frames have more than {MAX_PIXELS:,} pixels."
            )
        if stream.sample_aspect_ratio not in (None, 0, 1):
            raise ValueError(
                f"{name}: its pixels are not square ({stream.sample_aspect_ratio}). Scale the video: "
                "ffmpeg -i IN -vf scale=iw*sar:ih,setsar=1 OUT."
            )
        check_size((stream.height, stream.width), f"{name}: a frame")
        stream.codec_context.options = dict(_DECODER_OPTIONS)
        stream.codec_context.thread_count = 1
        yield container, stream


def raise_unless_broken(error: Exception) -> None:
    """Re-raise trouble of the machine or the network, as opposed to broken bytes."""
    import av.error

    # broken offsets lead to EINVAL, when they point before the beginning of the file
    if not isinstance(error, av.error.FFmpegError) and getattr(error, "errno", None) not in (None, errno.EINVAL):
        raise error


def reason_of(error: Exception) -> str:
    """Return an error of PyAV in one line."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]


def displayed_image(frame: "av.VideoFrame", name: str) -> np.ndarray:
    """Convert a frame to RGB as a player shows it, uint8 (H, W, 3).

    The colour matrix and range stated in the video are applied, and so is its display matrix, as phones write it.

    Raises:
        ValueError: the display matrix is not a mirroring or a rotation by quarter turns.
    """
    image = frame.to_ndarray(format="rgb24")
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return image
    # 3 x 3 fixed-point numbers: a point (x, y) of the frame, y down, is shown at (a x + c y, b x + d y)
    values = np.frombuffer(bytes(side_data), "<i4")[[0, 1, 3, 4]] / 65536
    a, b, c, d = values.round().astype(int).tolist()
    if abs(values - (a, b, c, d)).max() > _MATRIX_ROUNDING or (abs(a), abs(b), abs(c), abs(d)) not in _QUARTER_TURNS:
        raise ValueError(
            f"{name}: the display matrix {values.tolist()} is not a rotation by quarter turns. Encode it upright."
        )
    if a == 0:  # rows become columns
        image = image.transpose(1, 0, 2)
    columns, rows = a + c, b + d
    return np.ascontiguousarray(image[:: rows or 1, :: columns or 1])


def read_frames(data: bytes, count: int) -> list[UInt8[Tensor, "3 H W"]]:
    """Decode `count` evenly spaced frames of a short video file in order, or all if it has fewer.

    The frames are those in the middle of `count` equal parts.

    Raises:
        ValueError: it is not MP4, WebM or GIF, is broken or cut off, or is too long or too large; one line.
    """
    check_installed()
    import av.error

    frames: list[Tensor] = []
    num_pixels = 0
    try:
        with open_video(io.BytesIO(data), "it") as (container, stream):
            times = _list_times(container, stream)
        if data.startswith(b"GIF8") and not data.rstrip(b"\0").endswith(b";"):
            raise ValueError(f"it is cut off after {len(times)} frames")
        wanted = times
        if len(times) > count:
            wanted = [times[(2 * number + 1) * len(times) // (2 * count)] for number in range(count)]
        with open_video(io.BytesIO(data), "it") as (container, stream):
            stream.codec_context.options = {**_DECODER_OPTIONS, "err_detect": "explode"}  # H.264 hides errors else
            for frame in container.decode(stream):
                if frame.pts != wanted[len(frames)]:
                    continue
                num_pixels += frame.width * frame.height
                if num_pixels > MAX_SAMPLE_PIXELS:
                    raise ValueError(f"its {len(wanted)} frames have more than {MAX_SAMPLE_PIXELS:,} pixels together")
                if frame.is_corrupt:
                    raise ValueError(f"its frame {len(frames)} of {len(wanted)} is damaged")
                frames.append(image_from_array(displayed_image(frame, "it")))
                if len(frames) == len(wanted):
                    return frames
    except (av.error.FFmpegError, OSError) as error:
        raise_unless_broken(error)
        raise ValueError(f"it is damaged after {len(frames)} of its frames ({reason_of(error)})") from None
    raise ValueError(f"it is damaged: only {len(frames)} of {len(wanted)} frames can be decoded")


def _list_times(container: "av.container.InputContainer", stream: "av.VideoStream") -> list[int]:
    """Return when each frame is shown, ascending.

    Raises:
        ValueError: the video has no frames, is too long, or is cut off.
    """
    times: set[int] = set()
    num_frames, end = 0, 0.0
    most = min(_MAX_FRAMES, _MAX_VIDEO_PIXELS // (stream.width * stream.height))
    for packet in container.demux():
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index or not packet.size:
            continue
        num_frames += 1
        if num_frames > most:
            raise ValueError(f"it is too long: more than {most} frames of {stream.width} x {stream.height} pixels")
        if packet.pts is not None and not packet.is_discard:
            times.add(packet.pts)
    missing = (container.duration or 0) / 1_000_000 - end
    if num_frames < stream.frames or (not stream.frames and missing > _DURATION_TOLERANCE):
        raise ValueError(f"it is cut off after {num_frames} frames")
    if not times:
        raise ValueError("it has no frames")
    return sorted(times)
