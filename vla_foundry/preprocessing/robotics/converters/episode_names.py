"""Names for episodes that are unique, stay the same at every run, and may stand in a tar."""

import hashlib
import re
from collections.abc import Sequence

from vla_foundry.io.uri import is_remote

_LONGEST = 80


def slug(text: str) -> str:
    """Turn a text into letters, digits, "_" and "-"; of a very long one the beginning and a digest stay."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "_"
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def unique_names(uris: Sequence[str]) -> list[str]:
    """Name each of several files or folders by the end of its path, of which as much is taken as tells it from others.

    Raises:
        ValueError: two are the same, or differ only in what a name can not hold.
    """
    parts = [[part for part in uri.split("/") if part not in ("", ".")] for uri in uris]
    lengths = [1] * len(uris)
    while True:
        names = [slug("_".join(path[-length:])) for path, length in zip(parts, lengths, strict=True)]
        clashing = [number for number, name in enumerate(names) if names.count(name) > 1]
        if not clashing:
            return names
        longer = [number for number in clashing if lengths[number] < len(parts[number])]
        if not longer:
            first, second = (uris[number] for number in clashing if names[number] == names[clashing[0]])
            what = "is given twice" if first == second else f"can not be told from {second} by its name"
            raise ValueError(f"source_episodes: {first} {what}. Leave one out, or rename it.")
        for number in longer:
            lengths[number] += 1


def relative_path(uri: str, folder: str) -> str:
    """The path of a file below a folder."""
    base = folder if is_remote(folder) else folder.rstrip("/")
    return uri.removeprefix(base.rstrip("/")).lstrip("/")
