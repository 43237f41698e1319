"""A few pictures of an episode, evenly spread over its time although its length is not known before its end."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# pictures of a strip
NUM_PICTURES = 6


class FrameStrip:
    """Keeps pictures at every n-th step, and doubles n when there are too many.

    Args:
        path: PNG file, the pictures side by side.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._every = 4
        self._frames: dict[int, np.ndarray] = {}

    def wants(self, step: int) -> bool:
        """True if a picture after `step` actions is to be added."""
        return step % self._every == 0

    def add(self, step: int, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Add a picture."""
        self._frames[step] = image
        if len(self._frames) > 4 * NUM_PICTURES:
            self._every *= 2
            self._frames = {at: frame for at, frame in self._frames.items() if at % self._every == 0}

    def save(self) -> None:
        """Write the first picture, the last, and those nearest to even steps between them."""
        steps = np.array(sorted(self._frames))
        wanted = np.linspace(0, steps[-1], NUM_PICTURES)
        chosen = [int(steps[np.abs(steps - at).argmin()]) for at in wanted]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([self._frames[step] for step in chosen], axis=1)).save(self.path, "PNG")
