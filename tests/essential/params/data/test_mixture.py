"""Params of mixtures: what is derived for each dataset, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from vla_foundry.config.resolve import resolve
from vla_foundry.config.schema import MissingError
from vla_foundry.params import HyperParams, TrainExperimentParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.facts import DatasetFacts, Facts
from vla_foundry.params.models.transformer import TransformerParams


def create_text(name: str, **values: Any) -> TextDataParams:
    return TextDataParams(dataset_manifest=[f"{name}/manifest.jsonl"], **{"seq_len": 16} | values)


def create_facts(name: str, num_samples: int = 1000) -> Facts:
    dataset = DatasetFacts(manifest=f"{name}/manifest.jsonl", num_samples=num_samples, provenance={})
    return Facts(datasets=(dataset,), num_cpus=2)


FACTS = Facts(parts={"web": create_facts("web"), "books": create_facts("books", 150)}, world_size=2)
DATA = MixtureDataParams(datasets={"web": create_text("web"), "books": create_text("books", seq_len=8)})
PARAMS = TrainExperimentParams(
    data=DATA,
    model=TransformerParams(max_seq_len=16, vocab_size=100),
    hparams=HyperParams(global_batch_size=16, per_gpu_batch_size=4, seed=7, warmup=0.1),
    total_train_samples=320,
)


def test_each_dataset_is_resolved_as_if_it_were_alone() -> None:
    data: Any = resolve(replace(PARAMS, total_train_samples=160), FACTS).data
    assert data.weights == {"web": 1.0, "books": 1.0}
    assert (data.seed, data.modality_block) == (7, 8)
    assert {part.num_workers for part in data.datasets.values()} == {2}
    assert data.datasets["books"].seq_len == 8
    assert resolve(replace(PARAMS, data=data, total_train_samples=160), FACTS).data == data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": replace(DATA, modality_block=12)}, r"^data\.modality_block \(12\) must be a multiple of num_ranks"),
        ({"data": replace(DATA, modality_block=32)}, r"^data\.modality_block \(32\) must be .*divide hparams\.global"),
        ({"num_epochs": 2}, r"^num_epochs \(2\) is not defined for a mixture"),
        # half of 320 samples, but one pass is 150
        ({}, r"160.* is more than the 150 samples of books/manifest\.jsonl"),
        ({"total_val_samples": 8}, r"^total_val_samples \(8\) needs data\. Give --data\.datasets\.NAME\.val_dataset"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(replace(PARAMS, **changes), FACTS)
    assert "\n" not in str(caught.value)


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(MissingError, match=r"^data\.datasets is empty"):
        resolve(replace(PARAMS, data=MixtureDataParams()), Facts())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"web": 1.0}}, r"^weights lacks 'books'"),
        ({"weights": {"web": 1.0, "books": 1.0, "code": 1.0}}, r"^weights has 'code', which is not one of datasets"),
        ({"datasets": {"more": DATA}}, r"^datasets\.more\.type is mixture"),
        ({"datasets": {"a b": create_text("a")}}, r"^datasets has the name 'a b'"),
        ({"dataset_manifest": ["a"]}, r"^dataset_manifest goes into a dataset of the mixture"),
    ],
)
def test_a_contradiction_within_the_mixture_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DATA, **values)


def test_validation_samples_follow_the_shares_of_those_that_have_any() -> None:
    with_data = {name: replace(part, val_dataset_manifest=["v"]) for name, part in DATA.datasets.items()}
    both = replace(DATA, datasets=with_data, weights={"web": 3.0, "books": 1.0})
    assert both.num_val_samples(80) == {"web": 60, "books": 20}
    assert replace(both, datasets=with_data | {"web": create_text("web")}).num_val_samples(80) == {
        "web": None,
        "books": 80,
    }
    assert both.num_val_samples(None) == {"web": None, "books": None}
