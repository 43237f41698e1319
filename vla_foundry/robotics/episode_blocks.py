"""Store whole episodes in a shard (layout "episodes"), from which windows are cut at load time.

An episode's members, in this order. <key> is the episode id: unique in the dataset; letters, digits, "_" and "-":

    <key>.episode.json                      EpisodeInfo: length, rate, anchors, cameras, instructions
    <key>.lowdim.npz                        not compressed: every field (L, C), absolute; `timestamp` (L,) float64
                                            seconds; where known `original_intrinsics.<camera>`,
                                            `rescaled_intrinsics.<camera>` (3, 3) or (L, 3, 3) and
                                            `extrinsics.<camera>` (4, 4) or (L, 4, 4)
    <key>.<camera>.<frame:06d>.jpg          each frame of each camera, once, frame by frame; camera names in lower
                                            case, depth as .png (16 bits, millimetres)

A shard's samples are the anchors of its episodes, in the order of the tar.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vla_foundry.parsing import parse_json
from vla_foundry.shards import EPISODE_SUFFIX as EPISODE_SUFFIX
from vla_foundry.shards import EPISODE_VERSION, parse_episode_header
from vla_foundry.shards import frame_suffix as frame_suffix

LOWDIM_SUFFIX = "lowdim.npz"
TIMESTAMP_FIELD = "timestamp"
# followed by the camera's name
ORIGINAL_INTRINSICS = "original_intrinsics."
RESCALED_INTRINSICS = "rescaled_intrinsics."
EXTRINSICS = "extrinsics."
CALIBRATION_PREFIXES = (ORIGINAL_INTRINSICS, RESCALED_INTRINSICS, EXTRINSICS)

_EPISODE_ID = re.compile(r"[A-Za-z0-9_-]+")
Extension = Literal["jpg", "png"]


@dataclass(frozen=True, kw_only=True)
class EpisodeCamera:
    """The images of a camera in one episode."""

    # (W, H) as recorded
    original_size: tuple[int, int]
    # (W, H) as stored
    size: tuple[int, int]
    # jpg: RGB; png: depth
    extension: Extension


@dataclass(frozen=True, kw_only=True)
class InstructionSpan:
    """Instructions that apply from frame `start` up to but excluding frame `end`."""

    start: int
    end: int
    # {type ("original", "randomized", ...): equivalent texts}
    texts: dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class EpisodeInfo:
    """The JSON member of an episode."""

    # also the key of its members
    episode_id: str
    # None: unknown
    task: str | None
    # frames (L)
    num_frames: int
    # frames per second
    fps: float
    # frames that are samples, ascending
    anchors: tuple[int, ...]
    cameras: dict[str, EpisodeCamera]
    instructions: tuple[InstructionSpan, ...] = ()
    # further information, as JSON values
    metadata: dict[str, Any] = field(default_factory=dict)

    def instructions_at(self, frame: int) -> dict[str, list[str]]:
        """Return the instructions that apply at a frame; {} if there are none."""
        texts: dict[str, list[str]] = {}
        for span in self.instructions:
            if span.start <= frame < span.end:
                for kind, values in span.texts.items():
                    texts.setdefault(kind, []).extend(values)
        return texts


def is_episode_id(text: str) -> bool:
    """True if a text is a valid episode id: letters, digits, "_" and "-"."""
    return _EPISODE_ID.fullmatch(text) is not None


def format_episode(info: EpisodeInfo) -> str:
    """Format the JSON member of an episode."""
    return json.dumps({"version": EPISODE_VERSION, **asdict(info)}, separators=(",", ":"), ensure_ascii=False)


def parse_episode(text: str | bytes, origin: str) -> EpisodeInfo:
    """Parse the JSON member of an episode.

    Args:
        origin: where the text comes from, for messages.

    Raises:
        ValueError: the text is not such a member, has another version, or contradicts itself.
    """
    header = parse_episode_header(text, origin)
    try:
        values = parse_json(text, "it")
        fps = float(values["fps"])
        if not 0 < fps < math.inf:
            raise ValueError(f"'fps' must be a finite number above 0, not {fps:g}")
        return EpisodeInfo(
            episode_id=values["episode_id"],
            task=values["task"],
            num_frames=header.num_frames,
            fps=fps,
            anchors=header.anchors,
            cameras={name: _parse_camera(value) for name, value in values["cameras"].items()},
            instructions=tuple(InstructionSpan(**span) for span in values["instructions"]),
            metadata=values["metadata"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{origin} is not an episode of version {EPISODE_VERSION} ({error}).") from None


def _parse_camera(value: Mapping[str, Any]) -> EpisodeCamera:
    original, size = (tuple(int(side) for side in value[key]) for key in ("original_size", "size"))
    return EpisodeCamera(
        original_size=(original[0], original[1]), size=(size[0], size[1]), extension=value["extension"]
    )
