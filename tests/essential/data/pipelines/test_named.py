"""Stages by name, stages of users and of WebDataset, and the order of the data that goes through them."""

import io
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from tests.essential.text_rows import create_rows, read
from vla_foundry.config.command_line import import_plugins
from vla_foundry.data import create_dataloader
from vla_foundry.data.pipelines.named import FunctionStage, Stages
from vla_foundry.data.pipelines.stages import create_pipeline
from vla_foundry.data.pipelines.text import DEFAULT_STAGES, TextPipeline
from vla_foundry.params.data.stages import StageParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.world import World

PLUGIN = '''
import random

import numpy as np
import torch
from subprocess import run

from vla_foundry.params.data.stages import register_stage


def is_wanted(sample):
    """Drop a third of the samples."""
    return sample["input_ids"][0] % 3 != 1


def copies(sample):
    """Make one to three samples of one."""
    for number in range(1 + int(sample["input_ids"][0]) // 3 % 3):
        yield {**sample, "input_ids": sample["input_ids"] + 1000 * number}


def jitter(sample, generator):
    """Add random numbers, keyed and from the global generators."""
    drawn = int(generator.integers(9)) + random.randrange(9) + np.random.randint(9) + int(torch.randint(9, ()))
    return {"input_ids": sample["input_ids"] + 10000 * drawn}


def only_tokens(sample):
    return {"input_ids": sample["input_ids"]}


def first_row(sample):
    return {"input_ids": sample["input_ids"][:9]}


class Add:
    def __init__(self, number):
        self.number = number

    def __call__(self, sample):
        return {**sample, "input_ids": sample["input_ids"] + self.number}


@register_stage("double")
def double(sample):
    return {**sample, "input_ids": sample["input_ids"] * 2}
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A plug-in with stages, which the user has named."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "stages_plugin.py").write_text(PLUGIN, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr("vla_foundry.config.command_line._named", [])
        import_plugins(["stages_plugin"], "--plugins")
        yield "stages_plugin"


@pytest.fixture
def dataset(tmp_path: Path, write_samples: Callable, json_tokens: Callable) -> str:
    """40 samples in four shards; sample n begins with token n."""
    return str(
        write_samples(
            tmp_path / "d", [[json_tokens(range(n, n + 9)) for n in range(s, s + 10)] for s in (0, 10, 20, 30)]
        )
    )


STAGES = {
    "wanted": StageParams(use="wds.select", args=["stages_plugin.is_wanted"], after="require_tokens"),
    "copies": StageParams(use="stages_plugin.copies", after="wanted", samples=3),
    "jitter": StageParams(use="wds.map", args=["stages_plugin.jitter"], after="copies"),
}


def first_tokens(
    manifest: str, first: int, count: int, *, world_size: int = 1, num_workers: int = 0
) -> list[list[int]]:
    """Return the first tokens of the samples of each global batch."""
    params = TextDataParams(
        dataset_manifest=[manifest],
        seq_len=8,
        num_workers=num_workers,
        allow_multiple_epochs=True,
        shuffle_buffer_size=20,
        stages=STAGES,
    )
    found: list[list[int]] = [[] for _ in range(count)]
    for rank in range(world_size):
        world = World(rank=rank, world_size=world_size)
        loader = create_dataloader(params, world, global_batch_size=4, per_gpu_batch_size=4 // world_size, seed=3)
        stream = loader.microbatches(first)
        for number in range(count):
            found[number] += next(stream)["input_ids"][:, 0].tolist()
        loader.close()
    return found


def test_order_is_a_function_of_the_position(plugin: str, dataset: str) -> None:
    expected = first_tokens(dataset, 0, 10)
    random.seed(2)
    np.random.seed(2)
    assert first_tokens(dataset, 0, 10, world_size=4) == expected
    for first in (1, 9):
        assert first_tokens(dataset, first, 1) == expected[first : first + 1]
    assert first_tokens(dataset, 3, 4, num_workers=2) == expected[3:7]
    tokens = np.asarray(expected).ravel()
    assert (tokens % 1000 % 3 != 1).all()
    assert len(set((tokens // 10000).tolist())) > 10, "the draws of samples differ"
    assert set((tokens // 1000 % 10).tolist()) == {0, 1, 2}, "all copies are seen"


def test_a_stage_leaves_the_global_generators_as_they_are() -> None:
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    stage = FunctionStage("draw", lambda sample: {"x": (random.random(), np.random.rand(), float(torch.rand(())))})
    sample = {"__seed__": 1, "__position__": 2}
    assert stage(sample)["x"] == stage(sample)["x"]
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.get_rng_state().tolist() == state[2]


def test_every_sample_that_a_stage_makes_is_seen_once_an_epoch(plugin: str, dataset: str) -> None:
    params = TextDataParams(
        dataset_manifest=[dataset],
        seq_len=8,
        stages={"copies": StageParams(use="stages_plugin.copies", after="require_tokens", samples=3)},
        num_workers=0,
    )
    loader = create_dataloader(params, per_gpu_batch_size=4)
    assert loader.num_samples == 120
    seen, dropped = [], 0
    stream = loader.microbatches(0)
    for _ in range(30):
        batch = next(stream)
        seen += batch["input_ids"][:, 0].tolist()
        dropped += sum(batch["dropped"].values())
    made = {n + 1000 * number for n in range(40) for number in range(1 + n // 3 % 3)}
    assert set(seen) == made
    assert len(seen) == 120
    # a row counts three times; parts that do not exist are replaced, which is no fault
    assert dropped >= 120 - len(made)


@pytest.mark.parametrize(("function", "expected"), [("only_tokens", [0, 8, 1, 9]), ("first_row", [0, 0, 1, 1])])
def test_records_are_cut_after_a_stage_that_returns_a_new_sample(
    plugin: str, tmp_path: Path, write_records: Callable, function: str, expected: list[int]
) -> None:
    manifest = str(write_records(tmp_path / "long", [2], 17))
    stage = StageParams(use=f"stages_plugin.{function}", after="require_tokens")
    params = TextDataParams(dataset_manifest=[manifest], seq_len=8, shuffle=False, num_workers=0, stages={"own": stage})
    batch = next(create_dataloader(params, per_gpu_batch_size=4).microbatches(0))
    assert batch["input_ids"][:, 0].tolist() == expected


def test_stages_change_by_name(plugin: str) -> None:
    stages = TextPipeline(TextDataParams(seq_len=8)).stages
    assert stages.names == TextDataParams().default_stages() == ["decode_json_tokens", "require_tokens"]
    more = stages.insert("shift", lambda sample: sample, before="require_tokens").insert(
        "last", wds.map(len), after="shift"
    )
    assert more.names == ["decode_json_tokens", "shift", "last", "require_tokens"]
    assert more.move("last", before="decode_json_tokens").names[0] == "last"
    assert more.remove("decode_json_tokens").replace("shift", wds.map(len)).names == ["shift", "last", "require_tokens"]
    assert stages.names == ["decode_json_tokens", "require_tokens"]
    with pytest.raises(
        ValueError, match=r"'requre_tokens' is unknown. Did you mean 'require_tokens'\? Stages: decode_json"
    ):
        stages.insert("x", len, before="requre_tokens")
    with pytest.raises(ValueError, match=r"stage 'gone' is unknown\. Stages: decode_json_tokens, require_tokens"):
        stages.remove("gone")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"stages": {"double": StageParams(use="double", before="require_tokens")}},
            ["decode_json_tokens", "double", "require_tokens"],
        ),
        ({"stages": {"require_tokens": StageParams(remove=True)}}, ["decode_json_tokens"]),
        ({"stages": {"require_tokens": StageParams(use="double")}}, ["decode_json_tokens", "require_tokens"]),
        (
            {"stages": {"require_tokens": StageParams(before="decode_json_tokens")}},
            ["require_tokens", "decode_json_tokens"],
        ),
        ({"stage_order": ["require_tokens"]}, ["require_tokens"]),
        ({"stages": {"n": StageParams(use="stages_plugin.Add", args=[5])}, "stage_order": ["n"]}, ["n"]),
    ],
)
def test_params_change_stages_by_name(plugin: str, changes: dict[str, Any], names: list[str]) -> None:
    assert create_pipeline("text", TextDataParams(**changes)).stages.names == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages": {"x": StageParams(use="double")}},
            "stages.x needs a place: before or after one of decode_json_tokens",
        ),
        (
            {"stages": {"x": StageParams(remove=True)}},
            "stages.x: stage 'x' is unknown. Stages: decode_json_tokens, requ",
        ),
        (
            {"stages": {"x": StageParams(use="double", before="y")}},
            "stages.x.before 'y' is unknown. Stages: decode_json_",
        ),
        ({"stage_order": ["y"]}, "stage_order 'y' is unknown. Stages: decode_json_tokens, require_tokens"),
        ({"stages": {"require_tokens": StageParams(remove=True)}, "stage_order": ["require_tokens"]}, "disagree"),
        (
            {"stages": {"x": StageParams(use="os.system", before="require_tokens")}},
            "'os.system' is not in a plug-in that you named .* a module of your own",
        ),
        (
            {"stages": {"x": StageParams(use="stages_plugin.run", before="require_tokens")}},
            "'run' is unknown. Registered: Add",
        ),
        (
            {"stages": {"x": StageParams(use="wds.map", args=["os.system"], before="require_tokens")}},
            "not in a plug-in",
        ),
        (
            {"stages": {"x": StageParams(use="wds.map", args=[3], before="require_tokens")}},
            "3 is not the name of a func",
        ),
        (
            {"stages": {"x": StageParams(use="wds.rename", args=[1, 2, 3], before="require_tokens")}},
            "data.stages.x: too many",
        ),
        (
            {"stages": {"x": StageParams(use="stages_plugin.Add", before="require_tokens")}},
            "missing 1 required positional",
        ),
    ],
)
def test_wrong_stages_are_one_line(plugin: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_pipeline("text", TextDataParams(**changes))


@pytest.mark.parametrize(
    ("made", "message"),
    [(True, "returned bool.*wds.select takes a condition"), (5, "returned int, not"), ("text", "returned str, not")],
)
def test_what_is_no_sample_is_named(made: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FunctionStage("x", lambda _: made, samples=9)({"__seed__": 1, "__position__": 0})


@pytest.mark.parametrize(
    "stage",
    [
        wds.shuffle(10),
        wds.rsample(0.5),
        wds.slice(3),
        wds.batched(2),
        wds.detshuffle(),
        wds.Cached(),
        wds.to_tuple("a"),
    ],
)
def test_webdataset_stages_that_break_the_order_are_refused(stage: Any) -> None:
    with pytest.raises(ValueError, match=r"does not fit into a pipeline: .*WebDataset's stages here: wds.associate"):
        Stages(DEFAULT_STAGES).insert("x", stage, before="require_tokens")
    with pytest.raises(ValueError, match=r"use: wds.shuffle does not fit .*data.shuffle_buffer_size shuffle"):
        StageParams(use="wds.shuffle", args=[10], before="encode")


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray([_Harm()], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["pkl", "PKL", "pickle", "pyd", "pth", "a.pkl", "npy"])
@pytest.mark.parametrize("stage", [wds.decode(), wds.decode("pil"), wds.xdecode(must_decode=False)])
def test_nothing_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_samples: Callable, suffix: str, stage: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    content = _npy() if suffix == "npy" else pickle.dumps(_Harm())
    manifest = write_samples(tmp_path / "d", [[{suffix: content}] * 2])
    stages = Stages(DEFAULT_STAGES).insert("decode", stage, before="decode_json_tokens")
    with pytest.raises(ValueError, match=r"9 samples in a row of .*shard_000000\.tar "):
        read(TextPipeline(TextDataParams(seq_len=8), stages=stages), create_rows([manifest], [0]))
    assert not (tmp_path / "harm").exists()
