"""YAML with includes that merge at every depth, and with the line of every value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config import yaml_source
from vla_foundry.config.tree import Leaf, Scalar, to_value
from vla_foundry.config.yaml_source import load_config, parse_inline

Write = Callable[[str, str], str]


def read(path: str) -> Any:
    """A config file as dicts, lists and words."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.text if isinstance(value, Scalar) else value

    return plain(to_value(load_config(path)))


@pytest.mark.parametrize(
    "form", ["<<: !include base.yaml", "include: base.yaml", "include: [base.yaml]", "<<: [!include base.yaml]"]
)
def test_an_include_changes_only_the_leaves_that_are_not_said_here(write: Write, form: str) -> None:
    write("base.yaml", "transformer: {hidden_dim: 64, is_causal: false, deep: {a: 1, b: 2}}\nkept: yes\n")
    path = write("main.yaml", f"transformer: {{is_causal: true, deep: {{b: 3}}}}\n{form}\n")
    assert read(path) == {
        "transformer": {"hidden_dim": "64", "is_causal": "true", "deep": {"a": "1", "b": "3"}},
        "kept": "yes",
    }


def test_an_include_as_a_value_is_relative_to_the_including_file(write: Write) -> None:
    write("models/tiny.yaml", "<<: !include ../shared/sizes.yaml\nn_heads: 2\n")
    write("shared/sizes.yaml", "hidden_dim: 64\n")
    path = write("jobs/job.yaml", "model: !include ../models/tiny.yaml\n")
    assert read(path) == {"model": {"hidden_dim": "64", "n_heads": "2"}}


def test_later_includes_win_over_earlier_ones_and_all_may_stand_several_times(write: Write) -> None:
    write("a.yaml", "x: 1\ny: 1\nz: {p: 1}\n")
    write("b.yaml", "y: 2\nz: {q: 2}\n")
    assert read(write("merge.yaml", "<<: !include a.yaml\n<<: !include b.yaml\n")) == {
        "x": "1",
        "y": "2",
        "z": {"p": "1", "q": "2"},
    }
    assert read(write("list.yaml", "include: [a.yaml, b.yaml]\n"))["y"] == "2"
    # within one `<<` list YAML's own rule holds: the first wins
    assert read(write("yaml_list.yaml", "<<: [!include a.yaml, !include b.yaml]\n"))["y"] == "1"


def test_anchors_and_their_merges_work(write: Write) -> None:
    path = write("anchors.yaml", "a: &shared {x: 1, y: 2}\nb:\n  <<: *shared\n  y: 3\nc: *shared\n")
    assert read(path) == {"a": {"x": "1", "y": "2"}, "b": {"x": "1", "y": "3"}, "c": {"x": "1", "y": "2"}}


def test_every_leaf_knows_its_file_and_line(write: Write) -> None:
    base = write("base.yaml", "# a comment\nlr: 1\nwd: 2\n")
    path = write("main.yaml", "hparams:\n  <<: !include base.yaml\n  wd: 3\n")
    hparams = load_config(path).children["hparams"].children
    assert str(hparams["lr"].origin) == f"{base}:2"
    assert str(hparams["wd"].origin) == f"{path}:3"


def test_a_leading_preset_folder_names_the_presets(write: Write) -> None:
    path = write("main.yaml", "model: !include config_presets/models/transformer_tiny.yaml\n")
    assert read(path)["model"]["hidden_dim"] == "64"
    path = write("main.yaml", "model: !include vla_foundry/config_presets/models/transformer_tiny.yaml\n")
    assert read(path)["model"]["hidden_dim"] == "64"


def test_an_include_of_itself_is_an_error_that_shows_the_circle(write: Write, tmp_path: Path) -> None:
    write("b.yaml", "include: sub/../a.yaml\n")
    path = write("a.yaml", "x: !include b.yaml\n")
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"includes itself: \S*a\.yaml -> \S*b\.yaml -> \S*a\.yaml"):
        load_config(path)


def test_a_missing_include_names_the_line_that_asks_for_it(write: Write) -> None:
    path = write("main.yaml", "a: 1\nmodel: !include nowhere.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"main\.yaml:2: Config file 'nowhere\.yaml' was not found"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", r"main\.yaml:2: not valid YAML"),
        ("a: 1\n\tb: 2\n", r"main\.yaml:2: not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", r"main\.yaml:3: the key 'a' is given twice"),
        ("a: !!python/object/apply:os.getcwd []\n", r"main\.yaml:1: the tag .*python.* is unknown"),
        ("a: &x [*x]\n", r"main\.yaml:1: "),
        ("<<: 3\n", r"main\.yaml:1: '<<' needs a mapping"),
        ("[a, b]: 1\n", r"main\.yaml:1: a key must be a word"),
    ],
)
def test_a_broken_file_is_one_line_with_its_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write("main.yaml", text))
    assert "\n" not in str(caught.value)


def test_quotes_keep_null_and_numbers_text_and_an_empty_file_is_an_empty_mapping(write: Write) -> None:
    tree = load_config(write("main.yaml", "a: 'null'\nb: null\nc:\nd: ~\ne: !!str null\n"))
    assert [tree.children[key].value for key in "abcde"] == [
        Scalar("null", quoted=True),
        None,
        None,
        None,
        Scalar("null", quoted=True),
    ]
    assert to_value(load_config(write("empty.yaml", "# nothing\n"))) == {}


def test_yaml_on_the_command_line_has_no_line() -> None:
    leaf = parse_inline("[a, 'b']")
    assert isinstance(leaf, Leaf)
    assert leaf.origin.prefix == ""


@pytest.mark.parametrize("form", ["<<: !include {}", "include: {}", "key: !include {}"])
def test_a_long_chain_of_includes_is_one_line(write: Write, form: str) -> None:
    for number in range(1500):
        write(f"c{number}.yaml", form.format(f"c{number + 1}.yaml") + "\n")
    with pytest.raises(ValueError, match=r"c\d+\.yaml:1: nests too deeply: .* over 25 includes"):
        load_config(write("start.yaml", "include: c0.yaml\n"))


def test_files_that_include_each_other_again_and_again_are_one_line(write: Write) -> None:
    for number in range(20):
        write(f"b{number}.yaml", f"include: [b{number + 1}.yaml, b{number + 1}.yaml]\n")
    write("b20.yaml", "a: 1\n")
    with pytest.raises(ValueError, match=r"b0\.yaml includes more than 1,000 files"):
        load_config(write("b0.yaml", "include: [b1.yaml, b1.yaml]\n"))


def test_aliases_in_many_included_files_are_one_line(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_source, "_MAX_VALUES", 500)
    write("many.yaml", "a: &a [" + "x, " * 20 + "]\nb: [*a, *a, *a]\n")
    assert load_config(write("one.yaml", "include: many.yaml\n"))
    with pytest.raises(ValueError, match=r"many\.yaml:\d: the config has more than 500 values"):
        load_config(write("start.yaml", f"include: [{', '.join(['many.yaml'] * 20)}]\n"))
