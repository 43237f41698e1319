"""Derived values, checks between sections, and what is printed when something cannot be known."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from vla_foundry.config.command_line import parse
from vla_foundry.config.resolve import format_resolved, resolve, resolve_known
from vla_foundry.config.schema import Unavailable
from vla_foundry.config.tree import Origin
from vla_foundry.params import (
    DataParams,
    DistributedParams,
    EMAParams,
    HyperParams,
    ModelParams,
    TrainExperimentParams,
    load_experiment_params_from_yaml,
    load_params_from_yaml,
)
from vla_foundry.params.data.base import register_data_params
from vla_foundry.params.data.text import TextDataParams, TextUntokenizedDataParams
from vla_foundry.params.experiment import (
    accumulation_steps,
    checkpoint_steps,
    count_weights,
    find_lack_of_memory,
    total_steps,
)
from vla_foundry.params.facts import DatasetFacts, Facts, TokenizerFacts
from vla_foundry.params.models.transformer import TransformerHFParams, TransformerParams
from vla_foundry.params.models.vlm import VLMParams

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


def test_seed_workers_weights_and_modalities_are_filled_in_and_nothing_is_changed() -> None:
    params = resolve(PARAMS, FACTS)
    assert (params.data.seed, params.data.num_workers) == (7, 3)
    assert (params.data.dataset_weighting, params.data.dataset_modality) == ([1.0], ["text"])
    assert PARAMS.data.seed is None
    assert replace(params, data=DATA) == PARAMS


def test_what_is_given_is_not_derived() -> None:
    given = replace(DATA, seed=1, num_workers=0, vocab_size=90, dataset_weighting=[3.0], dataset_modality=["text"])
    given = replace(given, stage_order=["decode_json_tokens", "require_tokens"])
    assert resolve(replace(PARAMS, data=given), FACTS).data == given


def test_resolving_twice_is_resolving_once() -> None:
    once = resolve(PARAMS, FACTS)
    assert resolve(once, FACTS) == once


def test_epochs_become_samples() -> None:
    params = replace(PARAMS, total_train_samples=None, num_epochs=2, data=replace(DATA, allow_multiple_epochs=True))
    assert resolve(params, FACTS).total_train_samples == 2000
    # both may be given if they agree
    assert resolve(replace(params, total_train_samples=2000), FACTS).total_train_samples == 2000


def test_a_tokenizer_in_the_datasets_folder_is_taken() -> None:
    facts = replace(FACTS, datasets=(replace(dataset(), tokenizer=TokenizerFacts(name="a/t", vocab_size=99)),))
    resolved = resolve(PARAMS, facts)
    assert isinstance(resolved.data, TextDataParams)
    assert resolved.data.tokenizer == "a/t"


TWO_DATASETS = replace(FACTS, datasets=(dataset(10_000), dataset(100)))


@pytest.mark.parametrize(
    ("params", "facts", "message"),
    [
        (
            replace(PARAMS, hparams=HyperParams(global_batch_size=100, per_gpu_batch_size=4)),
            replace(FACTS, world_size=8),
            r"^hparams\.global_batch_size \(100\) must be a multiple of num_ranks \(8\) x "
            r"hparams\.per_gpu_batch_size \(4\) = 32\. Use 96 or 128\.$",
        ),
        (
            replace(PARAMS, hparams=HyperParams(global_batch_size=8, per_gpu_batch_size=16)),
            FACTS,
            r"Use 16\.$",
        ),
        (
            replace(PARAMS, distributed=DistributedParams(fsdp=True, replicate_size=3)),
            replace(FACTS, world_size=4),
            r"^distributed\.replicate_size \(3\) does not divide the number of ranks \(4\)\. Use the",
        ),
        (replace(PARAMS, total_train_samples=None), FACTS, r"^There is no budget\. Give --total_train_samples"),
        (replace(PARAMS, total_train_samples=7), FACTS, r"^total_train_samples \(7\) is less than one global batch"),
        (
            replace(PARAMS, num_epochs=2),
            FACTS,
            r"^total_train_samples \(800\) and num_epochs \(2\) x 1000 samples = 2000 disagree",
        ),
        (
            replace(PARAMS, total_train_samples=1016),
            FACTS,
            r"^total_train_samples \(1016\) is more than the 1000 samples of a/manifest\.jsonl\. "
            r"Set --data\.allow_multiple_epochs true",
        ),
        (
            replace(PARAMS, data=replace(DATA, dataset_manifest=["a", "b"])),
            TWO_DATASETS,
            r"^its share 400 of total_train_samples \(800\) is more than the 100 samples",
        ),
        (replace(PARAMS, data=TextDataParams()), Facts(), r"^data\.dataset_manifest is empty\. Give --data"),
        (
            replace(PARAMS, total_val_samples=8),
            FACTS,
            r"^total_val_samples \(8\) needs data\. Give --data\.val_dataset",
        ),
        (
            replace(PARAMS, data=replace(DATA, seq_len=32)),
            FACTS,
            r"^data\.seq_len \(32\) is more than model\.max_seq_len \(16\)\. Use --data\.seq_len 16",
        ),
        (
            PARAMS,
            replace(FACTS, datasets=(dataset(seq_len=8),)),
            r"^data\.seq_len \(16\) is more than 8, the length of the records of a/manifest\.jsonl\. Use --data",
        ),
        (
            replace(PARAMS, data=replace(DATA, val_dataset_manifest=["v"]), total_val_samples=80),
            replace(FACTS, val_datasets=(dataset(50),)),
            r"^total_val_samples \(80\) must be at most the 50 samples of data\.val_dataset_manifest\.",
        ),
        (PARAMS, replace(FACTS, datasets=(dataset(0),)), r"^a/manifest\.jsonl holds no samples\."),
        (
            replace(PARAMS, model=TransformerHFParams(hf_pretrained="gpt2")),
            replace(FACTS, datasets=(dataset(vocab_size=100),), model_configs={"gpt2": {"vocab_size": 64}}),
            r"^gpt2: vocab_size \(64\) is less than the 100 tokens of a/manifest\.jsonl\. Use data of its own",
        ),
        (
            replace(PARAMS, model=TransformerHFParams(hf_pretrained="gpt2")),
            replace(FACTS, model_configs={"gpt2": {"n_positions": 8}}),
            r"^data\.seq_len \(16\) is more than gpt2: number of positions \(8\)\. Use --data\.seq_len 8",
        ),
        (
            replace(PARAMS, model=TransformerHFParams(hf_pretrained="o")),
            replace(FACTS, model_configs={"o": {"model_type": "opt", "max_position_embeddings": 8}}),
            r"^data\.seq_len \(16\) is more than o: number of positions \(8\)\. .* a model with more positions",
        ),
        (
            replace(PARAMS, model=TransformerHFParams(hf_pretrained="r")),
            replace(FACTS, model_configs={"r": {"model_type": "roberta", "max_position_embeddings": 17}}),
            r"^data\.seq_len \(16\) is more than r: number of positions \(15\)\.",
        ),
        (
            replace(PARAMS, model=TransformerHFParams(hf_pretrained="m")),
            replace(FACTS, model_configs={"m": {"model_type": "mpt", "max_seq_len": 8}}),
            r"^data\.seq_len \(16\) is more than m: number of positions \(8\)\.",
        ),
        (
            PARAMS,
            replace(FACTS, datasets=(dataset(vocab_size=101),)),
            r"^model\.vocab_size \(100\) is less than the 101 tokens of a/manifest\.jsonl\. "
            r"Use --model\.vocab_size 101",
        ),
        (
            replace(PARAMS, data=replace(DATA, tokenizer="t")),
            replace(FACTS, tokenizer=TokenizerFacts(name="t", vocab_size=200)),
            r"^model\.vocab_size \(100\) is less than the 200 tokens of data\.tokenizer t",
        ),
        (
            replace(PARAMS, data=replace(DATA, tokenizer="t")),
            replace(FACTS, tokenizer=TokenizerFacts(name="t", vocab_size=60), datasets=(dataset(vocab_size=50),)),
            r"^The tokenizers differ: data\.tokenizer t has 60 tokens and a/manifest\.jsonl has 50",
        ),
        (
            replace(PARAMS, data=TextUntokenizedDataParams(dataset_manifest=["a"], seq_len=16)),
            FACTS,
            r"^data\.tokenizer is missing\. Give --data\.tokenizer",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_line_with_a_fix(
    params: TrainExperimentParams, facts: Facts, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(params, facts)
    assert "\n" not in str(caught.value)


def test_what_just_fits_is_no_error() -> None:
    facts = replace(FACTS, datasets=(dataset(vocab_size=100, seq_len=16),))
    assert resolve(replace(PARAMS, total_train_samples=1000), facts).total_train_samples == 1000
    # shares of 533.3 and 266.7 samples
    weights = replace(DATA, dataset_manifest=["a", "b"], dataset_weighting=[2.0, 1.0])
    facts = replace(FACTS, datasets=(dataset(534), dataset(267)))
    assert resolve(replace(PARAMS, data=weights), facts).total_train_samples == 800


def test_samples_that_fill_no_batch_are_mentioned() -> None:
    (notice,) = resolve_known(replace(PARAMS, total_train_samples=805), FACTS).notices
    assert notice.startswith("5 of total_train_samples (805) do not fill a global batch of 8")


@pytest.mark.parametrize(
    ("made", "words"),
    [(32, r"2 samples of data.seq_len (16)."), (40, "3 samples of data.seq_len (16), of which the last")],
)
def test_records_that_are_cut_are_mentioned(made: int, words: str) -> None:
    (notice,) = resolve_known(PARAMS, replace(FACTS, datasets=(dataset(seq_len=made),))).notices
    assert notice.startswith(f"a/manifest.jsonl: its records of {made} tokens are cut into {words}")


def test_an_unknown_fact_is_left_open_for_a_print_and_an_error_before_training() -> None:
    params = replace(PARAMS, total_train_samples=None, num_epochs=1)
    facts = replace(FACTS, datasets=(dataset(Unavailable("s3://b/manifest.jsonl")),))
    resolved = resolve_known(params, facts)
    assert resolved.unresolved == {"total_train_samples": "s3://b/manifest.jsonl"}
    assert "total_train_samples: null" in format_resolved(resolved, {})
    assert "# unresolved (needs s3://b/manifest.jsonl)" in format_resolved(resolved, {})
    with pytest.raises(ValueError, match=r"^total_train_samples cannot be resolved: it needs s3://b/manifest\.jsonl"):
        resolve(params, facts)


def test_the_budget_in_steps() -> None:
    assert total_steps(replace(PARAMS, total_train_samples=807)) == 100
    assert accumulation_steps(PARAMS, 1) == 2
    assert accumulation_steps(PARAMS, 2) == 1
    assert checkpoint_steps(replace(PARAMS, num_checkpoints=3)) == (33, 66, 100)
    assert checkpoint_steps(replace(PARAMS, total_train_samples=16)) == (1, 2)
    with pytest.raises(ValueError, match="total_train_samples is not known"):
        total_steps(replace(PARAMS, total_train_samples=None))


@pytest.mark.parametrize("num_checkpoints", [1, 2, 5, 7, 99, 100, 101])
def test_checkpoints_are_spread_evenly_and_the_last_is_at_the_end(num_checkpoints: int) -> None:
    steps = checkpoint_steps(replace(PARAMS, num_checkpoints=num_checkpoints))
    gaps = [after - before for before, after in zip((0, *steps), steps, strict=False)]
    assert len(steps) == min(num_checkpoints, 100)
    assert steps[-1] == 100
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def test_the_print_shows_every_leaf_with_its_origin_and_loads_to_the_same_run(write: Write) -> None:
    params = replace(PARAMS, wandb_tags=["a", "1e5"])
    resolved = resolve_known(params, FACTS)
    origins = {"total_train_samples": Origin("command line"), "hparams.seed": Origin("job.yaml", 4)}
    text = format_resolved(resolved, origins)
    comments = {line.partition(":")[0].strip(): line.partition(" # ")[2] for line in text.splitlines()}
    assert comments["total_train_samples"] == "command line"
    assert re.search(r"^  seed: 7 +# job\.yaml:4$", text, re.MULTILINE)
    assert comments["num_workers"] == "resolved from 6 cores / 2 ranks, at most 8"
    assert comments["dataset_modality"] == "resolved from data.type"
    assert comments["n_layers"] == "default"
    loaded = load_experiment_params_from_yaml(write("resolved_config.yaml", text))
    assert loaded == resolved.params
    assert resolve(loaded, FACTS) == loaded


@register_data_params("test_mixture")
@dataclass(frozen=True, kw_only=True)
class MixtureParams(DataParams):
    """Named datasets."""

    # the datasets
    datasets: dict[str, DataParams] = field(default_factory=dict)


def test_sections_in_a_dict_are_resolved_checked_and_printed_too(write: Write) -> None:
    inner = TextDataParams(dataset_manifest=["b"], seq_len=16)
    data = MixtureParams(dataset_manifest=["a/manifest.jsonl"], seq_len=16, datasets={"web": inner})
    resolved = resolve_known(replace(PARAMS, data=data), FACTS)
    assert isinstance(resolved.params.data, MixtureParams)
    assert resolved.params.data.datasets["web"].seed == 7
    assert resolved.sources["data.datasets.web.seed"] == "hparams.seed"
    text = format_resolved(resolved, {"data.datasets.web.seq_len": Origin("job.yaml", 9)})
    assert re.search(r"^      seq_len: 16 +# job\.yaml:9$", text, re.MULTILINE)
    assert load_experiment_params_from_yaml(write("resolved.yaml", text)) == resolved.params
    empty = replace(data, datasets={"web": TextDataParams(seq_len=16)})
    with pytest.raises(ValueError, match=r"^data\.datasets\.web\.dataset_manifest is empty"):
        resolve(replace(PARAMS, data=empty), FACTS)


def test_every_field_of_every_section_has_a_comment_for_the_help() -> None:
    from vla_foundry.config import schema

    def check(cls: type) -> None:
        # other tests register types of their own
        members = [member for member in schema.concrete_classes(cls) if member.__module__.startswith("vla_foundry.")]
        for member in members:
            for name, hint in schema.field_types(member).items():
                section = schema.section_class(hint)
                if section is None:
                    assert schema.field_comments(member)[name], f"{member}.{name}"
                else:
                    check(section)

    check(TrainExperimentParams)


def test_a_name_too_long_for_a_file_system_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name is 300 bytes long\. Use at most 200\."):
        replace(PARAMS, name="é" * 150)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.num_workers 1e6", r"data\.num_workers \(1000000\) must be at least 0 and at most 1024"),
        ("--model.n_layers 1e9", r"model\.n_layers \(1000000000\) must be at least 1 and at most 10000"),
        ("--model.hidden_dim 1e12", r"model\.hidden_dim \(1000000000000\) must be at least 1 and at most 1000000"),
        ("--model.vocab_size 1e12", r"model\.vocab_size \(1000000000000\) must be at least 0 and at most 100000000"),
        ("--data.seq_len 1e10", r"data\.seq_len \(10000000000\) must be"),
        ("--data.prefetch_factor 1e9", r"data\.prefetch_factor \(1000000000\) must be"),
        ("--hparams.per_gpu_batch_size 1e10", r"hparams\.per_gpu_batch_size \(10000000000\) must be"),
        ("--model.max_seq_len 1e9", r"model\.max_seq_len \(1000000000\) must be"),
        (
            "--model.resume_weights_only true",
            r"model\.resume_weights_only is true, but there is no checkpoint\. G",
        ),
        (
            "--model.n_layers 1e4 --model.hidden_dim 1e6 --model.n_heads 1e4",
            r"model has about 1e\+17 weights, more than any machine can train",
        ),
    ],
)
def test_what_no_run_can_hold_or_do_is_refused_when_the_config_is_resolved(words: str, message: str) -> None:
    data = ["--data.type", "text", "--data.dataset_manifest", "a/manifest.jsonl", "--data.seq_len", "16"]
    rest = ["--model.type", "transformer", "--total_train_samples", "512", "--hparams.warmup", "0.0", *words.split()]
    with pytest.raises(ValueError, match=message) as caught:
        resolve(parse(TrainExperimentParams, [*data, *rest], prog="train").params, FACTS)
    assert "\n" not in str(caught.value)


def test_the_least_memory_of_a_run_is_that_of_weights_gradients_moments_and_rows() -> None:
    weights = sum(count_weights(PARAMS.model))
    per_weight, rows = 4 * 4 * weights, 2 * 4 * 16 * 96 * 8
    assert find_lack_of_memory(PARAMS, 1, None) is None
    assert find_lack_of_memory(PARAMS, 1, per_weight + rows) is None
    lack = find_lack_of_memory(PARAMS, 1, per_weight + rows - 1)
    assert lack is not None
    assert lack.startswith("One rank needs at least ")
    sharded = replace(PARAMS, distributed=DistributedParams(fsdp=True))
    assert find_lack_of_memory(sharded, 8, per_weight // 8 + rows) is None
    averaged = replace(PARAMS, ema=EMAParams(enabled=True))
    assert find_lack_of_memory(averaged, 1, per_weight + rows) is not None
    frozen = replace(PARAMS, model=replace(PARAMS.model, freeze=True))
    assert find_lack_of_memory(frozen, 1, 4 * weights + rows) is None


@pytest.mark.parametrize(
    "preset", ["transformer_11m", "transformer_100m", "vlm_11m", "vit_tiny", "vit_paligemma", "transformer_tiny"]
)
def test_the_counted_weights_are_almost_those_of_the_model(preset: str) -> None:
    from vla_foundry.models import create_model

    params = load_params_from_yaml(ModelParams, f"config_presets/models/{preset}.yaml")
    if isinstance(params, VLMParams):
        params = replace(params, image_token_id=1)
    with torch.device("meta"):
        model = create_model(params, load_pretrained=False)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert 0.75 * real <= sum(count_weights(params)) <= real


@pytest.mark.parametrize(("num_steps", "warmup"), [(5, 0), (400, 40), (9_999, 999), (50_000, 1000)])
def test_a_warm_up_that_is_not_set_fits_into_the_run(num_steps: int, warmup: int) -> None:
    params = replace(PARAMS, hparams=replace(PARAMS.hparams, warmup=None), total_train_samples=8 * num_steps)
    facts = replace(FACTS, datasets=(dataset(num_samples=8 * num_steps),))
    for given in (params, replace(params, total_train_samples=None, num_epochs=1)):
        resolved = resolve_known(given, facts)
        assert resolved.params.hparams.warmup == warmup
        notice = [f"hparams.warmup is {warmup} steps, a tenth of the run."] if warmup < 1000 else []
        assert [line for line in resolved.notices if "warmup" in line] == notice


def test_a_budget_below_the_batch_names_the_nearest_values() -> None:
    with pytest.raises(ValueError, match=r"Use --total_train_samples 8, or --hparams\.global_batch_size 4\.$"):
        resolve(replace(PARAMS, total_train_samples=7), FACTS)
    with pytest.raises(ValueError, match=r"Use --total_train_samples 8\.$"):
        resolve(replace(PARAMS, total_train_samples=3), FACTS)
