"""Configs on disk: strict round trips, sections of whole configs, remote files."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from vla_foundry.config.loading import dump_params, load_params, read_params
from vla_foundry.config.schema import BaseParams, Migration, register_migrations
from vla_foundry.storage.uri import write_text

Write = Callable[[str, str], str]


@dataclass(frozen=True, kw_only=True)
class HyperParams(BaseParams):
    """A section."""

    lr: float = 1e-4
    wd: float = 0.01


@dataclass(frozen=True, kw_only=True)
class JobParams(BaseParams):
    """A root."""

    name: str = "job"
    hparams: HyperParams = field(default_factory=HyperParams)


register_migrations(
    {
        "JobParams": Migration(
            renamed={"title": "name"}, ignored={"speed": "it never had an effect"}, values={"name": {"null": None}}
        )
    }
)


def test_a_renamed_key_is_read_with_a_notice_and_one_without_effect_is_named(write: Write) -> None:
    parsed = read_params(JobParams, write("job.yaml", "title: a\nspeed: 3\n"))
    assert parsed.params == JobParams(name="a")
    assert parsed.notices == ["title is called name now; without effect: speed (it never had an effect)."]
    assert load_params(JobParams, write("job.yaml", "name: null\n")) == JobParams()
    with pytest.raises(ValueError, match=r"job\.yaml:1: title is the old name of name, and both are given"):
        load_params(JobParams, write("job.yaml", "title: a\nname: b\n"))


def test_a_section_is_found_in_a_whole_config_and_alone(write: Write) -> None:
    whole = write("job.yaml", "name: a\nhparams: {lr: 2}\n")
    assert load_params(HyperParams, whole, JobParams) == HyperParams(lr=2.0)
    assert load_params(JobParams, whole, JobParams).hparams == HyperParams(lr=2.0)
    assert load_params(HyperParams, write("hparams.yaml", "lr: 2\n"), JobParams) == HyperParams(lr=2.0)
    with pytest.raises(ValueError, match="name is unknown"):
        load_params(HyperParams, whole)


def test_a_remote_config_loads_with_what_it_includes(s3_bucket: str) -> None:
    write_text(f"{s3_bucket}/hparams/base.yaml", "lr: 2\nwd: 2\n")
    write_text(f"{s3_bucket}/jobs/llm/hparams.yaml", "<<: !include ../../hparams/base.yaml\nwd: 3\n")
    params = load_params(HyperParams, f"{s3_bucket}/jobs/llm/hparams.yaml")
    assert (params.lr, params.wd) == (2.0, 3.0)
    with pytest.raises(FileNotFoundError, match=f"{s3_bucket}/nowhere.yaml"):
        load_params(HyperParams, f"{s3_bucket}/nowhere.yaml")


@dataclass(frozen=True, kw_only=True)
class MixedParams(BaseParams):
    """Fields of every kind."""

    text: str | None = None
    anything: dict[str, Any] = field(default_factory=dict)
    numbers: tuple[float, ...] = ()
    inner: HyperParams = field(default_factory=HyperParams)


def test_random_values_survive_being_saved_and_loaded(write: Write) -> None:
    draw = random.Random(0)

    def value(depth: int) -> Any:
        kinds = ["text", "int", "float", "bool", "null"] + ["list", "dict"] * (depth > 0)
        match draw.choice(kinds):
            case "text":
                return "".join(draw.choices("01e-+._nulNoe~:[]{}'\"# \n\t!&*%@`,?|>ytsf", k=draw.randrange(6)))
            case "int":
                return draw.randrange(-(10**15), 10**15)
            case "float":
                return draw.uniform(-1, 1) * 10.0 ** draw.randrange(-12, 12)
            case "bool":
                return draw.random() < 0.5
            case "list":
                return [value(depth - 1) for _ in range(draw.randrange(3))]
            case "dict":
                return {f"k{index}": value(depth - 1) for index in range(draw.randrange(3))}
        return None

    for _ in range(100):
        anything = {f"key{index}": value(2) for index in range(3)}
        text = next((item for item in anything.values() if isinstance(item, str)), None)
        params = MixedParams(text=text, anything=anything, numbers=(draw.random(), 3.0))
        assert load_params(MixedParams, write("mixed.yaml", dump_params(params))) == params


def test_params_are_frozen_and_replaced_instead(write: Write) -> None:
    params = HyperParams()
    with pytest.raises(AttributeError):
        params.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(params, lr=1.0).lr == 1.0
