"""Templates, conversations and layouts say what is written and what of it is supervised."""

import re

import pytest

from vla_foundry.text.chat import (
    CAPTION_PROMPTS,
    PROMPT_LAYOUTS,
    Segment,
    Turn,
    chat_template_segments,
    create_caption_turns,
    create_user_turn,
    fill_template,
    layout_segments,
    parse_conversations,
    place_images,
)


def test_a_template_is_filled_and_braces_of_the_values_stay() -> None:
    assert fill_template("{{x}} {instruction}!", {"instruction": "open {it}"}) == "{x} open {it}!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{caption}", r"has the unknown field {caption}\. Fields: instruction\."),
        ("{instruction.__class__}", "may only have fields like"),
        ("{instruction!r}", "may only have fields like"),
        ("{instruction:>10}", "may only have fields like"),
        ("{}", "may only have fields like"),
        ("{instruction", "is broken: .* Write {{ for a brace"),
    ],
)
def test_a_template_with_something_else_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill_template(template, {"instruction": "go"})


@pytest.mark.parametrize(
    ("content", "num_images", "expected"),
    [
        ("Look.", 2, "<image><image>Look."),
        ("<image>Look.", 1, "<image>Look."),
        ("See <image> here.", 3, "See <image><image><image> here."),
        ("<image> and <image>", 2, "<image> and <image>"),
        ("Look.", 0, "Look."),
    ],
)
def test_every_image_gets_a_place(content: str, num_images: int, expected: str) -> None:
    assert place_images(content, num_images) == expected


def test_more_markers_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="has <image> 2 times, but the sample has 3 images"):
        place_images("<image><image>", 3)


def test_prompts_are_drawn_by_key_and_all_of_them_come() -> None:
    turns = [create_caption_turns("A cat.", seed=0, position=position) for position in range(60)]
    assert {turn[0].content for turn in turns} == set(CAPTION_PROMPTS)
    assert turns[7] == create_caption_turns("A cat.", seed=0, position=7)
    assert all(turn[1] == Turn("assistant", "A cat.") for turn in turns)
    other = [create_caption_turns("A cat.", seed=1, position=position) for position in range(60)]
    assert other != turns


def test_a_value_can_not_bring_an_image_place_in_unseen() -> None:
    turn = create_user_turn(["{instruction}"], {"instruction": "<image>"}, num_images=1, seed=0, position=0)
    assert turn.content == "<image><image>"  # two places for one image: the encoder refuses it


def test_an_empty_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="caption is empty"):
        create_caption_turns(" \n", seed=0, position=0)


def test_conversations_are_read_in_all_their_forms() -> None:
    expected = [Turn("system", "Be short."), Turn("user", "<image>\nWhat?"), Turn("assistant", "A mug.")]
    llava = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A mug."},
    ]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A mug."}]},
    ]
    assert parse_conversations(llava) == expected
    assert parse_conversations(messages) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "must be a list of turns, got str"),
        ([], "must be a list of turns"),
        (["hello"], "turn 0 of its conversations must be an object, got str"),
        ([{"from": "human", "value": "a"}, {"from": "robot", "value": "b"}], "turn 1 .* unknown role 'robot'"),
        ([{"role": ["user"], "content": "a"}], "unknown role"),
        ([{"role": "user"}], "turn 0 of its conversations has no text"),
        ([{"role": "user", "content": [{"type": "video"}]}], "neither text nor an image"),
    ],
)
def test_other_conversations_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_conversations(value)


def test_the_chat_layout_supervises_answers_and_their_ends_alone() -> None:
    turns = [
        Turn("system", "Be short."),
        Turn("user", "<image>What?"),
        Turn("assistant", "A mug."),
        Turn("user", "Colour?"),
        Turn("assistant", "Red."),
    ]
    segments = layout_segments(turns, PROMPT_LAYOUTS["chat"])
    text = "".join(segment.text + "<eos>" * segment.ends_turn for segment in segments)
    assert text == "Be short.\nUser: <image>What?\nAssistant: A mug.<eos>\nUser: Colour?\nAssistant: Red.<eos>"
    assert [segment for segment in segments if segment.is_target] == [
        Segment(" A mug.", is_target=True, ends_turn=True),
        Segment(" Red.", is_target=True, ends_turn=True),
    ]


@pytest.mark.parametrize("layout", PROMPT_LAYOUTS)
def test_the_prompt_at_inference_is_the_beginning_of_what_was_trained_on(layout: str) -> None:
    turns = [Turn("user", "<image>What?"), Turn("assistant", "A mug."), Turn("user", "Colour?")]
    prompt = layout_segments(turns, PROMPT_LAYOUTS[layout])
    trained = layout_segments([*turns, Turn("assistant", "Red.")], PROMPT_LAYOUTS[layout])
    assert trained[: len(prompt)] == prompt
    assert trained[len(prompt) :] == [Segment(PROMPT_LAYOUTS[layout].answer + "Red.", is_target=True, ends_turn=True)]


def end_of_control(text: str, start: int) -> int | None:
    found = re.compile(r"<\|\w+\|>").search(text, start)
    return found.end() if found else None


def test_a_chat_template_that_thinks_first_has_its_thoughts_supervised() -> None:
    def render(turns, announces: bool) -> str:
        text = ""
        for turn in turns:
            thoughts = "<think>\n\n</think>\n\n" if turn.role == "assistant" else ""
            text += f"<|start|>{turn.role}\n{thoughts}{turn.content}<|end|>\n"
        return text + ("<|start|>assistant\n<think>\n" if announces else "")

    segments = chat_template_segments([Turn("user", "What?"), Turn("assistant", "A mug.")], render, end_of_control)
    assert segments == [
        Segment("<|start|>user\nWhat?<|end|>\n<|start|>assistant\n<think>\n", is_target=False),
        Segment("\n</think>\n\nA mug.<|end|>", is_target=True),
    ]


def test_a_chat_template_without_an_end_of_turn_gets_the_end_of_sequence() -> None:
    def render(turns, announces: bool) -> str:
        return "".join(f"[{turn.role}] {turn.content}\n" for turn in turns) + ("[assistant] " if announces else "")

    segments = chat_template_segments([Turn("user", "What?"), Turn("assistant", "A mug.")], render, end_of_control)
    assert segments[1] == Segment("A mug.", is_target=True, ends_turn=True)


def test_a_chat_template_that_rewrites_earlier_turns_is_refused() -> None:
    def render(turns, announces: bool) -> str:
        return f"{len(turns)} turns: " + "".join(turn.content for turn in turns)

    with pytest.raises(ValueError, match="does not write an answer right after the prompt"):
        chat_template_segments([Turn("user", "What?"), Turn("assistant", "A mug.")], render, end_of_control)
