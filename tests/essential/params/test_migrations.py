"""Training configs on disk: what earlier versions wrote, sections of whole runs, exact round trips."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vla_foundry.config.loading import read_params
from vla_foundry.params import (
    DataParams,
    HyperParams,
    ModelParams,
    TrainExperimentParams,
    dump_params,
    load_experiment_params_from_yaml,
    load_params_from_yaml,
)
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.models.transformer import TransformerHFParams, TransformerParams

Write = Callable[[str, str], str]

# what an earlier version saved for a language model: its runtime fields, old names of values, quoted numbers
REFERENCE_CONFIG = """
data: {allow_multiple_epochs: false, dataloader_in_order: false, dataset_cache: {cache_dir: null, cache_size_gb: null,
  cache_verbose: null, enabled: false}, dataset_manifest: ['s3://bucket/dclm/manifest.jsonl'], dataset_modality: [text],
  dataset_weighting: [1.0], hf_fast_tokenizer_rayon_threads: null, hf_fast_tokenizers_parallelism: true, num_workers: 8,
  prefetch_factor: 4, seed: 42, seq_len: 2048, shuffle: true, shuffle_buffer_size: 2000, shuffle_initial: 500,
  type: text, use_hf_fast_tokenizer: true, val_dataset_manifest: [], val_dataset_weighting: []}
db_logging: true
distributed: {ddp_static_graph: false, device: 'cuda:0', dist_backend: nccl, dist_url: 'env://', fsdp: true,
  fsdp_cpu_offload: false, fsdp_reshard_after_forward: false, local_rank: 0, rank: 0, use_distributed: true,
  world_size: 64}
ema: {alpha: 0.999, enabled: false, inv_gamma: 1.0, max_value: 0.9999, min_value: 0.0, power: 0.75, type: ema,
  update_after_step: 0}
hparams: {beta1: 0.9, beta2: 0.95, decay: '0.3', eps: 1.0e-08, force_min_lr: 0.0, global_batch_size: 512,
  grad_checkpointing: false, grad_clip_norm: 1.0, loss_function: cross_entropy, lr: 0.0001, lr_cooldown_end: 0.0,
  lr_scheduler: const, optimizer: adamw, per_gpu_batch_size: 8, precision: amp_bf16, seed: 42, torchcompile: false,
  warmup: '1000', wd: 0.01, world_size: 64, z_loss_coefficient: 0.0}
log_every_n_steps: 20
log_level: INFO
max_checkpoint_limit: null
model: {attn_name: torch_attn, cast_output_to_float32: false, ffn_type: swiglu, freeze: false, hidden_dim: 96,
  is_causal: true, max_seq_len: 2048, n_heads: 4, n_layers: 8, norm_eps: 1.0e-05, norm_type: default_layer_norm,
  positional_embedding_type: rotary, post_embed_norm: false, qk_norm: false, resume_from_checkpoint: null,
  resume_weights_only: false, type: transformer, vocab_size: 50432, weight_tying: false}
name: llm
num_checkpoints: 5
num_epochs: null
remote_sync: null
remote_sync_fixed_path: s3://your-bucket/your-path/
resolve_configs: false
resolve_configs_path: null
save_path: null
total_train_samples: 14000000
total_val_samples: null
val_every_n_checkpoints: 1
wandb: true
wandb_entity: null
wandb_project_name: vla_foundry
wandb_tags: []
"""


def test_a_config_that_an_earlier_version_saved_loads(write: Write) -> None:
    params = load_experiment_params_from_yaml(write("config.yaml", REFERENCE_CONFIG))
    assert (params.hparams.precision, params.hparams.lr_scheduler) == ("amp_bfloat16", "constant")
    assert (params.hparams.warmup, params.hparams.decay) == (1000.0, 0.3)
    assert (params.save_path, params.total_train_samples, params.distributed.fsdp) == ("experiments", 14_000_000, True)
    assert params.data.dataset_cache.cache_size_gb == 100.0
    assert params.model == TransformerParams()


def test_what_has_no_effect_any_more_is_said_by_name_with_a_reason(write: Write) -> None:
    (notice,) = read_params(TrainExperimentParams, write("config.yaml", REFERENCE_CONFIG)).notices
    for name in ("db_logging", "remote_sync_fixed_path", "data.shuffle_initial", "hparams.world_size"):
        assert f"{name} (" in notice
    for name in ("rank", "local_rank", "device", "use_distributed", "world_size", "ddp_static_graph"):
        assert f"distributed.{name} (" in notice
    assert notice.startswith("without effect: ")


@pytest.mark.parametrize("place", ["\nfree: 1\n", "data: {free: 1}", "hparams: {free: 1}", "model: {free: 1}"])
def test_a_key_that_never_was_is_an_error_on_loading_too(write: Write, place: str) -> None:
    path = write("config.yaml", f"data: {{type: text}}\nmodel: {{type: transformer}}\n{place}".replace("\n\n", "\n"))
    if place.startswith(("data", "model")):
        path = write("config.yaml", place.replace("{", "{type: %s, " % ("text" if "data" in place else "transformer")))
    with pytest.raises(ValueError, match=r"config\.yaml:\d: (\w+\.)?free is unknown"):
        load_experiment_params_from_yaml(path)


@pytest.mark.parametrize(
    ("old", "new"), [("amp", "amp_bfloat16"), ("bf16", "amp_bfloat16"), ("float32", "fp32"), ("pure_bf16", "pure_bf16")]
)
def test_old_names_of_precisions_mean_the_new_ones(write: Write, old: str, new: str) -> None:
    assert load_params_from_yaml(HyperParams, write("h.yaml", f"precision: {old}\n")).precision == new


def test_a_whole_runs_config_gives_the_section_that_is_asked_for(write: Write) -> None:
    path = write("config.yaml", REFERENCE_CONFIG)
    assert load_params_from_yaml(ModelParams, path) == TransformerParams()
    assert load_params_from_yaml(TransformerParams, path) == TransformerParams()
    assert load_params_from_yaml(HyperParams, path).global_batch_size == 512
    assert load_params_from_yaml(DataParams, path).type == "text"


def test_a_file_of_the_section_alone_gives_it_too(write: Write) -> None:
    assert load_params_from_yaml(HyperParams, write("hparams.yaml", "lr: 2\n")).lr == 2.0
    model = write("config_model.yaml", "type: transformer\nhidden_dim: 8\n")
    assert load_params_from_yaml(ModelParams, model) == TransformerParams(hidden_dim=8)
    with pytest.raises(ValueError, match=r"config_model\.yaml:1: type is 'transformer', not 'transformer_hf'"):
        load_params_from_yaml(TransformerHFParams, model)


@pytest.mark.shared_data
def test_a_published_model_config_loads(shared_data: Path) -> None:
    path = shared_data / "parity" / "transformer_base" / "config_model.yaml"
    params = load_params_from_yaml(ModelParams, str(path))
    assert params == TransformerParams(hidden_dim=48, n_layers=3, n_heads=4, max_seq_len=64, vocab_size=257)


def test_every_value_survives_being_saved_and_loaded(write: Write) -> None:
    params = TrainExperimentParams(
        name="1e5",
        plugins=["json"],
        wandb_tags=["null", "none", "~", "yes", "1_000", "a: b", "", " x", "ünï", "12:30:45", "2026-01-01", "0x1f"],
        total_train_samples=10**17,
        data=TextDataParams(dataset_manifest=["s3://b/m.jsonl"], dataset_weighting=[1e-7], seed=None),
        model=TransformerHFParams(hf_pretrained="None"),
        hparams=HyperParams(lr=1.2345678901234567e-5, warmup=0.1, grad_clip_norm=1e20),
    )
    assert load_experiment_params_from_yaml(write("config.yaml", dump_params(params))) == params
