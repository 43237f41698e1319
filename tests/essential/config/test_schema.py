"""Annotated fields: paths are Locations, in which a leading ~ is expanded, and every number has a range."""

import importlib
import math
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from vla_foundry.config import schema
from vla_foundry.config.command_line import decode_tree, parse
from vla_foundry.config.help import format_help
from vla_foundry.config.schema import BaseParams, Bounds
from vla_foundry.config.tree import DEFAULT, Scalar, to_node
from vla_foundry.params import DataParams, ModelParams, TrainExperimentParams, commands
from vla_foundry.params.commands.launching import SageMakerParams
from vla_foundry.params.commands.preprocessing_robotics import FieldParams
from vla_foundry.params.commands.runs import InspectParams
from vla_foundry.params.commands.serving import ClientPartParams
from vla_foundry.params.commands.simulators import ActionPartParams, StateFieldParams, SuccessParams


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
        "extrinsics_fields", "intrinsics_fields", "layout", "policy", "policy_server", "tasks", "until_decided",
        "cluster", "pattern",
    }  # fmt: skip
    seen = set()
    for cls in all_params_classes():
        for name, hint in schema.field_types(cls).items():
            words = f"{name} {schema.field_comments(cls).get(name, '')}"
            is_text = {str, list[str]} & set(schema.options(hint))
            if is_text and re.search(
                r"folder|\bfiles?\b|path|manifest|checkpoint|s3://|pretrained|^tokenizer\b", words
            ):
                is_location = schema.EXPANDED in str(schema.annotated_types(cls)[name])
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


def numbers(hint: Any, bounds: Bounds | None = None) -> Iterator[tuple[type, Bounds | None]]:
    """Yield each number in a type of a field, and its range."""
    if get_origin(hint) is Annotated:
        hint, *annotations = get_args(hint)
        bounds = next((item for item in annotations if isinstance(item, Bounds)), bounds)
    if hint in (int, float):
        yield hint, bounds
    elif get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from numbers(part, bounds)


def values_beyond(kind: type, bounds: Bounds) -> list[Any]:
    lowest = bounds.above if bounds.least is None else bounds.least
    highest = bounds.below if bounds.most is None else bounds.most
    if kind is int:
        low = -(2**63) if lowest is None else lowest - (bounds.least is not None)
        high = 2**63 if highest is None else highest + (bounds.most is not None)
        return [low, high, 10**30, -(10**30), math.nan, math.inf, -math.inf]
    low = -math.inf if lowest is None else lowest if bounds.least is None else math.nextafter(lowest, -math.inf)
    high = math.inf if highest is None else highest if bounds.most is None else math.nextafter(highest, math.inf)
    return [low, high, math.nan, math.inf, -math.inf]


def put(hint: Any, value: Any) -> Any:
    """Return a field's value whose numbers are `value`."""
    for option in schema.options(get_args(hint)[0] if get_origin(hint) is Annotated else hint):
        origin, arguments = get_origin(option), [item for item in get_args(option) if item is not Ellipsis]
        if origin is dict:
            return {"x": value}
        if origin in (list, tuple):
            return [value] * len(arguments)
    return value


def test_every_number_has_a_range_and_what_lies_beyond_is_an_error_of_one_line() -> None:
    needed = {str: "x", int: 1, float: 1.0, list[str]: ["x"], list[int]: [1], dict[str, FieldParams]: {"x": {}}}
    needed |= {list[ClientPartParams]: [], tuple[schema.Steps, schema.Steps]: [0, 1], tuple[int, int]: [0, 1]}
    needed |= {dict[str, StateFieldParams]: {"x": {}}, dict[str, ActionPartParams]: {"x": {}}}
    needed |= {
        SuccessParams: {"terminated": True},
        SageMakerParams: {"user": "x"},
        DataParams: {"type": Scalar("text")},
        ModelParams: {"type": Scalar("transformer")},
    }
    seen = 0
    for cls in all_params_classes():
        hints = schema.field_types(cls)
        required = {
            name: needed[hints[name]]
            for name, item in schema.fields_by_name(cls).items()
            if schema.is_required(item) and hints[name] in needed
        }
        # the types of a role have its fields
        for name, hint in {} if schema.is_role(cls) else schema.annotated_types(cls).items():
            for kind, bounds in numbers(hint):
                where = f"{cls.__name__}.{name}"
                assert bounds is not None, f"{where} is a number without a range"
                for value in values_beyond(kind, bounds):
                    tree = to_node(required | {name: put(hint, value)}, DEFAULT)
                    with pytest.raises(ValueError, match=rf"^at\.{name}\b.* must be ") as caught:
                        decode_tree(cls, tree, "at")
                    assert "\n" not in str(caught.value), where
                seen += 1
    assert seen > 150


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name: "a\\nb"', r"config\.yaml:1: name holds '\\n', a control character"),
        ('save_path: "runs\\0"', r"config\.yaml:1: save_path holds '\\x00', a control character"),
        ("save_path: runs/" + 128 * "é", r"save_path holds a name of more than 255 bytes"),
        ('wandb_tags: ["a", "b\\x1b[2J"]', r"wandb_tags\[1\] holds '\\x1b'"),
        ('data: {prompts: ["a\\0"], type: image_caption}', r"data\.prompts\[0\] holds '\\x00'"),
        (
            "data: {processor_kwargs: {size: {a: [.nan]}}, type: image_caption}",
            r"size\.a\[0\] \(nan\) must be fin",
        ),
        ("distributed: {dist_url: 'tcp://h:65536'}", r"distributed\.dist_url 'tcp://h:65536' must be env://"),
        ("distributed: {dist_url: abc}", r"distributed\.dist_url 'abc' must be env://, tcp://HOST:PORT or file:///"),
        ("distributed: {fsdp_cpu_offload: true}", r"distributed\.fsdp_cpu_offload is true, but only FSDP offloads"),
        ("distributed: {replicate_size: 2}", r"distributed\.replicate_size is for FSDP"),
        ("hparams: {force_min_lr: 1}", r"hparams\.force_min_lr \(1\.0\) must not be above lr \(0\.0001\)"),
        (
            "hparams: {warmup: 0.75, decay: 0.3, lr_scheduler: warmup_constant_decay}",
            r"hparams\.decay \(0\.3\) and warmup \(0\.75\) are fractions of the run, and must be at most 1",
        ),
        ("hparams: {seed: " + "9" * 5000 + "}", r"hparams\.seed must be a whole number below 10\^18, got '9+\.\.\.'"),
    ],
)
def test_what_makes_no_sense_in_a_config_is_an_error_that_names_the_key(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    words = ["--config_path", str(tmp_path / "config.yaml"), "--model.type", "vlm"]
    with pytest.raises(ValueError, match=message) as caught:
        parse(TrainExperimentParams, [*words, *([] if "data" in text else ["--data.type", "text"])], prog="train")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_prompts_have_lines_and_sums_of_fractions_are_rounded() -> None:
    words = ["--model.type", "vlm", "--data.type", "image_caption", "--data.prompts", '["a\nb"]']
    decay = ["--hparams.lr_scheduler", "warmup_constant_decay", "--hparams.warmup", "0.7", "--hparams.decay", "0.3"]
    params = parse(TrainExperimentParams, [*words, *decay, "--hparams.seed", "-3"], prog="train").params
    assert params.hparams.seed == -3


def test_help_shows_ranges() -> None:
    text = format_help(TrainExperimentParams, "train", "hparams")
    assert "AdamW beta 1 (0.9; at least 0 and below 1)" in text
    assert "weights, data order and noise (42)" in text
