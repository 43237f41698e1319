"""Seeded fuzz: absurd settings, damaged shards and bombs cost one line that names them; each case can be run alone."""

import copy
import gzip
import io
import json
import random
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.essential.byte_level import train_tokenizer
from tests.essential.data.conftest import write_records as write_records
from tests.essential.data.conftest import write_samples as write_samples
from tests.essential.robot_data import ACTIONS, PROPRIOCEPTION
from tests.essential.robot_data import create_recording as create_recording
from tests.essential.robot_data import write_robot_data as write_robot_data
from vla_foundry.config.command_line import EXPECTED_ERRORS, describe_error, parse
from vla_foundry.config.loading import to_plain
from vla_foundry.config.yaml_source import preset_root
from vla_foundry.data import create_dataloader
from vla_foundry.main import main as train
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.params.commands.preprocessing import PreprocessTextParams
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.experiment import (
    TrainExperimentParams,
    load_experiment_params_from_yaml,
    load_params_from_yaml,
)
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.preprocessing.robotics.converters.lerobot_metadata import read_info
from vla_foundry.robotics.spec import parse_spec
from vla_foundry.robotics.statistics_format import parse_statistics
from vla_foundry.shards import format_index, index_shard, parse_episode_header, parse_index, parse_manifest
from vla_foundry.storage.uri import read_text
from vla_foundry.text.tokenizers import load_tokenizer, read_vocabulary

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


def _npz(arrays: dict[str, np.ndarray], *, packed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def _npz_of(header: str, values: bytes, *, is_packed: bool) -> bytes:
    """An .npz whose arrays are named like those of a robot, with a header that may lie about the values."""
    buffer = io.BytesIO()
    start = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if is_packed else zipfile.ZIP_STORED) as file:
        for name in [*ACTIONS, *PROPRIOCEPTION, "past_mask", "future_mask", "timestamp"]:
            file.writestr(f"{name}.npy", start + values)
    return buffer.getvalue()


def _png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = chunk(b"IHDR", size + b"\x08\x02\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def _with_nan(content: bytes, draw: random.Random) -> bytes:
    arrays = dict(np.load(io.BytesIO(content)))
    name = draw.choice([name for name, array in arrays.items() if array.dtype.kind == "f"])
    arrays[name] = np.full_like(
        arrays[name], draw.choice([np.nan, np.inf, 1e300 if arrays[name].itemsize == 8 else 1e38])
    )
    return _npz(arrays)


def _with_other_shape(content: bytes, draw: random.Random) -> bytes:
    arrays = dict(np.load(io.BytesIO(content)))
    name = draw.choice(list(arrays))
    changed = [
        arrays[name][:-1],
        arrays[name][..., :1],
        arrays[name].astype("O"),
        arrays[name].astype(str),
        np.zeros(()),
    ]
    arrays[name] = draw.choice([*changed, arrays[name].astype(complex), np.zeros((0, 3))])
    return _npz(arrays, packed=draw.random() < 0.5)


_BOMB = gzip.compress(bytes(32 << 20), 1) * 64
_JSONS = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": ' + _DIGITS.encode() + b"}",
    b"[" + _DIGITS.encode() + b"]",
    b"null",
    b"{}",
    b"[1e400, -1, 2.5]",
    b'"\\ud800"',
    b"\xff\xfe\xfd",
    b"",
]
# end of a member's name -> what it may be replaced with
_REPLACEMENTS: dict[str, list[Any]] = {
    "records.json": [*_JSONS, b'{"dtype": "uint16", "record_length": 99999999999999, "num_sequences": 4}'],
    "json.gz": [*(gzip.compress(text) for text in _JSONS), _BOMB, b"", b"\x1f\x8b"],
    "json": [
        *_JSONS,
        b'{"caption": [[[]]]}',
        b'{"caption": "\\ud800 a"}',
        b'{"num_frames": 99999999999, "version": 1}',
    ],
    "txt": [b"", b"\0" * 1000, b"\xff\xfe", b"word " * 100_000],
    "npz": [
        _with_nan,
        _with_nan,
        _with_other_shape,
        _with_other_shape,
        _npz_of("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 3)}", bytes(99), is_packed=False),
        _npz_of("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 3)}", bytes(99), is_packed=True),
        _npz_of("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}", bytes(64 << 20), is_packed=True),
        _npz_of("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3)}", bytes(99), is_packed=True),
        _npz_of("(" * 200, b"", is_packed=True),
        b"PK\5\6" + b"\xff" * 18,
    ],
    "png": [_png_of(60_000, 60_000), _png_of(8, 8), b"\x89PNG\r\n\x1a\n", b"", b"II*\0" + bytes(40), b"<svg/>"],
    "tokens.u16": [lambda content, draw: b"\xff" * len(content), b"", lambda content, draw: content * 3],
    "u32": [lambda content, draw: draw.randbytes(len(content)), b"\0\0", lambda content, draw: bytes(len(content))],
    "u64": [lambda content, draw: draw.randbytes(len(content)), b"\0\0", lambda content, draw: bytes(len(content))],
}
# a JPEG's size lies in its frame header
_REPLACEMENTS["jpg"] = [
    *_REPLACEMENTS["png"],
    lambda content, draw: content[: (at := content.index(b"\xff\xc0") + 5)] + b"\xea\x60\xea\x60" + content[at + 4 :],
]
Members = list[tuple[str, bytes]]


def _tar_of(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _damage_members(members: Members, draw: random.Random) -> Members:
    members = list(members)
    place = draw.randrange(len(members))
    name, content = members[place]
    kind = draw.choice(["replace"] * 6 + ["swap", "drop", "repeat", "cut", "rename"])
    if kind == "replace":
        ends = next(ends for ends in _REPLACEMENTS if name.endswith(ends))
        found = draw.choice(_REPLACEMENTS[ends])
        members[place] = (name, found if isinstance(found, bytes) else found(content, draw))
    elif kind == "swap":
        other = draw.randrange(len(members))
        members[place], members[other] = (name, members[other][1]), (members[other][0], content)
    elif kind == "drop":
        del members[place]
    elif kind == "repeat":
        members.insert(draw.randrange(len(members)), members[place])
    elif kind == "cut":
        members[place] = (name, content[: draw.randrange(len(content))])
    else:
        members[place] = (draw.choice([f"../{name}", f"x{name}", name.upper(), name.replace(".", "", 1)]), content)
    return members


def _damage_bytes(content: bytes, draw: random.Random) -> bytes:
    damaged, size = bytearray(content), len(content)
    kind = draw.choice(["flip", "cut", "zero", "header", "size", "join"])
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 20])):
            damaged[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        return content[: draw.randrange(size)]
    elif kind == "zero":
        start = draw.randrange(size)
        damaged[start : start + 700] = bytes(len(damaged[start : start + 700]))
    elif kind == "join":
        return content + content[: draw.randrange(size)]
    else:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            at = draw.choice(tar.getmembers()).offset
        if kind == "header":
            damaged[at + draw.randrange(512)] ^= 0xFF
        else:
            sizes = [b"77777777777\0", b"\x80" + b"\xff" * 11, b"00000000000\0", b"00000000777\0", b"-0000000001\0"]
            damaged[at + 124 : at + 136] = draw.choice(sizes)
            damaged[at + 148 : at + 156] = b" " * 8
            damaged[at + 148 : at + 156] = b"%06o\0 " % sum(damaged[at : at + 512])
    return bytes(damaged)


def _damage_index(text: str, draw: random.Random) -> str:
    """Change a number of an index, and leave out the checksum, as earlier indexes do."""
    values = json.loads(text)
    del values["crc32"]
    inner: Any = values
    while inner:
        key = draw.choice(list(inner)) if isinstance(inner, dict) else draw.randrange(len(inner))
        if not isinstance(inner[key], dict | list) or draw.random() < 0.05:
            break
        inner = inner[key]
    else:
        return text
    inner[key] = draw.choice([-1, 0, 7, 2**33, 2**47, 2**70, 1.5, "1", None, [], {}, True, float("inf"), [[1]]])
    return json.dumps(values)


@pytest.fixture(scope="module")
def datasets(
    folder: Path,
    create_recording: Callable[..., Any],
    write_robot_data: Callable[..., Path],
    write_records: Callable[..., Path],
    write_samples: Callable[..., Path],
) -> dict[str, DataParams]:
    """Sound datasets of two shards of each kind."""
    recordings = [create_recording(number, 4) for number in range(2)]
    picture = _png_picture()
    captions = [[{"png": picture, "txt": b"a b"}, {"png": picture, "json": b'{"caption": "c"}'}] * 2] * 2
    lists = [[{"json.gz": gzip.compress(json.dumps(list(range(9))).encode())}] * 4] * 2
    common: dict[str, Any] = {"num_workers": 0, "allow_multiple_epochs": True, "max_bad_fraction": 1.0}
    text: dict[str, Any] = common | {"seq_len": 8, "vocab_size": 300}
    images: dict[str, Any] = common | {"image_size": 16, "img_num_tokens": 2, "seq_len": 64}
    made: dict[str, DataParams] = {
        "records": TextDataParams(dataset_manifest=[str(write_records(folder / "records", [4, 4], 9))], **text),
        "lists": TextDataParams(dataset_manifest=[str(write_samples(folder / "lists", lists))], **text),
        "captions": ImageCaptionDataParams(
            dataset_manifest=[str(write_samples(folder / "captions", captions))],
            tokenizer=str(folder / "tokenizer"),
            **images,
        ),
    }
    for layout in ("samples", "episodes"):
        manifest = write_robot_data(folder / layout, recordings, layout=layout, episodes_per_shard=1)
        fields: dict[str, Any] = {"action_fields": ACTIONS, "proprioception_fields": PROPRIOCEPTION}
        made[layout] = RoboticsDataParams(dataset_manifest=[str(manifest)], **images, **fields)
    return made


def _png_picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _peak_memory() -> int:
    """Return the most memory that this process has had since the last call, in KiB; 0 where Linux does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return 0
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("number", range(100))
def test_a_damaged_shard_costs_its_samples_or_one_line(
    tmp_path: Path, datasets: dict[str, DataParams], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draw = random.Random(f"shard {number}")
    kind = draw.choice(list(datasets))
    params = datasets[kind]
    source = Path(params.dataset_manifest[0]).parent
    for path in source.iterdir():
        if path.is_file() and ".index" not in path.name:
            shutil.copy(path, tmp_path)
    damaged = tmp_path / "shard_000000.tar"
    how = draw.random()
    if how < 0.2:
        with damaged.open("rb") as file:
            index = format_index(index_shard(file))
        (tmp_path / "shard_000000.index.json").write_text(_damage_index(index, draw), encoding="utf-8")
    elif how < 0.7:
        with tarfile.open(damaged) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]  # pyright: ignore
        damaged.write_bytes(_tar_of(_damage_members(members, draw)))
    else:
        damaged.write_bytes(_damage_bytes(damaged.read_bytes(), draw))
    params = replace(params, dataset_manifest=[str(tmp_path / "manifest.jsonl")])
    _peak_memory()
    before = _peak_memory()
    try:
        loader = create_dataloader(params, per_gpu_batch_size=4)
        with closing(loader):
            batches = list(islice(loader.microbatches(0), 3))
    except EXPECTED_ERRORS as error:
        line = describe_error(error)
        assert str(tmp_path) in line
        assert len(line) < 2000
    else:
        for batch in batches:
            assert len(batch["positions"]) == 4
            for value in batch.values():
                assert not torch.is_tensor(value) or torch.isfinite(value.float()).all()
            assert not any("Memory" in reason or "Recursion" in reason for reason in batch["dropped"])
    assert _peak_memory() - before < 1 << 20


_DOCUMENTS = [
    *(text.decode("latin1") for text in _JSONS),
    '{"version": ' + _DIGITS + "}",
    '{"a": ' * 90 + "1" + "}" * 90,
]
_YAMLS = [
    "a0: &a0 [x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join(4 * [f'*a{n - 1}'])}]\n" for n in range(1, 40)),
    *(
        "- " * 500,
        "- " * 100_000,
        "{a: " * 100_000,
        "? " * 500,
        "a: &a [*a]",
        "a: " + _DIGITS,
        "!!python/name:os.system",
    ),
]
# file -> what reads it
_READERS: dict[str, Callable[[Path], Any]] = {
    "manifest.jsonl": lambda path: parse_manifest(read_text(str(path)), str(path)),
    "shard.index.json": lambda path: parse_index(read_text(str(path)), str(path)),
    "episode.json": lambda path: parse_episode_header(path.read_bytes(), str(path)),
    "robotics.json": lambda path: parse_spec(read_text(str(path)), str(path)),
    "stats.json": lambda path: parse_statistics(read_text(str(path)), str(path)),
    "meta/info.json": lambda path: read_info(str(path.parents[1])),
    "tokenizer.json": lambda path: load_tokenizer(str(path.parent)),
    "vocabulary/tokenizer.json": lambda path: read_vocabulary(path.parent),
    "config.yaml": lambda path: load_experiment_params_from_yaml(str(path)),
    "model.yaml": lambda path: load_params_from_yaml(ModelParams, str(path)),
}


@pytest.mark.parametrize("name", _READERS)
def test_a_bomb_in_any_file_costs_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for text in _YAMLS if name.endswith("yaml") else _DOCUMENTS:
        path.write_text(text, encoding="latin1")
        fault = _fault_of(_READERS[name], path)
        assert str(tmp_path) in fault or (not fault and len(text) < 5000), text[:50]
        assert len(fault) < 2100


def _fault_of(read: Callable[[Path], Any], path: Path) -> str:
    try:
        read(path)
    except EXPECTED_ERRORS as error:
        return describe_error(error)
    return ""
