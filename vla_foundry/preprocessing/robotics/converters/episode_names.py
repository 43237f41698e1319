"""Names for episodes that are unique, stay the same at every run, and may stand in a tar."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

_LONGEST = 80


def slug(text: str) -> str:
    """Turn a text into letters, digits, "_" and "-"; of a very long one the beginning and a digest stay."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "_"
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def unique_names(uris: Sequence[str], *, num_parts: int = 1) -> list[str]:
    """Name each of several files or folders by the end of its path, of which as much is taken as tells it from others.

    Args:
        num_parts: how many parts of a path are taken at least.

    Raises:
        ValueError: two are the same, or differ only in what a name can not hold.
    """
    parts = [[part for part in uri.split("/") if part not in ("", ".")] for uri in uris]
    lengths = [num_parts] * len(uris)
    while True:
        names = [slug("_".join(path[-length:])) for path, length in zip(parts, lengths, strict=True)]
        counts = Counter(names)
        if len(counts) == len(names):
            return names
        clashing = [number for number, name in enumerate(names) if counts[name] > 1]
        longer = [number for number in clashing if lengths[number] < len(parts[number])]
        if not longer:
            first, second = [uris[number] for number in clashing if names[number] == names[clashing[0]]][:2]
            what = "is given twice" if first == second else f"can not be told from {second} by its name"
            raise ValueError(f"source_episodes: {first} {what}. Leave one out, or rename it.")
        for number in longer:
            lengths[number] += 1
