"""A picture of chosen episodes: a row each, from start to end, with task, seed and outcome."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vla_foundry.evaluation.results import EpisodeResult

# of an episode's pictures, pixels
_ROW_HEIGHT = 96
_TEXT_HEIGHT = 16
_MARGIN = 4
_COLORS = {"success": (20, 120, 40), "failure": (180, 30, 30), "invalid": (110, 110, 110)}


def write_contact_sheet(path: Path, rows: Sequence[tuple[EpisodeResult, Path]]) -> None:
    """Draw the strips of episodes below each other.

    Args:
        path: PNG file to write.
        rows: episodes with their strips (FrameStrip); of those without a file nothing is drawn.
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
