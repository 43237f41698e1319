"""The command line of training: presets by name; plug-ins named by flags, config files and installed packages."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vla_foundry.config.command_line import Parsed, parse
from vla_foundry.params import TrainExperimentParams


def test_a_config_file_is_found_in_the_working_directory_and_then_among_the_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parse_train: Callable[..., Parsed]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("hparams/adamw_wsd.yaml", "config_presets/hparams/adamw_wsd.yaml")
    for name in (*names, f"vla_foundry/{names[1]}"):
        assert parse_train("--hparams", f"include {name}").params.hparams.decay == 0.2
    (tmp_path / "hparams").mkdir()
    (tmp_path / "hparams" / "adamw_wsd.yaml").write_text("decay: 0.7\n", encoding="utf-8")
    assert parse_train("--hparams", f"include {names[0]}").params.hparams.decay == 0.7


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
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(name=name), encoding="utf-8")
    (tmp_path / "job.yaml").write_text(f"plugins: [{name}]\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--model.type", name, "--model.plugin_width", "5", "--data.type", "text"]
    words += {"flag": ["--plugins", name], "flag=": [f"--plugins=[{name}]"], "file": ["--config_path", "job.yaml"]}[way]
    params = parse(TrainExperimentParams, words, prog="train").params
    assert (params.model.type, params.model.plugin_width, params.plugins) == (name, 5, [name])


def test_plugins_of_the_file_and_of_flags_are_all_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plugin_a", "plugin_b", "plugin_c"):
        (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    (tmp_path / "job.yaml").write_text(
        "plugins: plugin_a\nmodel: {type: transformer}\ndata: {type: text}\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--plugins", "plugin_b", "--config_path", "job.yaml", "--plugins", "[plugin_c, plugin_a]"]
    params = parse(TrainExperimentParams, words, prog="train").params
    assert params.plugins == ["plugin_a", "plugin_b", "plugin_c"]


def test_an_installed_package_can_announce_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "announced_plugin.py").write_text(PLUGIN.format(name="announced_model"), encoding="utf-8")
    info = tmp_path / "announced-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: announced\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[vla_foundry.plugins]\nmodel = announced_plugin\n", encoding="utf-8")
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
        (tmp_path / "broken_plugin.py").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse(TrainExperimentParams, ["--plugins", "broken_plugin"], prog="train")
