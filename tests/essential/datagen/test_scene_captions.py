"""Captions say what attributes hold, can be read back exactly, and are scored attribute by attribute."""

import itertools

import pytest

from vla_foundry.datagen.scene_captions import (
    DIRECTIONS,
    GRID,
    LEVEL,
    Attributes,
    cell_of,
    describe_scene,
    parse_caption,
    score_captions,
)


def attributes_of(**changes: str | int) -> Attributes:
    return {
        "object": "drawer",
        "part": "handle",
        "state": "half open",
        "object_row": 5,
        "object_column": 3,
        "gripper_row": 2,
        "gripper_column": 6,
        "side": "left",
        "depth": "ahead",
        "height": "below",
    } | changes


def test_a_caption_reads_as_english() -> None:
    assert describe_scene(attributes_of()) == (
        "A drawer, half open. Handle: row 5, column 3. Gripper: row 2, column 6. From it: left, ahead, below."
    )


def test_parsing_inverts_describing_for_every_kind_of_scene() -> None:
    directions = [(*pair, LEVEL) for pair in DIRECTIONS.values()]
    things: list[dict[str, str]] = [
        {"part": "handle", "state": "turned left"},
        {"state": "pressed"},
        {"part": "knob"},
        {},
    ]
    for thing, words in itertools.product(things, itertools.product(*directions)):
        attributes = attributes_of() | dict(zip(DIRECTIONS, words, strict=True))
        for name in ("part", "state"):
            del attributes[name]
        attributes |= thing
        assert parse_caption(describe_scene(attributes)) == attributes


def test_a_malformed_sentence_costs_only_its_own_attributes() -> None:
    caption = describe_scene(attributes_of()).replace("row 2,", "row two,")
    expected = {name: value for name, value in attributes_of().items() if not name.startswith("gripper")}
    assert parse_caption(caption) == expected
    assert parse_caption("row row row your boat") == {}


def test_contradictory_or_unknown_directions_are_not_understood_as_true() -> None:
    caption = describe_scene(attributes_of())
    assert "side" not in parse_caption(caption.replace("left, ahead", "leftish, ahead"))
    assert parse_caption(caption.replace("left, ahead", "left, right"))["side"] == LEVEL


def test_cells_cover_the_picture() -> None:
    assert cell_of(0.0, 0.0) == (1, 1)
    assert cell_of(1.0, 0.999) == (GRID, GRID)
    assert cell_of(column=0.3, row=0.9) == (15, 5)


def test_true_captions_score_one() -> None:
    truths = [describe_scene(attributes_of(object_row=row)) for row in range(1, 9)]
    assert all(score.accuracy == 1 for score in score_captions(truths, truths).values())


def test_a_position_counts_within_one_cell_and_not_beyond() -> None:
    truth = describe_scene(attributes_of(object_row=5, object_column=3))
    guesses = [attributes_of(object_row=row, object_column=column) for row, column in ((6, 2), (5, 5), (3, 3), (5, 3))]
    scores = score_captions([describe_scene(guess) for guess in guesses], [truth] * 4)
    assert scores["object_position"].accuracy == 0.5
    assert scores["object_position_exact"].accuracy == 0.25
    assert scores["gripper_position"].accuracy == 1
    assert scores["caption"].accuracy == 0.25


def test_chance_and_constant_answers_are_what_counting_gives() -> None:
    states = ["open", "open", "closed", "half open"]
    truths = [describe_scene(attributes_of(state=state)) for state in states]
    button = attributes_of(object="button", state="pressed", object_row=1, object_column=1)
    scores = score_captions([""] * 5, [*truths, describe_scene(button)])
    assert scores["object"].chance == 1 / 2
    assert scores["object"].constant == 4 / 5
    # a drawer is guessed among its three states, the button has one
    assert scores["state"].chance == pytest.approx((4 * 1 / 3 + 1) / 5)
    assert scores["state"].constant == 2 / 5
    # nine cells lie within one of (5, 3), four within one of the corner
    assert scores["object_position"].chance == pytest.approx((4 * 9 + 4) / 5 / GRID**2)
    assert scores["object_position"].constant == 4 / 5
    assert scores["caption"].constant == 2 / 5
    assert all(score.accuracy == 0 for score in scores.values())


def test_things_without_a_state_do_not_count_for_states() -> None:
    thermos = attributes_of(object="thermos")
    for name in ("part", "state"):
        del thermos[name]
    truths = [describe_scene(thermos), describe_scene(attributes_of())]
    score = score_captions([truths[0], truths[0]], truths)["state"]
    assert (score.num_scenes, score.accuracy) == (1, 0)


def test_captions_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 for 2"):
        score_captions(["a"], ["b", "c"])
    with pytest.raises(ValueError, match=r"'A cat sat\.' does not follow the template"):
        score_captions(["a"], ["A cat sat."])
