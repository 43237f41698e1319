"""Seeded fuzz: absurd settings cost one line that names them, and nothing else. Each case can be run alone."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.essential.byte_level import train_tokenizer
from tests.essential.robot_data import ACTIONS, PROPRIOCEPTION
from tests.essential.robot_data import create_recording as create_recording
from tests.essential.robot_data import write_robot_data as write_robot_data
from vla_foundry.config.command_line import EXPECTED_ERRORS, describe_error, parse
from vla_foundry.config.loading import to_plain
from vla_foundry.config.yaml_source import preset_root
from vla_foundry.main import main as train
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.params.commands.preprocessing import PreprocessTextParams
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.params.experiment import TrainExperimentParams

_DIGITS = "7" * 5000
# what no honest config holds, as a word of the command line or a value of a YAML file
_ABSURD = [
    *(
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "-0.0",
        "1e400",
        "1e-400",
        "1e18",
        "2.5",
        _DIGITS,
        f"-{_DIGITS}",
        f"1e{_DIGITS}",
    ),
    *(
        "",
        " ",
        "null",
        "true",
        "text",
        "0x10",
        "1_0_",
        "a\nb",
        "a\0b",
        "\ud800",
        "\u2028",
        "../../..",
        "~",
        "/dev/null",
    ),
    *(
        "[]",
        "{}",
        "[1, 2]",
        "[nan]",
        "[[[[]]]]",
        "{a: 1}",
        "{a: {b: [c]}}",
        "[" * 60 + "]" * 60,
        "[" * 5000,
        "{a: " * 500,
    ),
    *(
        "&a [*a]",
        "*a",
        "!!python/object:os.system x",
        "!!int ''",
        "!include x.yaml",
        "include x.yaml",
        "include .",
        "${x}",
    ),
    *("'", '"', "- a", "a: b: c", "? ", "<<: 1", "2024-99-99", "yes", "x" * 100_000, "é" * 300, "s3://", "%s%n"),
]
_PRESETS = preset_root() / "models"
_TRAIN = {
    "total_train_samples": 64,
    "resolve_configs": True,
    "hparams": {"warmup": 0.0, "global_batch_size": 64, "per_gpu_batch_size": 64},
    "distributed": {},
    "ema": {},
}
_IMAGES = {"dataset_manifest": ["manifest.jsonl"], "image_size": 224, "seq_len": 512, "tokenizer": "tokenizer"}
_FIELDS = {"action_fields": ACTIONS, "proprioception_fields": PROPRIOCEPTION, "allow_multiple_epochs": True}
# job -> class of its params, and a config that resolves
_JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (
        TrainExperimentParams,
        {
            **_TRAIN,
            "model": {"include": f"{_PRESETS}/transformer_tiny.yaml"},
            "data": {"type": "text", "dataset_manifest": ["manifest.jsonl"], "seq_len": 64},
        },
    ),
    "image_caption": (
        TrainExperimentParams,
        {
            **_TRAIN,
            "model": {"include": f"{_PRESETS}/vlm_11m.yaml"},
            "data": {"type": "image_caption", **_IMAGES},
        },
    ),
    "robotics": (
        TrainExperimentParams,
        {
            **_TRAIN,
            "model": {"include": f"{_PRESETS}/vla_11m.yaml"},
            "data": {
                "type": "robotics",
                **_IMAGES,
                **_FIELDS,
                "dataset_manifest": ["robot/manifest.jsonl"],
                "seq_len": 2000,
            },
        },
    ),
    "serve": (ServeParams, {"checkpoint": "run"}),
    "evaluate": (EvaluateParams, {"output": "results", "policy": "null"}),
    "preprocess": (PreprocessTextParams, {"source": ["a.txt"], "output": "shards", "tokenizer": "tokenizer"}),
}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    create_recording: Callable[..., Any],
    write_robot_data: Callable[..., Path],
) -> Path:
    """A working directory with data for the jobs."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "manifest.jsonl").write_text('{"shard": "a", "num_sequences": 1000}\n', encoding="utf-8")
    write_robot_data(folder / "robot", [create_recording(0)])
    train_tokenizer(257, ["a"], ["<|endoftext|>"], eos_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
    (folder / "job.yaml").touch()
    return folder


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, list[str]]:
    """The keys of each job."""
    found = {}
    for name, (cls, config) in _JOBS.items():
        (folder / "job.yaml").write_text(json.dumps(config), encoding="utf-8")
        params = parse(cls, ["--config_path", str(folder / "job.yaml")], prog="").params
        found[name] = [key for key in _keys(to_plain(params)) if not key.startswith("resolve_configs")]
    return found


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else []:
        yield f"{prefix}{key}"
        yield from _keys(item, f"{prefix}{key}.")


def _misspell(key: str, draw: random.Random) -> str:
    place = draw.randrange(len(key))
    return key[:place] + draw.choice(["", "_", "x", ".", "\n"]) + key[place + 1 :]


@pytest.mark.parametrize("name", _JOBS)
def test_a_sound_job_passes(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, config = _JOBS[name]
    (folder / "job.yaml").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(folder)
    words = ["--config_path", "job.yaml"]
    assert train(words) is None if cls is TrainExperimentParams else parse(cls, words, prog="")


@pytest.mark.parametrize("number", range(300))
def test_an_absurd_setting_costs_one_line(
    folder: Path, keys: dict[str, list[str]], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(f"setting {number}")
    name, value = draw.choice(["text", "text", *_JOBS]), draw.choice(_ABSURD)
    cls, config = copy.deepcopy(_JOBS[name])
    right = draw.choice(keys[name])
    key = right if draw.random() < 0.9 else _misspell(right, draw)
    is_flag = draw.random() < 0.5
    if not is_flag:
        *outer, last = key.split(".")
        section = config
        for part in outer:
            section = section.setdefault(part, {})
        section[last] = "@"
    text = json.dumps(config).replace('"@"', value)
    (folder / "job.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    words = ["--config_path", "job.yaml", *([f"--{key}={value}"] if is_flag else [])]
    try:
        train(words) if cls is TrainExperimentParams else parse(cls, words, prog="")
    except EXPECTED_ERRORS as error:
        line = describe_error(error)
        names_it = any(part in line for part in (key.split(".")[-1], right.split(".")[-1], "not valid YAML"))
        names_file = not is_flag and line.startswith("job.yaml")
        assert names_it or names_file or (key != right and " is unknown" in line), f"{key}: {line}"
        assert len(line) < 2100, key
        assert "Scalar(" not in line
    assert sorted(folder.rglob("*")) == before
