"""From words to params: precedence whatever the order, positional words, notices, help and plug-ins."""

import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vla_foundry.config.command_line import Parsed, parse, parse_command
from vla_foundry.config.schema import BaseParams
from vla_foundry.params import HyperParams, TrainExperimentParams

Write = Callable[[str, str], str]
Parse = Callable[..., Parsed]


@dataclass(frozen=True, kw_only=True)
class CopyParams(BaseParams):
    """Copy things."""

    # what is copied
    source: str
    # where to
    targets: list[str] = field(default_factory=list)
    # replace what is there
    force: bool = False
    # ask first
    ask: bool | None = None
    # settings of the optimizer
    hparams: HyperParams = field(default_factory=HyperParams)
    # anything else
    extra: dict[str, int] = field(default_factory=dict)


def copy(*words: str, positional: tuple[str, ...] = ("source", "targets")) -> CopyParams:
    return parse_command(CopyParams, list(words), prog="copy", positional=positional)


def test_the_command_line_wins_over_what_it_includes_in_every_order(write: Write) -> None:
    preset = write("f.yaml", "type: transformer\nhidden_dim: 96\nn_heads: 2\n")
    words = (("--model", f"include {preset}"), ("--model.hidden_dim", "128"), ("--data.type", "text"))
    for order in itertools.permutations(words):
        params = parse(TrainExperimentParams, [word for pair in order for word in pair], prog="train").params
        assert (params.model.hidden_dim, params.model.n_heads) == (128, 2)


def test_command_line_over_file_over_include_over_default_leaf_by_leaf(write: Write, parse_train: Parse) -> None:
    write("base.yaml", "hparams: {lr: 1, wd: 1, beta1: 0.1, beta2: 0.1}\n")
    section = write("section.yaml", "beta1: 0.5\n")
    path = write("job.yaml", "include: base.yaml\nhparams: {lr: 2, wd: 2}\n")
    words = ["--hparams.lr", "3", "--config_path", path, "--hparams", f"include {section}"]
    hparams = parse_train(*words).params.hparams
    assert (hparams.lr, hparams.wd, hparams.beta1, hparams.beta2, hparams.eps) == (3.0, 2.0, 0.5, 0.1, 1e-8)


def test_a_mapping_on_the_command_line_changes_only_its_leaves(parse_train: Parse) -> None:
    for words in (
        ["--hparams", "{lr: 1, wd: 2}", "--hparams.lr", "3"],
        ["--hparams.lr", "3", "--hparams", "{lr: 1, wd: 2}"],
    ):
        hparams = parse_train(*words).params.hparams
        assert (hparams.lr, hparams.wd, hparams.beta1) == (3.0, 2.0, 0.9)


def test_of_two_equal_flags_the_later_one_wins(parse_train: Parse) -> None:
    assert parse_train("--hparams.lr", "1", "--hparams.lr=2").params.hparams.lr == 2.0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--wandb=False"], False),
        (["--wandb", "false"], False),
        (["--wandb"], True),
        (["--wandb", "--tensorboard"], True),
        (["--wandb", "null"], None),
        ([], None),
    ],
)
def test_wandb_is_true_false_or_unset(parse_train: Parse, words: list[str], expected: bool | None) -> None:
    assert parse_train(*words).params.wandb is expected


def test_negative_numbers_are_values_and_not_flags() -> None:
    assert copy("a", "--extra", "{x: -1}", "--extra.y", "-2").extra == {"x": -1, "y": -2}


def test_positional_words_fill_fields_in_order_and_a_last_list_takes_the_rest() -> None:
    params = copy("a", "b", "c", "--hparams.lr", "1")
    assert (params.source, params.targets) == ("a", ["b", "c"])
    assert copy("--source", "a", "b").targets == ["b"]


def test_a_switch_does_not_swallow_the_positional_word_behind_it() -> None:
    params = copy("--force", "a", "--ask", "null", "b")
    assert (params.force, params.ask, params.source, params.targets) == (True, None, "a", ["b"])
    assert copy("a", "--force", "false").force is False


def test_a_word_that_begins_with_include_is_text_where_text_is_due() -> None:
    assert copy("--source", "include all of it").source == "include all of it"


def test_what_follows_two_dashes_is_positional() -> None:
    assert copy("--", "--odd-name").source == "--odd-name"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--hparams.lr", "1", "--hparams.lrr", "2"], r"^hparams\.lrr is unknown\. Did you mean hparams\.lr\?$"),
        ([], r"^source is missing \(what is copied\)\. Give it with --source TEXT\.$"),
        (["a", "--config_path"], r"^--config_path needs a value\.$"),
        (["a", "--.x", "1"], r"^'--\.x' is no flag"),
        (["a", "-x"], r"^'-x' is no flag: flags begin with two dashes, as --x\.$"),
        (["a", "--hparams", "3"], r"^hparams must be a mapping of keys, got '3'\.$"),
        (["a", "--hparams", "{lr: 1"], r"^--hparams '\{lr: 1': command line: not valid YAML"),
        (["a", "--hparams", "{lr: 1, lr: 2}"], r"the key 'lr' stands twice"),
        (["a", "--lr", "1"], r"^lr is unknown\. Did you mean hparams\.lr\?$"),
        (["a", "--learning_rate", "1"], r"Did you mean hparams\.lr\?$"),
        (["a", "--hparams.lr", "-1"], r"^hparams\.lr \(-1\.0\) must be above 0\.$"),
    ],
)
def test_errors_name_the_key_as_the_user_types_it(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        copy(*words)
    assert "\n" not in str(caught.value)


def test_too_many_positional_words_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^'b' belongs to no flag after source\."):
        copy("a", "b", positional=("source",))


def test_two_config_files_are_an_error(write: Write) -> None:
    path = write("a.yaml", "")
    with pytest.raises(ValueError, match="is given twice"):
        copy("a", "--config_path", path, "--config_path", path)


def test_a_config_file_is_found_in_the_working_directory_and_then_among_the_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("hparams/adamw_wsd.yaml", "config_presets/hparams/adamw_wsd.yaml")
    for name in (*names, f"vla_foundry/{names[1]}"):
        assert copy("a", "--hparams", f"include {name}").hparams.decay == 0.2
    (tmp_path / "hparams").mkdir()
    (tmp_path / "hparams" / "adamw_wsd.yaml").write_text("decay: 0.7\n")
    assert copy("a", "--hparams", f"include {names[0]}").hparams.decay == 0.7


def test_origins_say_where_each_leaf_was_written(write: Write, parse_train: Parse) -> None:
    path = write("job.yaml", "hparams:\n  lr: 2\ndata: {seq_len: 8}\n")
    origins = parse_train("--config_path", path, "--hparams.wd", "1").origins
    assert str(origins["hparams.lr"]) == f"{path}:2"
    assert str(origins["data.seq_len"]) == f"{path}:3"
    assert str(origins["hparams.wd"]) == "command line"
    assert "hparams.beta1" not in origins


PLUGIN = """
from dataclasses import dataclass
from vla_foundry.params import ModelParams, register_model_params

@register_model_params("{name}")
@dataclass(frozen=True, kw_only=True)
class PluginParams(ModelParams):
    '''A model from outside.'''
    # how wide it is
    plugin_width: int = 3
"""


@pytest.mark.parametrize("way", ["flag", "flag=", "file"])
def test_a_plugin_is_imported_before_its_types_are_parsed(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"plugin_model_{way.replace('=', '_equals')}"
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(name=name))
    (tmp_path / "job.yaml").write_text(f"plugins: [{name}]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--model.type", name, "--model.plugin_width", "5", "--data.type", "text"]
    words += {"flag": ["--plugins", name], "flag=": [f"--plugins=[{name}]"], "file": ["--config_path", "job.yaml"]}[way]
    params = parse(TrainExperimentParams, words, prog="train").params
    assert (params.model.type, params.model.plugin_width, params.plugins) == (name, 5, [name])


def test_plugins_of_the_file_and_of_flags_are_all_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plugin_a", "plugin_b", "plugin_c"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "job.yaml").write_text("plugins: plugin_a\nmodel: {type: transformer}\ndata: {type: text}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--plugins", "plugin_b", "--config_path", "job.yaml", "--plugins", "[plugin_c, plugin_a]"]
    params = parse(TrainExperimentParams, words, prog="train").params
    assert params.plugins == ["plugin_a", "plugin_b", "plugin_c"]


def test_an_installed_package_can_announce_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "announced_plugin.py").write_text(PLUGIN.format(name="announced_model"))
    info = tmp_path / "announced-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: announced\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vla_foundry.plugins]\nmodel = announced_plugin\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    words = ["--model.type", "announced_model", "--data.type", "text"]
    assert parse(TrainExperimentParams, words, prog="train").params.model.type == "announced_model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the plug-in broken_plugin was not found"),
        ("import not_there_at_all\n", "needs the module not_there_at_all, which is not installed"),
        ("def (\n", "cannot be imported: invalid syntax"),
        ("from vla_foundry import nothing_like_this\n", "cannot be imported: cannot import name"),
    ],
)
def test_a_broken_plugin_is_one_line(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, os.getcwd()])
    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    if text is not None:
        (tmp_path / "broken_plugin.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(TrainExperimentParams, ["--plugins", "broken_plugin"], prog="train")


def read_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_command(TrainExperimentParams, list(words), prog="vla-foundry train")
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_flags_with_their_comments_and_sections_without_their_leaves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = read_help(capsys, "--help")
    assert text.startswith("usage: vla-foundry train [--config_path FILE]")
    assert "--total_train_samples int | null" in text
    assert "samples to train on" in text
    assert "--model.type: " in text
    assert "--hparams.*" in text
    assert "hparams.lr" not in text


@pytest.mark.parametrize(
    ("topic", "there", "not_there"),
    [
        ("hparams", "--hparams.lr float", "--data."),
        ("hparams.lr", "peak learning rate (0.0001)", "warmup"),
        ("model.type=transformer", "--model.n_kv_heads int | null", "hf_pretrained"),
        ("model.type=transformer_hf", "(required)", "n_kv_heads"),
        ("model.type", "model.type=transformer_hf", "--model.hidden_dim"),
        ("data.dataset_cache", "--data.dataset_cache.cache_size_gb float", "--data.seq_len"),
    ],
)
def test_help_on_a_topic_shows_its_leaves(
    capsys: pytest.CaptureFixture[str], topic: str, there: str, not_there: str
) -> None:
    text = read_help(capsys, "--help", topic)
    assert text == read_help(capsys, f"--help={topic}")
    assert there in text
    assert not_there not in text


def test_help_on_an_unknown_topic_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"There is no help on 'hparms'\. Did you mean --help hparams\?"):
        parse_command(TrainExperimentParams, ["--help", "hparms"], prog="train")
    with pytest.raises(ValueError, match=r"^model\.type 'transforme' is unknown\. Did you mean 'transformer'\?"):
        parse_command(TrainExperimentParams, ["--help", "model.type=transforme"], prog="train")
