"""File name patterns: `*`, `?` and `[...]` stay within a folder level, a level `**` stands for any number of them."""

import re
from collections.abc import Callable


def is_pattern(name: str) -> bool:
    """True if `name` has a character that is special in a pattern."""
    return any(character in name for character in "*?[")


def compile_pattern(pattern: str) -> tuple[str, Callable[[str], object]]:
    """Return the fixed beginning of a pattern, and a function that is true for the names that match."""
    prefix = pattern[: min(pattern.index(character) for character in "*?[" if character in pattern)]
    return prefix, re.compile(_regex(pattern)).fullmatch


def _regex(pattern: str) -> str:
    levels = pattern.split("/")
    parts = []
    for number, level in enumerate(levels):
        is_last = number == len(levels) - 1
        if level == "**":
            parts.append(".+" if is_last else "(?:[^/]+/)*")
        else:
            parts.append(_level_regex(level) + ("" if is_last else "/"))
    return "".join(parts)


def _level_regex(level: str) -> str:
    pieces, position = [], 0
    while position < len(level):
        character = level[position]
        position += 1
        end = level.find("]", position + 1) if character == "[" else -1
        if end >= 0:
            body = level[position:end].replace("\\", "\\\\")
            pieces.append("[^/" + body[1:] + "]" if body.startswith("!") else "[" + body.replace("^", "\\^") + "]")
            position = end + 1
        else:
            pieces.append({"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character)))
    return "".join(pieces)
