"""Params of mixtures: what is derived for each dataset, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config.command_line import parse
from vla_foundry.config.resolve import resolve
from vla_foundry.config.schema import MissingError
from vla_foundry.params import HyperParams, TrainExperimentParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.facts import DatasetFacts, Facts, TokenizerFacts
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.robotics.fields import Window
from vla_foundry.text.tokenizers import Vocabulary


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
        (
            {"num_epochs": 2},
            r"^total_train_samples \(320\) and num_epochs \(2\) x 1000 samples of data\.epochs_of / its share 0\.5",
        ),
        ({"model": TransformerParams(max_seq_len=8, vocab_size=100)}, r"^data\.datasets\.web\.seq_len \(16\) is more"),
        # half of 320 samples, but one pass is 150
        ({}, r"160.* is more than the 150 samples of books/manifest\.jsonl"),
        ({"total_val_samples": 8}, r"^total_val_samples \(8\) needs data\. Give --data\.datasets\.NAME\.val_dataset"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(replace(PARAMS, **changes), FACTS)
    assert "\n" not in str(caught.value)


def test_a_dataset_that_the_run_hardly_reaches_is_named() -> None:
    data = replace(DATA, modality_block=8)
    assert replace(data, weights={"web": 39.0, "books": 1.0}).check(PARAMS, FACTS, "data") == []
    assert replace(data, weights={"web": 40.0, "books": 1.0}).check(PARAMS, FACTS, "data") == [
        "data.weights.books gives books less than one block of 8 samples in this run, perhaps none."
    ]


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
        ({"epochs_of": "wbe"}, r"^epochs_of 'wbe' is unknown\. Did you mean 'web'"),
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


def test_epochs_are_those_of_one_dataset() -> None:
    params = replace(PARAMS, total_train_samples=None, num_epochs=2)
    data = replace(DATA, allow_multiple_epochs=True, weights={"web": 3.0, "books": 1.0})
    assert resolve(replace(params, data=replace(data, epochs_of="books")), FACTS).total_train_samples == 2 * 150 * 4
    # the first of text alone
    assert resolve(replace(params, data=data), FACTS).total_train_samples == 2000 / 0.75 // 1
    # exactly one pass over one, and the other, which repeats, may
    once = replace(data.datasets["web"], allow_multiple_epochs=True)
    one = replace(data, allow_multiple_epochs=False, datasets=data.datasets | {"web": once}, epochs_of="books")
    assert resolve(replace(params, data=one, num_epochs=1), FACTS).total_train_samples == 600
    with pytest.raises(
        ValueError, match=r"^its share 300 of total_train_samples \(1200\) is more than the 150 samples of books"
    ):
        resolve(replace(params, data=one), FACTS)


def test_one_model_reads_one_vocabulary() -> None:
    """A token that only one dataset has is no contradiction; an id that means something else is."""

    def facts_of(name: str, ids: dict[str, int]) -> Facts:
        known = TokenizerFacts(name=name, vocab_size=len(ids), vocabulary=Vocabulary(ids=ids))
        return replace(create_facts(name), tokenizer=known)

    params = replace(PARAMS, total_train_samples=160)
    web = facts_of("web", {"a": 0, "b": 1})
    resolve(params, replace(FACTS, parts={"web": web, "books": facts_of("books", {"a": 0, "b": 1, "<image>": 2})}))
    other = replace(FACTS, parts={"web": web, "books": facts_of("books", {"b": 0, "a": 1})})
    with pytest.raises(ValueError, match=r"^data\.datasets\.web and data\.datasets\.books have different tokenizers"):
        resolve(params, other)
    resolve(replace(params, data=replace(DATA, accept_contradictions=True)), other)
    large = facts_of("books", {str(number): number for number in range(200)})
    with pytest.raises(
        ValueError, match=r"vocab_size \(100\) is less than the 200 tokens of data\.datasets\.books\.tokenizer"
    ):
        resolve(params, replace(FACTS, parts={"web": create_facts("web"), "books": large}))


def parse_data(*words: str) -> Any:
    base = ["--model.type", "transformer", "--total_train_samples", "9"]
    return parse(TrainExperimentParams, [*base, *words], prog="train").params.data


LISTS = ("--data.dataset_manifest", "r,c,t,u", "--data.dataset_modality", "robotics,image_caption,text,text")


@pytest.mark.parametrize("kind", ["mixture", "robotics"])
def test_lists_of_several_modalities_are_a_mixture(kind: str) -> None:
    """Each modality is a dataset, and takes those of the shared keys that it has."""
    words = ("--data.dataset_weighting", "0.5,0.3,0.15,0.05", "--data.processor", "p", "--data.action_fields", "a")
    more = ("--data.seq_len", "64", "--data.val_dataset_manifest", "v", "--data.val_dataset_modality", "text")
    data = parse_data("--data.type", kind, *LISTS, *words, *more, "--data.dataset_statistics", "s")
    assert data.shares() == pytest.approx({"robotics": 0.5, "image_caption": 0.3, "text": 0.2})
    robotics, captions, text = data.datasets.values()
    assert [part.type for part in data.datasets.values()] == ["robotics", "image_caption", "text"]
    assert (text.dataset_manifest, text.dataset_weighting, text.val_dataset_manifest) == (
        ["t", "u"],
        [0.15, 0.05],
        ["v"],
    )
    assert (robotics.processor, captions.processor, robotics.action_fields) == ("p", "p", ["a"])
    assert robotics.dataset_statistics == ["s"]
    assert {part.seq_len for part in data.datasets.values()} == {64}


def test_tokenized_and_raw_text_are_mixed() -> None:
    words = ("--data.dataset_manifest", "t,u", "--data.dataset_modality", "text,text_untokenized")
    data = parse_data("--data.type", "text", *words, "--data.tokenizer", "k")
    assert [(part.type, part.tokenizer) for part in data.datasets.values()] == [
        ("text", "k"),
        ("text_untokenized", "k"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (LISTS[:2], r"^data\.dataset_modality is missing\. Give one of image_caption, interleaved, robotics,"),
        ((*LISTS[:3], "text,robotics"), r"^data\.dataset_modality has 2 entries and data\.dataset_manifest has 4"),
        ((*LISTS[:3], "text,text,text,caption"), r"^data\.dataset_modality 'caption' is unknown\. Did you mean"),
        ((*LISTS, "--data.dataset_weighting", "1,2"), r"^data\.dataset_weighting has 2 entries and"),
        ((*LISTS, "--data.val_dataset_manifest", "v"), r"^data\.val_dataset_modality is missing"),
        ((*LISTS, "--data.datasets.web.type", "text"), r"^data\.dataset_manifest and data\.datasets are both given"),
        ((*LISTS, "--data.datasetz", "1"), r"^data\.datasetz is unknown"),
        (
            ("--data.datasets.web.type", "text", "--data.action_fields", "a"),
            r"^data\.action_fields is unknown for data\.type 'mixture'; robotics has it",
        ),
        (
            (*LISTS, "--data.val_dataset_manifest", "v", "--data.val_dataset_modality", "text_untokenized"),
            r"^data\.val_dataset_modality has 'text_untokenized', which data\.dataset_modality lacks",
        ),
    ],
)  # fmt: skip
def test_lists_that_contradict_each_other_are_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_data("--data.type", "mixture", *words)
    assert "\n" not in str(caught.value)


def test_a_key_beside_the_datasets_is_theirs_unless_they_give_it(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {type: mixture, num_workers: 3, seq_len: 64, datasets: {web: {type: text, seq_len: 32}, pictures: "
        "{type: image_caption}}}\n",
        encoding="utf-8",
    )
    web, pictures = parse_data("--config_path", str(config)).datasets.values()
    assert [(part.seq_len, part.num_workers) for part in (web, pictures)] == [(32, 3), (64, 3)]
    # what is typed now is meant for all
    web, pictures = parse_data("--config_path", str(config), "--data.seq_len", "16").datasets.values()
    assert (web.seq_len, pictures.seq_len) == (16, 16)


def test_messages_name_the_place_where_a_value_was_given(tmp_path: Path) -> None:
    config = tmp_path / "mix.yaml"
    (tmp_path / "robot.yaml").write_text("data: {type: robotics, action_fields: [a]}", encoding="utf-8")
    config.write_text("<<: !include robot.yaml\ndata:\n  type: mixture\n", encoding="utf-8")
    words = ["--config_path", str(config), "--model.type", "transformer", "--data.datasets.web.type", "text"]
    parsed = parse(TrainExperimentParams, words, prog="train")
    assert f"data.type is now 'mixture' ({config}:3): dropped data.action_fields" in parsed.notices[0]
    config.write_text("data:\n  dataset_manifest: [a, b]\n  dataset_modality: [text, robotics]\n", encoding="utf-8")
    words = [*words[:4], "--data.dataset_weighting", "[1, 0]"]
    with pytest.raises(ValueError, match=r"^data\.datasets\.robotics\.dataset_weighting\[0\] \(0\) must be above 0"):
        parse(TrainExperimentParams, words, prog="train")


def test_robots_have_windows_of_their_own() -> None:
    """The model must hold the longest: each batch has the steps of its robot."""
    arm = RoboticsDataParams(lowdim_past_timesteps=1, lowdim_future_timesteps=15)
    hand = replace(arm, lowdim_past_timesteps=4, lowdim_future_timesteps=7)
    both = MixtureDataParams(datasets={"arm": arm, "hand": hand, "web": create_text("web")})
    assert both.robot_window() == Window(4, 15)
    assert DATA.robot_window() is None
