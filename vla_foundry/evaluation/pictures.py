"""Pictures of episodes: a strip of frames or a video per episode, and a contact sheet of strips with outcomes."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vla_foundry.evaluation.results import EpisodeResult
from vla_foundry.preprocessing.robotics.lerobot_recording import VideoEncoder

# pictures in a strip
NUM_PICTURES = 6


class FrameStrip:
    """A few frames of an episode, evenly spread although its length is unknown until it ends.

    Keeps every n-th frame, and doubles n when there are too many.
    """

    def __init__(self) -> None:
        self._every = 4
        self._frames: dict[int, np.ndarray] = {}

    def wants(self, step: int) -> bool:
        """Return whether to add the picture after `step` actions."""
        return step % self._every == 0

    def add(self, step: int, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Add a picture."""
        self._frames[step] = image
        if len(self._frames) > 4 * NUM_PICTURES:
            self._every *= 2
            self._frames = {at: frame for at, frame in self._frames.items() if at % self._every == 0}

    def save(self) -> bytes:
        """Return a PNG of the first picture, the last, and evenly spaced ones between them, side by side."""
        steps = np.array(sorted(self._frames))
        wanted = np.linspace(0, steps[-1], NUM_PICTURES)
        chosen = [int(steps[np.abs(steps - at).argmin()]) for at in wanted]
        file = BytesIO()
        Image.fromarray(np.concatenate([self._frames[step] for step in chosen], axis=1)).save(file, "PNG")
        return file.getvalue()


class Film:
    """An mp4 of an episode, encoded as it comes.

    Args:
        fps: frames per second.
    """

    def __init__(self, fps: int) -> None:
        self._fps = fps
        self._file = BytesIO()
        self._encoder: VideoEncoder | None = None

    def wants(self, step: int) -> bool:
        """Return whether to add the picture after `step` actions: every one."""
        return True

    def add(self, step: int, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Add a picture; the encoding has only even sizes, so an odd row or column at the edge is left out."""
        height, width = (size // 2 * 2 for size in image.shape[:2])
        if self._encoder is None:
            self._encoder = VideoEncoder(self._file, fps=self._fps, size=(height, width))
        self._encoder.add(image[:height, :width])

    def save(self) -> bytes:
        """Return the film."""
        assert self._encoder is not None
        self._encoder.close()
        return self._file.getvalue()


def animate_film(film: bytes, *, num_frames: int = 40, frame_ms: int = 80) -> tuple[bytes, bytes]:
    """Return a film as an animated WebP of at most so many frames, and its last frame.

    Raises:
        ValueError: it is not a readable video.
    """
    # it needs torch, which simulators' processes do without
    from vla_foundry.images.video import read_frames

    frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in read_frames(film, num_frames)]
    animation, still = BytesIO(), BytesIO()
    # the end stays for a while
    durations = [frame_ms] * (len(frames) - 1) + [1500]
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    frames[0].save(animation, "WEBP", quality=70, **options)
    frames[-1].save(still, "WEBP", quality=80)
    return animation.getvalue(), still.getvalue()


# pixels
_ROW_HEIGHT = 96
_TEXT_HEIGHT = 16
_MARGIN = 4
_COLORS = {"success": (20, 120, 40), "failure": (180, 30, 30), "invalid": (110, 110, 110)}


def write_contact_sheet(path: Path, rows: Sequence[tuple[EpisodeResult, Path]]) -> None:
    """Draw the strips of episodes below each other, each with task, seed, outcome and instruction.

    Args:
        path: PNG to write.
        rows: episodes with the files of their strips; those without a file are left out.
    """
    strips = [(episode, _read(file)) for episode, file in rows if file.exists()]
    if not strips:
        path.unlink(missing_ok=True)
        return
    row = _TEXT_HEIGHT + _ROW_HEIGHT + _MARGIN
    width = max(strip.width for _, strip in strips) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, row * len(strips) + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (episode, strip) in enumerate(strips):
        top = number * row + _MARGIN
        outcome = episode.outcome or "pending"
        text = f"{episode.task}  seed {episode.seed}  {outcome} after {episode.num_steps} steps: {episode.instruction}"
        draw.text((_MARGIN, top), text, fill=_COLORS.get(outcome, (0, 0, 0)), font=font)
        sheet.paste(strip, (_MARGIN, top + _TEXT_HEIGHT))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        strip = image.convert("RGB")
    return strip.resize((round(strip.width * _ROW_HEIGHT / strip.height), _ROW_HEIGHT), Image.Resampling.LANCZOS)
