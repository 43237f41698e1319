"""Pictures -> mp4 files of H.264 that seek fast, and several of those -> one, without encoding again."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

# every second frame stands alone, so that a reader decodes at most two to get any one; no frame refers to a later one
_OPTIONS = {"g": "2", "bf": "0", "crf": "18", "preset": "veryfast"}
_PIXEL_FORMAT = "yuv420p"


class VideoEncoder:
    """Writes one mp4 file, frame by frame; the same frames give the same bytes."""

    def __init__(self, path: Path, *, fps: int, size: tuple[int, int]) -> None:
        import av

        self._av = av
        self._output = av.open(str(path), "w", format="mp4")
        stream: Any = self._output.add_stream("libx264", rate=fps, options=_OPTIONS)
        stream.height, stream.width = size
        stream.pix_fmt = _PIXEL_FORMAT
        # threads would cut frames into slices
        stream.thread_count = 1
        self._stream = stream

    def add(self, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Encode one frame."""
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self._output.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left, and the file's index."""
        self._output.mux(self._stream.encode())
        self._output.close()


class VideoJoiner:
    """Appends mp4 files that were encoded alike to one, by copying."""

    def __init__(self, path: Path, *, fps: int) -> None:
        import av

        self._av = av
        self._output = av.open(str(path), "w", format="mp4")
        self._stream: Any = None
        self._fps = fps
        self._num_frames = 0

    @property
    def seconds(self) -> float:
        """Length of what was appended."""
        return self._num_frames / self._fps

    def append(self, path: Path) -> None:
        """Copy all frames of a file to the end."""
        with self._av.open(str(path)) as source:
            stream = source.streams.video[0]
            if self._stream is None:
                self._stream = self._output.add_stream_from_template(stream)
            assert stream.time_base is not None
            start = round(Fraction(self._num_frames, self._fps) / stream.time_base)
            for packet in source.demux(stream):
                if packet.pts is None or packet.dts is None:
                    continue  # the mark of the end
                packet.pts += start
                packet.dts += start
                packet.stream = self._stream
                self._output.mux(packet)
                self._num_frames += 1

    def close(self) -> None:
        """Write the file's index."""
        self._output.close()


def describe_video(*, fps: int, size: tuple[int, int]) -> dict[str, Any]:
    """What the `info` of a video feature says of these files."""
    return {
        "video.height": size[0],
        "video.width": size[1],
        "video.codec": "h264",
        "video.pix_fmt": _PIXEL_FORMAT,
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }
