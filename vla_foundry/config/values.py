"""Decode what users write into int, float, bool, text, lists and dicts, by the type of the field."""

import math
import re
from contextlib import suppress
from decimal import Decimal
from functools import reduce
from operator import or_
from typing import Any, Literal, get_args, get_origin

from vla_foundry.config.schema import describe_type, dict_value_type, options
from vla_foundry.config.tree import COMMAND_LINE, Origin, Scalar, Value, to_value
from vla_foundry.config.yaml_source import is_null, parse_inline
from vla_foundry.registry import unknown_name_message

# Python refuses to convert thousands of digits
_INT = re.compile(r"[+-]?\d[\d_]{0,999}")
_FLOAT = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d+)?")
_SPECIAL_FLOATS = {"inf": math.inf, "+inf": math.inf, "-inf": -math.inf, "nan": math.nan}
BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# whole numbers with an exponent must be smaller; larger ones are typing errors
_LARGEST_INT = 1e18
# null if the field can be null, else text
_NONE_WORDS = ("none", "None")
_MUST_BE = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def decode_value(hint: Any, value: Value, path: str, origin: Origin) -> Any:
    """Return `value` as the type `hint`.

    Args:
        hint: int, float, bool, str, None, Any, Literal, list, tuple, dict, or a union of these.
        path: the config path, for messages.
        origin: where the value was written, for messages.

    Raises:
        ValueError: one line with origin, path, the expected type, and the value.
    """
    choices = options(hint)
    if len(choices) > 1:
        return _decode_union(choices, value, path, origin)
    if hint is Any:
        return _plain(value)
    if get_origin(hint) is Literal:
        return _decode_literal(hint, value, path, origin)
    if hint is type(None) and is_null(value):
        return None
    if hint in (list, tuple) or get_origin(hint) in (list, tuple):
        return _decode_sequence(hint, value, path, origin)
    if dict_value_type(hint) is not None:
        return _decode_dict(hint, value, path, origin)
    if hint in (int, float, bool, str):
        decoded = _decode_scalar(hint, value)
        if decoded is not None:
            return decoded
    raise _wrong_type(hint, value, path, origin)


def _wrong_type(hint: Any, value: Value, path: str, origin: Origin) -> ValueError:
    if value is True:
        return ValueError(f"{origin.prefix}{path} needs a value: {describe_type(hint)}.")
    wanted = " or ".join(dict.fromkeys(_must_be(option) for option in options(hint)))
    if isinstance(value, Scalar) and abs(_decode_float(value.text) or 0) >= _LARGEST_INT:
        wanted = wanted.replace(_MUST_BE[int], f"{_MUST_BE[int]} below 10^18")
    shown = "null" if is_null(value) else f"'{show(value)}'" if isinstance(value, Scalar) else show(value)
    quoted = ' In quotes, "null" is text.' if is_null(value) and str in options(hint) else ""
    return ValueError(f"{origin.prefix}{path} must be {wanted}, got {shown}.{quoted}")


def _must_be(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(str(choice) for choice in get_args(hint))}"
    if hint in (list, tuple) or get_origin(hint) in (list, tuple):
        return f"a list {describe_type(hint)}"
    return _MUST_BE.get(hint) or f"a mapping {describe_type(hint)}"


def show(value: Value) -> str:
    """Return a value for messages, cut if it is long."""
    text = value.text if isinstance(value, Scalar) else str(_plain(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _decode_union(choices: tuple[Any, ...], value: Value, path: str, origin: Origin) -> Any:
    for choice in choices:
        if get_origin(choice) is Literal and isinstance(value, Scalar) and value.text in get_args(choice):
            return value.text
    if type(None) in choices and is_null(value):
        return None
    rest = [choice for choice in choices if choice is not type(None)]
    if len(rest) == 1:
        try:
            return decode_value(rest[0], value, path, origin)
        except ValueError as error:
            # mention null only for a plain scalar, the only value that could have been null
            message = str(error)
            at = message.find(", got ")
            hint_null = type(None) in choices and " must be " in message and isinstance(value, Scalar) and at > 0
            raise ValueError(f"{message[:at]} or null{message[at:]}" if hint_null else message) from None
    # text accepts anything, so try it last; for a quoted word, try it first
    is_quoted = isinstance(value, Scalar) and value.quoted
    rest.sort(key=lambda choice: (choice is str) != is_quoted)
    for choice in rest:
        try:
            return decode_value(choice, value, path, origin)
        except ValueError:
            continue
    shape = Literal[tuple(rest)] if all(get_origin(choice) is Literal for choice in rest) else None
    raise _wrong_type(shape or reduce(or_, choices), value, path, origin)


def _decode_literal(hint: Any, value: Value, path: str, origin: Origin) -> Any:
    for choice in get_args(hint):
        if isinstance(value, Scalar) and (
            value.text == choice if isinstance(choice, str) else _decode_scalar(type(choice), value) == choice
        ):
            return choice
        if type(value) is type(choice) and value == choice:
            return choice
    if not isinstance(value, Scalar):
        raise _wrong_type(hint, value, path, origin)
    known = [str(choice) for choice in get_args(hint)]
    raise ValueError(origin.prefix + unknown_name_message(path, value.text, known, listed_as="Choose one of"))


def _decode_scalar(hint: type, value: Value) -> int | float | bool | str | None:
    """Return the value as `hint`, or None if it is of another type."""
    if isinstance(value, Scalar):
        if hint is str:
            return None if is_null(value) and value.text not in _NONE_WORDS else value.text
        text = value.text.strip()
        if hint is bool:
            return BOOL_WORDS.get(text.lower())
        return _decode_int(text) if hint is int else _decode_float(text)
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else None


def _decode_int(text: str) -> int | None:
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        with suppress(ArithmeticError):  # an exponent of twenty digits
            number = Decimal(text.replace("_", ""))
            if abs(number) < _LARGEST_INT and number == number.to_integral_value():
                return int(number)
    return None


def _decode_float(text: str) -> float | None:
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return _SPECIAL_FLOATS.get(text.lower().replace(".", "", 1))


def _decode_sequence(hint: Any, value: Value, path: str, origin: Origin) -> Any:
    items = as_list(value, path, origin)
    if items is None:
        raise _wrong_type(hint, value, path, origin)
    arguments = get_args(hint) or (Any,)
    is_tuple = hint is tuple or get_origin(hint) is tuple
    is_fixed = is_tuple and Ellipsis not in arguments
    if is_fixed and len(items) != len(arguments):
        raise ValueError(f"{origin.prefix}{path} must have {len(arguments)} entries, got {len(items)}.")
    item_types = arguments if is_fixed else (arguments[0],) * len(items)
    decoded = [
        decode_value(item_type, item, f"{path}[{index}]", origin)
        for index, (item_type, item) in enumerate(zip(item_types, items, strict=True))
    ]
    return tuple(decoded) if is_tuple else decoded


def as_list(value: Value, path: str, origin: Origin) -> list[Value] | None:
    """Return a value as a list, or None; one word is a list of one, and on the command line `a,b` is a list of two."""
    if isinstance(value, list):
        return value
    if not isinstance(value, Scalar) or is_null(value):
        return None
    if value.quoted or origin is not COMMAND_LINE:
        return [value]
    text = value.text.strip()
    if text.startswith("["):
        try:
            parsed = to_value(parse_inline(text))
        except ValueError:
            hint = """ YAML needs quotes around an entry such as "*.bias".""" if "*" in text else ""
            raise ValueError(f"{path} must be a list such as [a,b] or [0.5,0.5], got '{text}'.{hint}") from None
        return parsed if isinstance(parsed, list) else None
    if "," in text and not any(mark in text for mark in "{}()[] "):
        return [Scalar(part) for part in text.split(",")]
    return [value]


def _decode_dict(hint: Any, value: Value, path: str, origin: Origin) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _wrong_type(hint, value, path, origin)
    key_type, item_type = next(get_args(option) or (str, Any) for option in options(hint) if option is not type(None))
    keys = [decode_value(key_type, Scalar(key) if isinstance(key, str) else key, path, origin) for key in value]
    items = [decode_value(item_type, item, f"{path}.{key}", origin) for key, item in value.items()]
    return dict(zip(keys, items, strict=True))


def _plain(value: Value) -> Any:
    """Return a value as YAML reads it, but 1e6 as a number."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if not isinstance(value, Scalar):
        return value
    if value.quoted:
        return value.text
    if is_null(value) and value.text not in _NONE_WORDS:
        return None
    number = int(value.text.replace("_", "")) if _INT.fullmatch(value.text) else _decode_float(value.text)
    return BOOL_WORDS.get(value.text.lower(), value.text) if number is None else number


def is_ambiguous(text: str) -> bool:
    """Return whether text needs quotes in a file, because it would otherwise be read as a number or null."""
    return text in _NONE_WORDS or bool(_FLOAT.fullmatch(text)) or text.lower().replace(".", "", 1) in _SPECIAL_FLOATS
