"""Convert attributes of scenes to captions and back, and score predicted captions.

Attributes of a scene (JSON-able):

| key                         | meaning                                                                              |
|-----------------------------|--------------------------------------------------------------------------------------|
| object, part                | the object, and the part that a robot acts on; no `part`: the whole object           |
| state                       | "closed", "half open", ...; absent if the object has none                            |
| object_row, object_column   | cell of the picture with that part: 1 to GRID from the top, from the left            |
| gripper_row, gripper_column | cell with the point between the fingertips                                           |
| side, depth, height         | direction from the gripper to the part, as the robot looks: DIRECTIONS, or "level"   |
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Attributes: TypeAlias = dict[str, str | int]
Cell: TypeAlias = tuple[int, int]

# cells along each side of the picture
GRID = 16
# attribute -> (word for a smaller, word for a larger coordinate): x to the robot's right, y ahead, z up
DIRECTIONS = {"side": ("left", "right"), "depth": ("behind", "ahead"), "height": ("below", "above")}
LEVEL = "level"

_CELL = r"row (\d+), column (\d+)"
_OBJECT = re.compile(r"A (?P<object>[a-z ]+)(?:, (?P<state>[a-z ]+))?\.")
_PLACE = re.compile(rf"\. (?P<name>(?!Gripper)[A-Z][a-z ]*): {_CELL}\.")
_GRIPPER = re.compile(rf"Gripper: {_CELL}\.")
_RELATION = re.compile(r"From it: ([a-z, ]+)\.")


def describe_scene(attributes: Attributes) -> str:
    """Format attributes as a caption; the inverse of `parse_caption`."""
    state, name = attributes.get("state"), str(attributes.get("part", attributes["object"]))
    directions = [str(attributes[name]) for name in DIRECTIONS if attributes[name] != LEVEL]
    return " ".join(
        (
            f"A {attributes['object']}{f', {state}' if state else ''}.",
            f"{name.capitalize()}: {_say_cell(attributes, 'object')}.",
            f"Gripper: {_say_cell(attributes, 'gripper')}.",
            f"From it: {', '.join(directions) or LEVEL}.",
        )
    )


def parse_caption(text: str) -> Attributes:
    """Read the attributes that a caption states, sentence by sentence; malformed sentences are skipped."""
    attributes: Attributes = {}
    if found := _OBJECT.match(text):
        attributes |= {name: value for name, value in found.groupdict().items() if value is not None}
    if found := _PLACE.search(text):
        name = found["name"].lower()
        if name != attributes.get("object"):
            attributes["part"] = name
        attributes |= {"object_row": int(found[2]), "object_column": int(found[3])}
    if found := _GRIPPER.search(text):
        attributes |= {"gripper_row": int(found[1]), "gripper_column": int(found[2])}
    if found := _RELATION.search(text):
        words = set(found[1].split(", "))
        known = {word for pair in DIRECTIONS.values() for word in pair}
        if words == {LEVEL} or words <= known:
            attributes |= {name: _only(words.intersection(pair)) for name, pair in DIRECTIONS.items()}
    return attributes


def cell_of(column: float, row: float) -> Cell:
    """Return the cell (row, column), from 1, of a point in fractions of the picture from its top left corner."""
    return (min(int(row * GRID), GRID - 1) + 1, min(int(column * GRID), GRID - 1) + 1)


@dataclass(frozen=True, kw_only=True)
class AttributeScore:
    """How often one attribute was predicted correctly, next to answers that need no picture."""

    # scenes that have the attribute
    num_scenes: int
    # share of correct predictions
    accuracy: float
    # expected share of a uniform guess among the attribute's values (for a state: among the states of its object)
    chance: float
    # share of the best single answer; at least that of the most frequent caption
    constant: float


def score_captions(predictions: Sequence[str], truths: Sequence[str]) -> dict[str, AttributeScore]:
    """Compare predicted captions with true ones, attribute by attribute.

    `object_position` and `gripper_position` count if the cell is the true one or touches it (also at a corner);
    `..._exact` only if it is the true one; `caption` only if every word is right.

    Raises:
        ValueError: the numbers of captions differ or are 0, or a true caption does not follow the template.
    """
    if len(predictions) != len(truths) or not truths:
        raise ValueError(f"Each true caption needs one prediction: got {len(predictions)} for {len(truths)}.")
    guessed = [parse_caption(text.strip()) for text in predictions]
    true = [parse_caption(text) for text in truths]
    for text, attributes in zip(truths, true, strict=True):
        if set(DIRECTIONS) - attributes.keys() or describe_scene(attributes) != text:
            raise ValueError(f"The true caption '{text}' does not follow the template of scenes.")
    scores = {"object": _score_exact(guessed, true, "object"), "state": _score_state(guessed, true)}
    for thing in ("object", "gripper"):
        guessed_cells, true_cells = [_cell(one, thing) for one in guessed], [_cell(one, thing) for one in true]
        scores[f"{thing}_position"] = _score_cells(guessed_cells, true_cells, reach=1)
        scores[f"{thing}_position_exact"] = _score_cells(guessed_cells, true_cells, reach=0)
    scores |= {name: _score_exact(guessed, true, name) for name in DIRECTIONS}
    most = Counter(truths).most_common(1)[0][1]
    scores["caption"] = AttributeScore(
        num_scenes=len(truths),
        accuracy=_mean([one.strip() == other for one, other in zip(predictions, truths, strict=True)]),
        chance=1 / len(set(truths)),
        constant=most / len(truths),
    )
    return scores


def _score_exact(guessed: list[Attributes], true: list[Attributes], name: str) -> AttributeScore:
    values = [one[name] for one in true]
    return AttributeScore(
        num_scenes=len(true),
        accuracy=_mean([one.get(name) == value for one, value in zip(guessed, values, strict=True)]),
        chance=1 / len(set(values)),
        constant=Counter(values).most_common(1)[0][1] / len(values),
    )


def _score_state(guessed: list[Attributes], true: list[Attributes]) -> AttributeScore:
    pairs = [(one, other) for one, other in zip(guessed, true, strict=True) if "state" in other]
    if not pairs:
        return AttributeScore(num_scenes=0, accuracy=0.0, chance=0.0, constant=0.0)
    states: dict[str | int, set[str | int]] = {}
    for _, other in pairs:
        states.setdefault(other["object"], set()).add(other["state"])
    return AttributeScore(
        num_scenes=len(pairs),
        accuracy=_mean([one.get("state") == other["state"] for one, other in pairs]),
        chance=_mean([1 / len(states[other["object"]]) for _, other in pairs]),
        constant=Counter(other["state"] for _, other in pairs).most_common(1)[0][1] / len(pairs),
    )


def _score_cells(guessed: list[Cell | None], true: list[Cell | None], *, reach: int) -> AttributeScore:
    def hits(guess: Callable[[int], Cell | None]) -> float:
        return _mean([_is_near(guess(number), cell, reach) for number, cell in enumerate(true)])

    cells = [(row, column) for row in range(1, GRID + 1) for column in range(1, GRID + 1)]
    shares = [hits(lambda _, cell=cell: cell) for cell in cells]
    return AttributeScore(
        num_scenes=len(true),
        accuracy=hits(lambda number: guessed[number]),
        chance=sum(shares) / len(shares),
        constant=max(shares),
    )


def _is_near(guess: Cell | None, cell: Cell | None, reach: int) -> bool:
    if guess is None or cell is None:
        return False
    return max(abs(guess[0] - cell[0]), abs(guess[1] - cell[1])) <= reach


def _cell(attributes: Attributes, thing: str) -> Cell | None:
    row, column = attributes.get(f"{thing}_row"), attributes.get(f"{thing}_column")
    return None if row is None or column is None else (int(row), int(column))


def _say_cell(attributes: Attributes, thing: str) -> str:
    return f"row {attributes[f'{thing}_row']}, column {attributes[f'{thing}_column']}"


def _only(words: set[str]) -> str:
    return next(iter(words)) if len(words) == 1 else LEVEL


def _mean(values: Sequence[float | bool]) -> float:
    return sum(values) / len(values)
