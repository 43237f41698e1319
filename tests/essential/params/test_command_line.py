"""The command line of training: presets by name; plug-ins named by flags, config files and installed packages."""

import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config import schema
from vla_foundry.config.command_line import Parsed, parse
from vla_foundry.config.loading import dump_params
from vla_foundry.config.resolve import resolve_known
from vla_foundry.config.schema import BaseParams
from vla_foundry.params import TrainExperimentParams, commands
from vla_foundry.params.commands.runs import InspectParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.transformer import TransformerParams


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


def test_a_leading_tilde_is_expanded_in_every_path_of_flags_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "job.yaml").write_text(
        "save_path: ~/runs\nmodel: {type: vlm, vit: {resume_from_checkpoint: ~/vit}, transformer: {}}\n"
        "data: {type: image_caption, tokenizer: ~/tok, dataset_manifest: [~/a/manifest.jsonl, s3://b/~/c]}\n",
        encoding="utf-8",
    )
    words = ["--data.val_dataset_manifest=~/v,./~/w", "--model.transformer", "{resume_from_checkpoint: ~/llm}"]
    words += ["--data.prompts", "[~/is not a path]", "--data.dataset_cache.cache_dir", "~"]
    params: Any = parse(
        TrainExperimentParams, ["--config_path", str(tmp_path / "job.yaml"), *words], prog="train"
    ).params
    assert params.save_path == "/home/me/runs"
    assert params.model.vit.resume_from_checkpoint == "/home/me/vit"
    assert params.model.transformer.resume_from_checkpoint == "/home/me/llm"
    assert params.data.tokenizer == "/home/me/tok"
    assert params.data.dataset_manifest == ["/home/me/a/manifest.jsonl", "s3://b/~/c"]
    assert params.data.val_dataset_manifest == ["/home/me/v", "./~/w"]
    assert params.data.prompts == ["~/is not a path"]
    inspect = parse(InspectParams, ["~/shards"], prog="inspect", positional=("dataset",)).params
    assert inspect.dataset == "/home/me/shards"


def test_a_tilde_of_an_unknown_user_is_an_error_and_makes_no_folder() -> None:
    with pytest.raises(ValueError, match=r"^save_path: '~nobody_here/x' begins with a user without a home folder"):
        parse(
            TrainExperimentParams,
            ["--save_path=~nobody_here/x", "--data.type", "text", "--model.type", "transformer"],
            prog="train",
        )


def test_every_field_that_names_a_path_is_a_location() -> None:
    # a name or comment with one of these words, but of something that is not a path on this machine
    others = {
        "name", "plugins", "resume", "dist_url", "img2dataset", "data_discard_keys", "camera_names", "caption_key",
        "url_key", "text_key", "source", "episodes", "device", "prompt_layout", "extra_keys", "image_resizing_method",
        "extrinsics_fields", "intrinsics_fields", "layout", "policy", "tasks",
    }  # fmt: skip
    seen = set()
    for cls in all_params_classes():
        for name, hint in schema.field_types(cls).items():
            words = f"{name} {schema.field_comments(cls).get(name, '')}"
            is_text = {str, list[str]} & set(schema.options(hint))
            if is_text and re.search(
                r"folder|\bfiles?\b|path|manifest|checkpoint|s3://|pretrained|^tokenizer\b", words
            ):
                is_location = name in schema.annotated_types(cls)
                assert is_location or name in others, f"{cls.__name__}.{name}"
                seen.add(name) if is_location else None
    assert {"output", "save_path", "dataset_manifest", "checkpoint", "hf_pretrained", "source_episodes"} <= seen


def all_params_classes() -> list[type]:
    for module in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}."):
        importlib.import_module(module.name)
    found, pending = [], [BaseParams]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if cls.__module__.startswith("vla_foundry."):
            found.append(cls)
    return found


@pytest.mark.parametrize("way", ["null on the command line", "null in the file", "left out"])
def test_a_dataset_is_added_to_a_saved_config_by_its_manifest_alone(way: str, tmp_path: Path) -> None:
    data: Any = TextDataParams(
        dataset_manifest=["a"], dataset_modality=["text"], dataset_weighting=[1.0], val_dataset_modality=[]
    )
    saved = dump_params(TrainExperimentParams(data=data, model=TransformerParams(), total_train_samples=1024))
    names = ("dataset_modality", "dataset_weighting")
    words = ["--data.dataset_manifest", "[a,b]", "--hparams.warmup", "0.1"]
    if way == "null on the command line":
        words += [word for name in names for word in (f"--data.{name}", "null")]
    for name in names:
        old = re.search(rf"^  {name}:(\n  - .*)+\n", saved, re.MULTILINE)
        assert old is not None
        saved = saved.replace(old[0], f"  {name}: null\n" if "file" in way else "" if way == "left out" else old[0])
    (tmp_path / "config.yaml").write_text(saved, encoding="utf-8")
    params = parse(TrainExperimentParams, ["--config_path", str(tmp_path / "config.yaml"), *words], prog="train").params
    assert (params.data.dataset_modality, params.data.dataset_weighting) == ([], [])
    resolved = resolve_known(params, Facts()).params
    assert resolved.data.dataset_modality == ["text", "text"]
    assert resolved.data.dataset_weighting == [1.0, 1.0]


def test_a_dataset_without_its_modality_says_how_to_add_it() -> None:
    words = ["--data.type", "text", "--model.type", "transformer", "--data.dataset_modality", "[text]"]
    with pytest.raises(ValueError, match=r"Give one for each manifest, or leave dataset_modality out \(null\)\."):
        parse(TrainExperimentParams, [*words, "--data.dataset_manifest", "[a,b]"], prog="train")


@pytest.mark.parametrize("mark", ["config_model.yaml", "checkpoints", "manifest.jsonl"])
@pytest.mark.parametrize("way", ["config_path", "included", "section"])
def test_plugins_of_a_config_that_came_with_data_are_imported_only_if_the_user_names_them(
    way: str, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"data_plugin_{way}_{mark.partition('.')[0]}"
    (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    (tmp_path / mark).touch()
    section = f"plugins: [{name}]\ntype: transformer\n"
    (tmp_path / "config.yaml").write_text(f"plugins: [{name}]\nmodel: {{type: transformer}}\n", encoding="utf-8")
    (tmp_path / "model.yaml").write_text(section, encoding="utf-8")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.yaml").write_text("include: ../config.yaml\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    words = {
        "config_path": ["--config_path", "config.yaml"],
        "included": ["--config_path", "job/job.yaml"],
        "section": ["--model", "include model.yaml"],
    }[way]
    with pytest.raises(ValueError, match=rf":1: the plug-in {name} is code, and is imported only if you name it too"):
        parse(TrainExperimentParams, [*words, "--data.type", "text"], prog="train")
    (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    params = parse(TrainExperimentParams, [*words, "--data.type", "text", "--plugins", name], prog="train").params
    assert params.plugins == [name]
    assert params.model.type == "transformer"
