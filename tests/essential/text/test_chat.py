"""Conversations become ids in which exactly the answers and their ends are supervised."""

import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.essential.byte_level import train_tokenizer
from vla_foundry.text.chat import (
    CAPTION_PROMPTS,
    PROMPT_LAYOUTS,
    ChatTokenizer,
    Segment,
    Turn,
    TurnEnd,
    chat_template_segments,
    create_caption_turns,
    create_user_turn,
    fill_template,
    layout_segments,
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


def find_end(tail: str) -> TurnEnd:
    found = re.search(r"<\|\w+\|>", tail)
    return TurnEnd(tail[: found.end()], found.group()) if found else TurnEnd("")


def test_a_chat_template_that_thinks_first_has_its_thoughts_supervised() -> None:
    def render(turns, announces: bool) -> str:
        text = ""
        for turn in turns:
            thoughts = "<think>\n\n</think>\n\n" if turn.role == "assistant" else ""
            text += f"<|start|>{turn.role}\n{thoughts}{turn.content}<|end|>\n"
        return text + ("<|start|>assistant\n<think>\n" if announces else "")

    segments = chat_template_segments([Turn("user", "What?"), Turn("assistant", "A mug.")], render, find_end)
    assert segments == [
        Segment("<|start|>user\nWhat?<|end|>\n<|start|>assistant\n<think>\n", is_target=False),
        Segment("\n</think>\n\nA mug.<|end|>", is_target=True),
    ]


def test_a_chat_template_without_an_end_of_turn_gets_the_end_of_sequence() -> None:
    def render(turns, announces: bool) -> str:
        return "".join(f"[{turn.role}] {turn.content}\n" for turn in turns) + ("[assistant] " if announces else "")

    segments = chat_template_segments([Turn("user", "What?"), Turn("assistant", "A mug.")], render, find_end)
    assert segments[1] == Segment("A mug.", is_target=True, ends_turn=True)


def test_a_chat_template_that_rewrites_earlier_turns_is_refused() -> None:
    def render(turns, announces: bool) -> str:
        return f"{len(turns)} turns: " + "".join(turn.content for turn in turns)

    with pytest.raises(ValueError, match="does not write an answer right after the prompt"):
        chat_template_segments([Turn("user", "What?"), Turn("assistant", "A mug.")], render, find_end)


TEXT = ["User: What lies on the table? Assistant: A red mug, left of the gripper.", "Describe the image. Colour?"]
TURNS = [
    Turn("user", "<image>What lies on the table?"),
    Turn("assistant", "A red mug."),
    Turn("user", "Colour?"),
    Turn("assistant", "Red, and <b>bright</b>."),
]
IMAGE = [9001, 9001, 9001]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(**names: str) -> Any:
    """A byte-level BPE, as `preprocess tokenizer` trains it."""
    return train_tokenizer(350, TEXT * 3, ["<eos>", "<|im_start|>", "<|im_end|>"], **{"eos_token": "<eos>", **names})


def sentence_piece(scheme: str = "first") -> Any:
    """A tokenizer as Llama's: a space is put before a text, and the beginning of sequence before that."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if scheme == "legacy" else scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", "<image>"], show_progress=False
    )
    backend.train_from_iterator([*TEXT * 3, "\n"], trainer)
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def supervised(encoder: ChatTokenizer, turns: list[Turn], images: list[list[int]]) -> list[str]:
    """The text of each run of supervised tokens."""
    ids, mask = encoder.encode(turns, images)
    runs: list[list[int]] = []
    for number, (token, is_target) in enumerate(zip(ids, mask, strict=True)):
        if is_target and (number == 0 or not mask[number - 1]):
            runs.append([])
        if is_target:
            runs[-1].append(token)
    return [encoder.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("layout", "space", "end"), [("chat", " ", "<eos>"), ("plain", "", "<eos>"), ("chat_template", "", "<|im_end|>")]
)
def test_supervised_text_is_the_answers_and_what_ends_them(layout: str, space: str, end: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    encoder = ChatTokenizer(tokenizer, prompt_layout=layout)
    answers = [f"{space}{turn.content}{end}" for turn in TURNS if turn.role == "assistant"]
    assert supervised(encoder, TURNS, [IMAGE]) == answers


@pytest.mark.parametrize("layout", ["chat", "plain", "chat_template"])
def test_the_prompt_is_token_for_token_the_beginning_of_what_was_trained_on(layout: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    encoder = ChatTokenizer(tokenizer, prompt_layout=layout)
    trained, mask = encoder.encode(TURNS, [IMAGE])
    for end in (1, 3):
        prompt, no_targets = encoder.encode(TURNS[:end], [IMAGE])
        assert trained[: len(prompt)] == prompt
        assert mask[len(prompt)]
        assert any(no_targets) == (end == 3)


@pytest.mark.parametrize("end", ["<|im_end|>", "<end_of_turn>", "</s>"])
def test_an_answer_made_of_letters_of_the_end_token_is_supervised_once(end: str) -> None:
    tokenizer = byte_level(additional_special_tokens=[end])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", end)
    encoder = ChatTokenizer(tokenizer, prompt_layout="chat_template")
    assert encoder.stop_token_ids()[0] == tokenizer.convert_tokens_to_ids(end)
    for answer in ("a", "d", "e", "s", "m", "_", "end", "turn", "im", "of", "Placeholder", "a  "):
        ids, mask = encoder.encode([Turn("user", "Which?"), Turn("assistant", answer)], [])
        targets = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
        assert targets == tokenizer.encode(answer + end, add_special_tokens=False)
        # twice the same answer: the first one is not taken for the second
        twice = [Turn("user", "Which?"), Turn("assistant", answer)] * 2
        assert supervised(encoder, twice, []) == [answer + end] * 2


@pytest.mark.parametrize(
    ("end", "added", "stop"),
    [("<|stop|>", True, "<|stop|>"), ("</s>", True, "</s>"), (" ## end\n##", False, None), ("q", False, "q")],
)
def test_a_turn_ends_where_the_template_ends_it(end: str, added: bool, stop: str | None) -> None:
    from transformers import AddedToken

    tokenizer = byte_level(bos_token="<|im_start|>")
    if added:
        tokenizer.add_tokens([AddedToken(end, special=False), AddedToken("  ", special=False)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", end).replace("\n{% endfor", "<|im_start|>  \n{% endfor")
    encoder = ChatTokenizer(tokenizer, prompt_layout="chat_template")
    tokens = tuple(tokenizer.encode(end, add_special_tokens=False))
    first = encoder.stop_token_ids()[0]
    assert first == (tokens if stop is None else tokenizer.convert_tokens_to_ids(stop))
    for answer in ("a", "s", "end", "d  ", "#"):
        ids, mask = encoder.encode([Turn("user", "Which?"), Turn("assistant", answer)], [])
        targets = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
        assert targets == [*tokenizer.encode(answer, add_special_tokens=False), *tokens]
    with pytest.raises(ValueError, match=r"a text has .* which ends a turn"):
        encoder.encode([Turn("user", "a"), Turn("assistant", f"a{end}b")], [])


def test_an_end_that_is_text_of_unknown_letters_is_more_than_its_last_token() -> None:
    tokenizer = sentence_piece()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", " A§")
    tokens = tuple(tokenizer.encode("</s> A§", add_special_tokens=False)[1:])
    assert tokens[-1] == tokenizer.unk_token_id
    assert ChatTokenizer(tokenizer, prompt_layout="chat_template").stop_token_ids()[0] == tokens


def test_image_tokens_stand_where_the_markers_are_and_are_no_targets() -> None:
    encoder = ChatTokenizer(byte_level(), prompt_layout="chat")
    ids, mask = encoder.encode(
        [Turn("user", "<image>What? <image>"), Turn("assistant", "Mug.")], [[9001, 9002], [9003]]
    )
    places = [number for number, token in enumerate(ids) if token > 9000]
    assert [ids[place] for place in places] == [9001, 9002, 9003]
    assert not any(mask[place] for place in places)
    assert encoder.tokenizer.decode(ids[: places[0]]) == "User: "
    assert encoder.tokenizer.decode(ids[places[1] + 1 : places[2]]) == "What? "


def test_without_images_the_ids_are_those_of_the_whole_text() -> None:
    tokenizer = byte_level()
    encoder = ChatTokenizer(tokenizer, prompt_layout="chat")
    ids, _ = encoder.encode([Turn("user", "What?"), Turn("assistant", "A mug.")], [])
    assert ids == tokenizer.encode("User: What?\nAssistant: A mug.<eos>")


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
def test_a_sentence_piece_tokenizer_puts_no_space_into_the_middle(scheme: str) -> None:
    tokenizer = sentence_piece(scheme)
    encoder = ChatTokenizer(tokenizer, prompt_layout="chat")
    image = [tokenizer.convert_tokens_to_ids("<image>")]
    ids, _ = encoder.encode([Turn("user", "<image>What?"), Turn("assistant", "A mug.")], [image])
    assert ids == tokenizer.encode("User: <image>What?\nAssistant: A mug.</s>")
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
def test_the_ids_of_a_chat_template_are_those_of_its_whole_text(scheme: str) -> None:
    """The prompt ends in plain text (Zephyr), the conversation has an end of its own (Phi), a letter is unknown."""
    tokenizer = sentence_piece(scheme)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}>\n{{ message['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant>\n{% else %}<s>{% endif %}"
    )
    encoder = ChatTokenizer(tokenizer, prompt_layout="chat_template")
    turns = [turn for answer in ("A mug.", "m", "¿Z") for turn in (Turn("user", "What?Z"), Turn("assistant", answer))]
    text = tokenizer.apply_chat_template([turn._asdict() for turn in turns], tokenize=False)
    ids, _ = encoder.encode(turns, [])
    assert ids == tokenizer.encode(text, add_special_tokens=False)[: len(ids)]
    assert supervised(encoder, turns, []) == ["A mug.</s>", "m</s>", "<unk><unk></s>"]


def test_answers_are_cut_at_the_length_and_prompts_are_not() -> None:
    encoder = ChatTokenizer(byte_level(), prompt_layout="chat")
    turns = TURNS[:2]
    whole, mask = encoder.encode(turns, [IMAGE])
    num_prompt = mask.index(True)
    assert encoder.encode(turns, [IMAGE], max_tokens=num_prompt + 2) == (
        whole[: num_prompt + 2],
        mask[: num_prompt + 2],
    )
    assert encoder.encode(turns, [IMAGE], max_tokens=len(whole)) == (whole, mask)
    with pytest.raises(ValueError, match=f"take {num_prompt} tokens, more than data.seq_len allows: {num_prompt}"):
        encoder.encode(turns, [IMAGE], max_tokens=num_prompt)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([Turn("user", "What?"), Turn("assistant", "A mug.")], "have <image> 0 times, but there are 1 images"),
        ([Turn("user", "<image><image>"), Turn("assistant", "A.")], "have <image> 2 times, but there are 1 images"),
        ([Turn("user", "<image>"), Turn("assistant", "  ")], "an answer is empty"),
        ([Turn("user", "What?"), Turn("assistant", "<image>")], "an answer has an image"),
        ([Turn("user", "<image>Hi<eos>"), Turn("assistant", "A.")], "has the control token '<eos>'"),
        ([Turn("user", "<image>"), Turn("assistant", "A<|im_end|>B")], r"has the control token '<\|im_end\|>'"),
        ([Turn("assistant", "A.")], "have <image> 0 times"),
    ],
)
def test_turns_that_would_mislead_are_refused(turns: list[Turn], message: str) -> None:
    encoder = ChatTokenizer(byte_level(), prompt_layout="chat")
    with pytest.raises(ValueError, match=message):
        encoder.encode(turns, [IMAGE])


def test_an_unknown_layout_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"prompt_layout 'chatty' is unknown .* Use chat, plain, caption\."):
        ChatTokenizer(byte_level(), prompt_layout="chatty")
    with pytest.raises(ValueError, match="prompt_layout 'chat_template' is unknown for this tokenizer"):
        ChatTokenizer(byte_level(), prompt_layout="chat_template")


def test_the_tokens_that_end_an_answer_are_known() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    names = [
        tokenizer.convert_ids_to_tokens(token)
        for token in ChatTokenizer(tokenizer, prompt_layout="chat_template").stop_token_ids()
    ]
    assert names == ["<|im_end|>", "<eos>"]
    assert ChatTokenizer(tokenizer, prompt_layout="chat").stop_token_ids() == [tokenizer.eos_token_id]
