"""What is read before a config is resolved: manifests and what lies beside them, tokenizers, cores."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config.schema import Unavailable
from vla_foundry.data.facts import read_facts
from vla_foundry.params import (
    DistributedParams,
    HyperParams,
    TrainExperimentParams,
)
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.facts import DatasetFacts, Facts, TokenizerFacts
from vla_foundry.params.models.transformer import TransformerParams

Write = Callable[[str, str], str]


def dataset(num_samples: Any = 1000, **provenance: Any) -> DatasetFacts:
    return DatasetFacts(manifest="a/manifest.jsonl", num_samples=num_samples, provenance=provenance)


FACTS = Facts(datasets=(dataset(),), num_cpus=6, ranks_per_node=2)
DATA = TextDataParams(dataset_manifest=["a/manifest.jsonl"], seq_len=16)
PARAMS = TrainExperimentParams(
    data=DATA,
    model=TransformerParams(max_seq_len=16, vocab_size=100),
    hparams=HyperParams(global_batch_size=8, per_gpu_batch_size=4, seed=7, warmup=0.1),
    total_train_samples=800,
)


def write_dataset(folder: Path, counts: list[int]) -> str:
    folder.mkdir(parents=True)
    lines = [json.dumps({"shard": f"s{index}", "num_sequences": count}) for index, count in enumerate(counts)]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "manifest.jsonl")


def test_facts_are_read_from_manifests_and_what_lies_beside_them(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "a", [10, 20])
    second = write_dataset(tmp_path / "b", [5])
    (tmp_path / "a" / "provenance.json").write_text('{"dataset": {"vocab_size": 50, "seq_len": 16}}', encoding="utf-8")
    (tmp_path / "b" / "tokenizer").mkdir()
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<eos>"}]}
    (tmp_path / "b" / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    data = TextDataParams(dataset_manifest=[first, second], val_dataset_manifest=[second])
    facts = read_facts(replace(PARAMS, data=data, distributed=DistributedParams()), 4)
    assert [item.num_samples for item in facts.datasets] == [30, 5]
    assert facts.datasets[0].provenance == {"vocab_size": 50, "seq_len": 16}
    assert facts.datasets[0].tokenizer is None
    assert facts.datasets[1].tokenizer == TokenizerFacts(name=str(tmp_path / "b" / "tokenizer"), vocab_size=3)
    assert facts.val_datasets == (facts.datasets[1],)
    assert facts.world_size == 4
    assert facts.num_cpus >= 1


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert read_facts(replace(PARAMS, data=TextDataParams()), 8).ranks_per_node == 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert read_facts(replace(PARAMS, data=TextDataParams()), 8).ranks_per_node == 8


def test_a_missing_manifest_is_an_error_before_training_and_a_gap_when_offline(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere" / "manifest.jsonl")
    params = replace(PARAMS, data=replace(DATA, dataset_manifest=[missing]))
    with pytest.raises(FileNotFoundError, match=r"^data\.dataset_manifest: there is no manifest .*nowhere"):
        read_facts(params, 1)
    for name in (missing, "s3://bucket/manifest.jsonl", "hf://datasets/a/b/manifest.jsonl"):
        data = replace(DATA, dataset_manifest=[name], tokenizer="hf://a/b")
        facts = read_facts(replace(params, data=data), 1, offline=True)
        assert facts.datasets[0].num_samples == Unavailable(name)


def test_a_tokenizer_folder_that_is_not_there_is_an_error_and_one_on_the_hub_is_not_waited_for(tmp_path: Path) -> None:
    folder = str(tmp_path / "nowhere")
    params = replace(PARAMS, data=TextDataParams(tokenizer=folder))
    with pytest.raises(FileNotFoundError, match=r"^data\.tokenizer: \S*nowhere is no folder with a tokenizer\.json\.$"):
        read_facts(params, 1)
    assert read_facts(params, 1, offline=True).tokenizer is None
    hub = replace(PARAMS, data=TextDataParams(tokenizer="owner/name"))
    assert read_facts(hub, 1, offline=True).tokenizer is None


def test_a_folder_instead_of_its_manifest_says_what_was_meant(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "a", [1])
    params = replace(PARAMS, data=replace(DATA, dataset_manifest=[str(tmp_path / "a")]))
    with pytest.raises(FileNotFoundError, match=rf"Did you mean {manifest}\?"):
        read_facts(params, 1)
