"""Captions and conversations are read from the members of a sample."""

import json
from typing import Any

import pytest

from vla_foundry.text.captions import Unusable, find_captions, parse_conversations, read_texts
from vla_foundry.text.chat import Turn


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
        ([{"role": "user", "content": [{"type": "audio"}]}], "neither text nor an image"),
    ],
)
def test_other_conversations_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_conversations(value)


@pytest.mark.parametrize(
    ("txt", "values", "captions", "is_txt"),
    [
        (b"\xef\xbb\xbf a cat \n", None, ["a cat"], True),
        (b"a cat", b"[1, 2]", ["a cat"], True),
        (b"a cat", b"[" * 100_000, ["a cat"], True),
        (b"a cat", b"\xff", ["a cat"], True),
        (b" \n", b'{"caption": "a dog"}', ["a dog"], False),
        (b"\0\0", b'{"caption": "a dog"}', ["a dog"], False),
        (None, b'\xef\xbb\xbf{"caption": " a dog"}', ["a dog"], False),
        (None, rb'{"caption": ["a", "", null, 3, " b ", "\ud800", "\u0000", ["c"]]}', ["a", "b"], False),
        (b"a cat", b'{"caption": "a dog", "messages": "none"}', ["a cat"], True),
    ],
)
def test_captions_that_can_be_used_are_found(
    txt: bytes | None, values: bytes | None, captions: list[str], is_txt: bool
) -> None:
    texts = read_texts(txt, values, key="caption")
    assert (texts.captions, texts.is_txt, texts.conversation) == (captions, is_txt, [])


@pytest.mark.parametrize(
    ("txt", "values", "reason"),
    [
        (None, None, "no caption"),
        (b"", b"{}", "no caption"),
        (None, b'{"caption": ["", null]}', "no caption"),
        (None, b"[1]", "bad JSON"),
        (b"", b'{"a":' * 100_000, "bad JSON"),
        (b"\xff", b'{"caption": "a"}', "caption is not UTF-8"),
        (b"a\0", None, "NUL bytes in the caption"),
        (None, rb'{"caption": "a \ud83d"}', "not Unicode"),
        (b"a", b'{"messages": [{"role": "robot", "content": "a"}]}', "bad conversation"),
        (b"a", b'{"messages": [{"role": "user", "content": "a"}]}', "no caption"),
        (None, rb'{"messages": [{"role": "assistant", "content": "\ud83d"}]}', "not Unicode"),
    ],
)
def test_members_that_say_nothing_are_named(txt: bytes | None, values: bytes | None, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        read_texts(txt, values, key="caption")
    assert caught.value.reason == reason


def test_a_conversation_stands_before_captions() -> None:
    values: dict[str, Any] = {"caption": "a", "messages": [{"role": "gpt", "content": "A mug."}]}
    texts = read_texts(b"a cat", json.dumps(values).encode(), key="caption")
    assert texts == ([Turn("assistant", "A mug.")], ["a cat"], True, values)
    assert find_captions(None) == find_captions({}) == []
