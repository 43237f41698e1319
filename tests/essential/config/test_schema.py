"""Annotated fields: every field that names a path is a Location, and a leading ~ is expanded in it."""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config import schema
from vla_foundry.config.command_line import parse
from vla_foundry.config.schema import BaseParams
from vla_foundry.params import TrainExperimentParams, commands
from vla_foundry.params.commands.runs import InspectParams


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
