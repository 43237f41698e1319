"""Words that users write, by the type of the field they are for."""

import math
from typing import Any, Literal

import pytest

from vla_foundry.config.tree import COMMAND_LINE, Origin, Scalar
from vla_foundry.config.values import decode_value

FILE = Origin("job.yaml", 7)


def decode(hint: Any, text: str, origin: Origin = COMMAND_LINE) -> Any:
    return decode_value(hint, Scalar(text), "a.b", origin)


@pytest.mark.parametrize(
    ("hint", "text", "expected"),
    [
        (int, "14_000_000", 14_000_000),
        (int, "1e6", 1_000_000),
        (int, "1.5e3", 1500),
        (int, "-3", -3),
        (int, "9007199254740993", 9007199254740993),
        (float, "3", 3.0),
        (float, "3e-4", 3e-4),
        (float, "-.5", -0.5),
        (float, "inf", math.inf),
        (float, "1_000.5", 1000.5),
        (bool, "true", True),
        (bool, "True", True),
        (bool, "False", False),
        (bool, "off", False),
        (str, "0123", "0123"),
        (str, "1e5", "1e5"),
        (str, "2026_01_01", "2026_01_01"),
        (str, "a: b, [c", "a: b, [c"),
        (str | None, "null", None),
        (str | None, "None", None),
        (str | None, "nullable", "nullable"),
        (int | None, "none", None),
        (int | None, "1e2", 100),
        (bool | None, "null", None),
        (bool | None, "false", False),
        (float | str, "0.5", 0.5),
        (float | str, "auto", "auto"),
        (Literal["none", "rotary"], "none", "none"),
        (Literal["none", "rotary"] | None, "none", "none"),
        (Literal[1, 2], "2", 2),
        (list[str], '["a","b"]', ["a", "b"]),
        (list[str], "[01, 1e3]", ["01", "1e3"]),
        (list[str], "a,b", ["a", "b"]),
        (list[str], "shard_{a,b}", ["shard_{a,b}"]),
        (list[str], "a", ["a"]),
        (list[float], "[1, 0.5]", [1.0, 0.5]),
        (list[float], "1,-2", [1.0, -2.0]),
        (list[list[float]], "[[1, 2], [3e1]]", [[1.0, 2.0], [30.0]]),
        (list[int] | None, "null", None),
        (tuple[float, float], "[-0.05, 0.05]", (-0.05, 0.05)),
        (tuple[int, ...], "[1, 2, 3]", (1, 2, 3)),
        (Any, "1e6", 1e6),
        (Any, "7", 7),
        (Any, "yes", True),
        (Any, "text", "text"),
    ],
)
def test_what_users_type_becomes_the_type_of_the_field(hint: Any, text: str, expected: Any) -> None:
    decoded = decode(hint, text)
    assert decoded == expected
    assert type(decoded) is type(expected)


@pytest.mark.parametrize(
    ("hint", "text", "message"),
    [
        (int, "1.5", "a.b must be a whole number, got '1.5'."),
        (int, "true", "a.b must be a whole number, got 'true'."),
        (int, "1e400", "a.b must be a whole number below 10^18, got '1e400'."),
        (int, "1e" + 99 * "7", f"a.b must be a whole number below 10^18, got '1e{55 * '7'}...'."),
        (int, "1e-" + 99 * "7", f"a.b must be a whole number, got '1e-{54 * '7'}...'."),
        (int, "null", "a.b must be a whole number, got null."),
        (int | None, "ten", "a.b must be a whole number or null, got 'ten'."),
        (float, "abc", "a.b must be a number, got 'abc'."),
        (bool, "maybe", "a.b must be true or false, got 'maybe'."),
        (bool, "1", "a.b must be true or false, got '1'."),
        (str, "null", """a.b must be text, got null. In quotes, "null" is text."""),
        (list[str], "[a, null]", """a.b[1] must be text, got null. In quotes, "null" is text."""),
        (list[int], "[1, x]", "a.b[1] must be a whole number, got 'x'."),
        (list[int], "[1, 2", "a.b must be a list such as [a,b] or [0.5,0.5], got '[1, 2'."),
        (list[str], "[*.bias]", """got '[*.bias]'. YAML needs quotes around an entry such as "*.bias"."""),
        (tuple[float, float], "[1]", "a.b must have 2 entries, got 1."),
        (dict[str, int], "3", "a.b must be a mapping {text: int}, got '3'."),
        (Literal["fp32", "pure_bf16"], "fp23", "Did you mean 'fp32'? Choose one of: fp32, pure_bf16."),
        (Literal["a"] | int, "b", "a.b must be one of a or a whole number, got 'b'."),
    ],
)
def test_a_wrong_value_says_what_it_must_be(hint: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        decode(hint, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_of_a_file_names_file_and_line() -> None:
    with pytest.raises(ValueError, match=r"^job\.yaml:7: a\.b must be a number, got 'x'\.$"):
        decode(float, "x", FILE)


def test_commas_make_a_list_only_on_the_command_line() -> None:
    assert decode(list[str], "a,b", FILE) == ["a,b"]


def test_a_flag_without_a_value_is_true_and_nothing_else() -> None:
    assert decode_value(bool, True, "a", COMMAND_LINE) is True
    with pytest.raises(ValueError, match=r"^a needs a value: float\.$"):
        decode_value(float, True, "a", COMMAND_LINE)


def test_quoted_words_are_numbers_where_a_number_is_due_and_text_where_it_may_be() -> None:
    assert decode_value(float, Scalar("1000", quoted=True), "a", FILE) == 1000.0
    assert decode_value(str | int, Scalar("5", quoted=True), "a", FILE) == "5"
    assert decode_value(str | None, Scalar("null", quoted=True), "a", FILE) == "null"
