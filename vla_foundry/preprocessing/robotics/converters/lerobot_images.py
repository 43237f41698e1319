"""Images of LeRobot datasets that are no videos: encoded bytes in the rows, or files beside them."""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_foundry.images.codec import decode_depth, decode_image
from vla_foundry.preprocessing.robotics.converters.lerobot_meta import EpisodeEntry
from vla_foundry.preprocessing.robotics.converters.lerobot_parquet import read_episode_rows
from vla_foundry.storage.uri import exists, join_uri, read_bytes

# images that are read at once; of 100 kB they make 3 MB
_BATCH_ROWS = 32
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class RowImages:
    """The images of an episode in, or named by, a column of its rows; see `CameraFrames`."""

    entry: EpisodeEntry
    # the column and the camera
    camera: str
    # (W, H) as info.json says
    size: tuple[int, int]
    is_depth: bool = False
    # what the first image is, and all must be
    is_jpeg: bool = False

    @property
    def num_frames(self) -> int:
        """Frames of the episode (L)."""
        return self.entry.length

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the images: uint8 (H, W, 3), or uint16 (H, W) of depth.

        Raises:
            ValueError: an image is not there, can not be decoded, or has another size.
        """
        for number, data in enumerate(self.read()):
            yield self._decode(number, data)

    def encoded(self) -> Iterator[bytes] | None:
        """Yield the images' bytes, each of which is tried to decode; None where the first is no JPEG."""
        return self._checked_jpegs() if self.is_jpeg else None

    def _checked_jpegs(self) -> Iterator[bytes]:
        for number, data in enumerate(self.read()):
            if not data.startswith(_JPEG):
                raise ValueError(f"{self._where(number)} is no JPEG, though the first image of the episode is one.")
            self._decode(number, data)
            yield data

    def _decode(self, number: int, data: bytes) -> np.ndarray:
        try:
            if self.is_depth:
                array = decode_depth(data).numpy()
            else:
                array = decode_image(data).permute(1, 2, 0).numpy()
        except ValueError as error:
            raise ValueError(f"{self._where(number)}: {error}") from None
        height, width = array.shape[:2]
        if (width, height) != self.size:
            raise ValueError(
                f"{self._where(number)} is {width} x {height} pixels, but meta/info.json says "
                f"{self.size[0]} x {self.size[1]}."
            )
        return array

    def _where(self, number: int) -> str:
        return f"{self.entry.data_uri}: image {number} of '{self.camera}' in episode {self.entry.index}"

    def read(self, rows_at_once: int = _BATCH_ROWS) -> Iterator[bytes]:
        """Yield the encoded bytes of every image.

        Raises:
            ValueError: an image is not there.
        """
        number = 0
        entry = self.entry
        for rows in read_episode_rows(entry.data_uri, entry.index, [self.camera], rows_at_once=rows_at_once):
            for value in rows.column(self.camera).to_pylist():
                yield self._bytes_of(number, value)
                number += 1

    def _bytes_of(self, number: int, value: Any) -> bytes:
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, str):
            data, path = None, data
        if isinstance(data, bytes):
            return data
        if not isinstance(path, str) or not path:
            raise ValueError(f"{self._where(number)} is null, or holds neither bytes nor a path.")
        places = self._places(number, path)
        place = next((place for place in places if exists(place)), None)
        if place is None:
            raise ValueError(f"{self._where(number)} is the file {path}, which is missing: there is no {places[0]}.")
        return read_bytes(place)

    def _places(self, number: int, path: str) -> list[str]:
        """Where the file of an image may be: as the row says, within the dataset; and where LeRobot writes images."""
        root, episode = self.entry.root, self.entry.index
        inside = posixpath.normpath(path)
        places = [] if inside.startswith(("..", "/")) else [join_uri(root, inside)]
        folder = join_uri(root, "images", self.camera)
        return [
            *places,
            join_uri(folder, f"episode_{episode:06d}", f"frame_{number:06d}.png"),
            join_uri(folder, f"episode-{episode:06d}", f"frame-{number:06d}.png"),
        ]


def find_row_images(entry: EpisodeEntry, camera: str, size: tuple[int, int]) -> RowImages:
    """Find out from its first image what a camera's images are.

    Args:
        size: (W, H) as info.json says.

    Raises:
        ValueError: there is no such column, or no first image.
    """
    images = RowImages(entry, camera, size)
    first = next(images.read(rows_at_once=1), b"")
    is_grey_16_bit = first.startswith(_PNG) and first[24:26] == b"\x10\x00"
    return RowImages(entry, camera, size, is_depth=is_grey_16_bit, is_jpeg=first.startswith(_JPEG))
