"""One reader of JSON and one of YAML: bombs are one line, and honest files pass."""

import json
import random

import pytest
import yaml

from vla_foundry.parsing import (
    MAX_DEPTH,
    MAX_LISTS,
    MAX_YAML_BYTES,
    MAX_YAML_NODES,
    compose_yaml,
    parse_json,
    parse_object,
    parse_record,
    parse_yaml,
)


@pytest.mark.parametrize("item", ["[],", "{},"])
def test_a_small_packed_record_does_not_become_gigabytes_of_empty_lists(item: str) -> None:
    # 25 MB of text would be 1 GB of objects, and a record may have 64 MB
    with pytest.raises(ValueError, match=r"x has 8,388,609 lists and objects; at most 8,388,608 are read\."):
        parse_record("[" + item * MAX_LISTS + "1]", "x")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 990, 100_000])
def test_deep_json_is_one_line(depth: int) -> None:
    for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        for parse in (parse_json, parse_record):
            with pytest.raises(ValueError, match=r"info\.json nests lists and mappings more than 100 deep"):
                parse(text, "info.json")
    assert json.dumps(parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")) == "[" * MAX_DEPTH + "]" * MAX_DEPTH


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"b": [0, ' + "1" * 5000 + "]}}", r"x: 'a\.b\[1\]' is a number of 5,000 digits; at most 40 are read"),
        ('{"a": -' + "7" * 41 + "}", "x: 'a' is a number of 42 digits"),
        ("1" * 5000, "x: its value is a number of 5,000 digits"),
        ('{"a": {"b": "\\ud83d"}}', r"x: 'a\.b' holds half of a surrogate pair"),
        ('{"a": {"\\ude00": 1}}', r"x: 'a.\\ude00' holds half of a surrogate pair"),
        (b'{"a": "\xed\xa0\x80"}', "x is not JSON .byte 7 is not UTF-8"),
        ('{"a": [1, Infinity]}', r"x: 'a\[1\]' must be a finite number, not inf"),
        ('{"a": 1e999}', "x: 'a' must be a finite number, not inf"),
        ("", "x is not JSON"),
    ],
)
def test_a_fault_in_json_names_file_and_key(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text, "x", finite=True)


def test_honest_json_passes() -> None:
    digits = (
        '{"model_max_length": 1000000000000000019884624838656, "sha256": "' + "1" * 64 + '", "e": "\\ud83d\\ude00"}'
    )
    assert parse_json(digits, "x") == json.loads(digits)
    assert parse_json(b'\xef\xbb\xbf{"a": Infinity}', "x") == {"a": float("inf")}
    # a record's caller checks the text that it uses
    assert parse_record('{"other": "\\ud800"}', "x") == {"other": "\ud800"}
    with pytest.raises(ValueError, match="x holds no JSON object"):
        parse_object("[1]", "x")


def test_a_tokenizer_of_152_000_tokens_passes() -> None:
    vocab = {f"token{number}": number for number in range(152_000)}
    content = {"model": {"vocab": vocab, "merges": [[f"a{number}", "b"] for number in range(151_000)]}}
    assert parse_json(json.dumps(content), "tokenizer.json") == content


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: " + "x" * MAX_YAML_BYTES, "16,777,219 letters; at most 16,777,216"),
        ("a:\n" + "- b\n" * MAX_YAML_NODES, "has more than 500,000 values"),
    ],
)
def test_a_large_yaml_file_is_refused_at_once(text: str, fault: str) -> None:
    """Minutes of parsing otherwise."""
    with pytest.raises(ValueError, match=f"x.yaml.*{fault}"):
        parse_yaml(text, "x.yaml")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 100_000])
@pytest.mark.parametrize("word", ["[", "- ", "{a: ", "? ", "&a [", "!x ["])
def test_deep_yaml_is_one_line(word: str, depth: int) -> None:
    for parse in (parse_yaml, compose_yaml):
        with pytest.raises(ValueError, match=r"x\.yaml:1: not valid YAML: nests lists and mappings more than 100 deep"):
            parse(word * depth, "x.yaml")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["a0: &a0 [x, x, x, x]", *(f"a{n}: &a{n} [{', '.join(4 * [f'*a{n - 1}'])}]" for n in range(1, 40))],
            "100,000",
        ),
        (["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 200))], "more than 100 deep"),
        (["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: *a{n - 1}, k{n}: 1}}" for n in range(1, 200))], "more than 100 deep"),
        (["a: &a [" + "x, " * 60_000 + "]", "b: [*a, *a]"], "expand to more than 100,000 values"),
        (["a: &a [1, *a]"], "this anchor contains itself"),
        (["a: *b"], "x.yaml:1: not valid YAML: found undefined alias"),
        (['a: !!int ""'], "a value does not fit its type"),
        (["a: " + "1" * 5000], "a value does not fit its type"),
        (["a: !!timestamp 2024-99-99"], "a value does not fit its type"),
        (["a: !!python/object:os.system x"], "could not determine a constructor"),
        (["a: \ud800"], "not valid YAML"),
    ],
)
def test_a_fault_in_yaml_names_the_file(lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml("\n".join(lines), "x.yaml")
    assert str(error.value).startswith("x.yaml")
    assert "\n" not in str(error.value)


def test_yaml_is_read_as_configs_are() -> None:
    """As in YAML 1.2, an exponent needs neither a point nor a sign, and a date is text."""
    text = "[1e-3, 1E3, -.5e1, 1.e+2, 1_0e1, e5, 1e, 1e5x, 2026-01-02, '1e5', 0x10, yes]"
    expected = [0.001, 1000.0, -5.0, 100.0, 100.0, "e5", "1e", "1e5x", "2026-01-02", "1e5", 16, True]
    assert parse_yaml(text, "x") == expected


def test_aliases_of_honest_files_pass() -> None:
    text = "a: &a [" + "x, " * 40_000 + "]\nb: [*a, *a]\n"
    assert len(parse_yaml(text, "x")["b"][1]) == 40_000


def test_broken_text_is_read_or_refused_in_one_line() -> None:
    """Cut and change honest JSON and YAML at random: it parses as the libraries say, or is one ValueError."""
    draw = random.Random(0)
    pieces = [
        "[",
        "]",
        "{",
        "}",
        '"',
        ":",
        ",",
        "&a ",
        "*a",
        "<<",
        "!!int ",
        "- ",
        "\n",
        "\\u",
        "\\ud800",
        "9" * 60,
        "e999",
        "\0",
    ]
    honest = json.dumps({"a": [1, 2.5, {"b": "é"}], "shards": [{"name": "x", "size": 12}] * 3}, indent=1)
    for _ in range(500):
        text = honest
        for _ in range(draw.randint(1, 6)):
            start = draw.randrange(len(text))
            text = text[:start] + draw.choice(pieces) * draw.choice((1, 1, 1, 200)) + text[start + draw.randint(0, 3) :]
        for parse, reference in ((parse_json, json.loads), (parse_yaml, yaml.safe_load)):
            fault, value = "", None
            try:
                value = parse(text, "x")
            except ValueError as error:
                fault = str(error)
            assert "\n" not in fault
            # to PyYAML, 2.5e999 is text
            assert fault or value == reference(text) or (parse is parse_yaml and "e999" in text)
