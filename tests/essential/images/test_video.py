"""Evenly spaced frames of short videos, made here with PyAV; what is not a whole short video is refused in one line."""

import io
from typing import Any

import av
import numpy as np
import pytest

from vla_foundry.images import video
from vla_foundry.images.video import read_frames

# format -> (codec, pixel format)
KINDS = {
    "mp4": ("libx264", "yuv420p"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "gif": ("gif", "rgb8"),
    "avi": ("mpeg4", "yuv420p"),
}


def encode_video(kind: str, greys: list[int], size: tuple[int, int] = (48, 64), **options: str) -> bytes:
    """A video of grey frames, ten a second."""
    buffer = io.BytesIO()
    codec, pixel_format = KINDS[kind]
    with av.open(buffer, "w", format=kind, options=options) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, pixel_format
        for number, grey in enumerate(greys):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), grey, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_frames_are_the_middles_of_equal_parts(kind: str) -> None:
    data = encode_video(kind, list(range(0, 240, 10)))
    frames = read_frames(data, 4)
    assert [frame.shape for frame in frames] == [(3, 48, 64)] * 4
    np.testing.assert_allclose([float(frame.float().mean()) for frame in frames], [30, 90, 150, 210], atol=3)
    assert len(read_frames(data, 24)) == len(read_frames(data, 100)) == 24
    assert all(map(np.array_equal, frames, read_frames(data, 4)))


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_damaged_videos_are_refused_in_one_line(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 24).tolist()
    data = encode_video(kind, noise)
    for share in (0, 0.01, 0.3, 0.6, 0.9 if kind != "webm" else 0.7):
        with pytest.raises(ValueError, match=r"it (is|has) .*(cut off|damaged|no frames)") as error:
            read_frames(data[: int(share * len(data))], 4)
        assert "\n" not in str(error.value)
    fragments = encode_video("mp4", noise, movflags="frag_keyframe+empty_moov")
    assert len(read_frames(fragments, 4)) == 4
    for share in (0.5, 0.9):
        with pytest.raises(ValueError, match=r"cut off|damaged"):
            read_frames(fragments[: int(share * len(fragments))], 4)


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"<?xml version='1.0'?><MPD></MPD>",
        encode_video("avi", [0, 10]),
        b"text" * 100,
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="it is not a readable video"):
        read_frames(data, 2)


def test_long_and_large_videos_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_video("mp4", [0] * 20)
    monkeypatch.setattr(video, "MAX_SAMPLE_PIXELS", 3 * 48 * 64)
    assert len(read_frames(data, 3)) == 3
    with pytest.raises(ValueError, match="its 4 frames have more than 9,216 pixels together"):
        read_frames(data, 4)
    monkeypatch.setattr(video, "_MAX_VIDEO_PIXELS", 19 * 48 * 64)
    with pytest.raises(ValueError, match="it is too long: more than 19 frames of 64 x 48 pixels"):
        read_frames(data, 3)
    monkeypatch.setattr(video, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(ValueError, match="pixels"):
        read_frames(data, 3)


def test_what_reads_videos_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"videos need PyAV, .* uv pip install 'vla-foundry\[preprocessing\]'"):
        video.check_installed()
