"""Training configs on disk: what earlier versions wrote, sections of whole runs, exact round trips."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config.command_line import parse
from vla_foundry.config.loading import read_params
from vla_foundry.config.resolve import resolve_known
from vla_foundry.params import (
    DataParams,
    HyperParams,
    ModelParams,
    TrainExperimentParams,
    dump_params,
    load_experiment_params_from_yaml,
    load_params_from_yaml,
)
from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.legacy import LegacyDDPMParams, LegacyFlowParams
from vla_foundry.params.models.transformer import TransformerHFParams, TransformerParams
from vla_foundry.params.models.vit import ViTParams
from vla_foundry.params.models.vlm import VLMParams

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
    assert params.model == TransformerParams(rope_bf16_frequencies=True)


def test_what_has_no_effect_any_more_is_said_by_name_with_a_reason(write: Write) -> None:
    (notice,) = read_params(TrainExperimentParams, write("config.yaml", REFERENCE_CONFIG)).notices
    for name in ("db_logging", "remote_sync_fixed_path", "data.shuffle_initial", "hparams.world_size"):
        assert f"{name} (" in notice
    for name in ("rank", "local_rank", "device", "use_distributed", "world_size", "ddp_static_graph"):
        assert f"distributed.{name} (" in notice
    assert notice.startswith("as in the earlier implementation, model.rope_bf16_frequencies is true; without effect: ")


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
    # trained in bf16
    rounded = TransformerParams(rope_bf16_frequencies=True)
    assert load_params_from_yaml(ModelParams, path) == load_params_from_yaml(TransformerParams, path) == rounded
    parsed = read_params(HyperParams, path, TrainExperimentParams)
    assert parsed.params.global_batch_size == 512
    assert not any("rope" in notice for notice in parsed.notices)
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


# the policy sections of the earlier implementation's presets
EARLIER_NOISE = "noise_scheduler: {num_timesteps: 1000, beta_start: 0.0001, beta_end: 0.02, clamp_range: [-3.0, 3.0]}"
EARLIER_POLICIES = {
    "vla_diffusion_11m": f"""
type: diffusion_policy
vision_language_backbone: {{type: vlm_backbone, hf_pretrained: HuggingFaceTB/SmolVLM2-256M-Video-Instruct,
  num_vlm_layers_to_use: 1}}
transformer: {{<<: !include config_presets/models/transformer_tiny.yaml, is_causal: false}}
{EARLIER_NOISE}
use_flow_matching_scheduler: true
""",
    "vla_diffusion_1b": f"""
type: diffusion_policy
vision_language_backbone: {{type: vlm_foundry_backbone, num_vlm_layers_to_use: 4}}
transformer: {{<<: !include config_presets/models/transformer_100m.yaml, is_causal: false}}
{EARLIER_NOISE}
use_flow_matching_scheduler: true
""",
    "vla_smolvlm_foundry_backbone": """
type: diffusion_policy
num_action_head_repeats: 8
input_noise_std: 0.05
diffusion_step_conditioning: add
vision_language_backbone: {type: vlm_foundry_backbone, num_vlm_layers_to_use: 4}
transformer: {<<: !include config_presets/models/transformer_410m.yaml, vocab_size: 0}
noise_scheduler: {num_timesteps: 1000, clamp_range: [-1.5, 1.5]}
use_flow_matching_scheduler: true
""",
    # no type of the backbone, and of the noise only the range
    "lbm_hparams_4cams": """
type: diffusion_policy
input_noise_std: 0.05
vision_language_backbone: {hf_pretrained: openai/clip-vit-base-patch32, disable_text: false,
  freeze_text_encoder: false, freeze_image_encoder: false}
transformer: {<<: !include config_presets/models/transformer_410m.yaml, is_causal: true}
noise_scheduler: {clamp_range: [-1.5, 1.5]}
use_flow_matching_scheduler: true
""",
    # a preset of ours below
    "diffusion_policy_bellpepper": """
<<: !include config_presets/models/diffusion_policy.yaml
vision_language_backbone: {freeze_text_encoder: true}
transformer: {is_causal: true}
noise_scheduler: {clamp_range: [-2, 2]}
""",
}


@pytest.mark.parametrize("name", EARLIER_POLICIES)
def test_an_earlier_policy_preset_trains_what_it_trained(write: Write, name: str) -> None:
    parsed = read_params(ModelParams, write("model.yaml", EARLIER_POLICIES[name]))
    head, backbone = parsed.params.action_head, parsed.params.vision_language_backbone
    assert (head.type, head.time_encoding, head.final_norm) == ("legacy_flow_transformer", "table", False)
    assert (head.conditioning, head.transformer.vocab_size, head.noise.num_timesteps) == ("tokens", 0, 1000)
    assert head.time_conditioning == ("add" if "smolvlm" in name else "concat")
    assert (head.num_action_head_repeats, head.input_noise_std) == {
        "vla_smolvlm_foundry_backbone": (8, 0.05),
        "lbm_hparams_4cams": (1, 0.05),
    }.get(name, (1, 0.0))
    assert head.transformer.is_causal == (name[:13] != "vla_diffusion")
    expected_range = {"diff": (-2.0, 2.0), "vla_d": (-3.0, 3.0)}
    assert head.noise.clamp_range == next((r for n, r in expected_range.items() if name.startswith(n)), (-1.5, 1.5))
    assert getattr(backbone, "final_norm", False) is False
    assert getattr(backbone, "text_norm_before_projection", True) is True
    (notice,) = parsed.notices
    assert (
        "transformer is called action_head.transformer now; noise_scheduler is called action_head.noise now" in notice
    )


def parse_train(*words: str) -> Any:
    return parse(TrainExperimentParams, ["--data.type", "text", *words], prog="train")


def earlier_flags(values: dict[str, object]) -> list[str]:
    return [word for flag, value in values.items() for word in (f"--model.{flag}", str(value))]


# every flag that a policy of the earlier implementation had, besides those that its sections still have
EARLIER_FLAGS = {
    **{f"transformer.{key}": value for key, value in {
        "type": "transformer", "freeze": False, "resume_from_checkpoint": "null", "resume_weights_only": False,
        "norm_type": "rms_norm", "ffn_type": "gelu", "qk_norm": True, "positional_embedding_type": "none",
        "attn_name": "auto", "hidden_dim": 64, "n_layers": 3, "n_heads": 2, "vocab_size": 50432,
        "post_embed_norm": True, "norm_eps": 1e-6, "weight_tying": True, "cast_output_to_float32": True,
        "max_seq_len": 99, "is_causal": False}.items()},
    **{f"noise_scheduler.{key}": value for key, value in {
        "type": "noise_scheduler", "freeze": False, "resume_from_checkpoint": "null", "resume_weights_only": False,
        "num_timesteps": 50, "beta_start": 0.001, "beta_end": 0.01, "clamp_range": "[-2, 2]"}.items()},
    "use_diffusers_scheduler": False,
    "input_noise_std": 0.05,
    "diffusion_step_conditioning": "add",
    "num_action_head_repeats": 4,
}  # fmt: skip
EARLIER_VIT = {
    "type": "vit_backbone", "freeze": True, "resume_from_checkpoint": "null", "resume_weights_only": False,
    "pretrained": "null", "interpolation_mode": "bilinear", "hidden_dim": 32, "inter_dim": 48, "patch_size": 8,
    "img_size": 64, "n_heads": 2, "dropout": 0.1, "n_layers": 3, "ln_eps": 1e-5, "cls_flag": True,
    "projector_pixel_shuffle_factor": 2,
}  # fmt: skip


@pytest.mark.parametrize("uses_flow", [True, False])
def test_every_flag_of_an_earlier_policy_is_understood(uses_flow: bool) -> None:
    vit = {f"vision_language_backbone.{key}": value for key, value in EARLIER_VIT.items()}
    words = earlier_flags({**EARLIER_FLAGS, **vit, "use_flow_matching_scheduler": uses_flow})
    parsed = parse_train("--model.type", "diffusion_policy", *words)
    head, backbone = parsed.params.model.action_head, parsed.params.model.vision_language_backbone
    assert head.transformer == TransformerParams(
        norm_type="rms_norm", ffn_type="gelu", qk_norm=True, positional_embedding_type="none", hidden_dim=64,
        n_layers=3, n_heads=2, vocab_size=0, post_embed_norm=True, norm_eps=1e-6, weight_tying=True,
        cast_output_to_float32=True, max_seq_len=99, is_causal=False,
    )  # fmt: skip
    assert (head.input_noise_std, head.time_conditioning, head.num_action_head_repeats) == (0.05, "add", 4)
    assert backbone.freeze
    assert backbone.vit == ViTParams(
        interpolation_mode="bilinear", hidden_dim=32, inter_dim=48, patch_size=8, img_size=64, n_heads=2, dropout=0.1,
        n_layers=3, ln_eps=1e-5, cls_flag=True, projector_pixel_shuffle_factor=2,
    )  # fmt: skip
    noise = {"num_timesteps": 50, "clamp_range": (-2.0, 2.0)}
    assert head.noise == (
        LegacyFlowParams(**noise, sampling_time_shift=0.02)
        if uses_flow
        else LegacyDDPMParams(**noise, target="velocity", beta_schedule="linear", beta_start=0.001, beta_end=0.01)
    )
    assert len(parsed.notices) == 1


def test_old_and_new_names_of_one_value(write: Write) -> None:
    policy = write("policy.yaml", EARLIER_POLICIES["vla_smolvlm_foundry_backbone"])
    include = ("--model", f"include {policy}")
    # the command line overrides a file, whatever names they use
    for flag in ("transformer.hidden_dim", "action_head.transformer.hidden_dim"):
        assert parse_train(*include, f"--model.{flag}", "512").params.model.action_head.transformer.hidden_dim == 512
    times = parse_train(*include, "--model.action_head.noise.num_timesteps", "50").params.model.action_head.noise
    assert (times.num_timesteps, times.sampling_time_shift) == (50, 0.02)
    noise = write("noise.yaml", "num_timesteps: 20\n")
    head = parse_train(*include, "--model.noise_scheduler", f"include {noise}").params.model.action_head
    assert (head.noise.num_timesteps, head.noise.sampling_time_shift) == (20, 0.05)
    preset = ("--model", "include vla_foundry/config_presets/models/diffusion_policy.yaml")
    larger = ("--model.transformer", "include vla_foundry/config_presets/models/transformer_410m.yaml")
    head = parse_train(*preset, *larger, "--model.transformer.n_layers", "2").params.model.action_head
    assert (head.transformer.hidden_dim, head.transformer.n_layers, head.transformer.is_causal) == (1024, 2, False)
    two = ("--model.transformer.n_layers", "2", "--model.action_head.transformer.n_layers", "3")
    with pytest.raises(ValueError, match=r"model\.transformer\.n_layers is the old name of model\.action_head\.trans"):
        parse_train(*include, *two)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("use_diffusers_scheduler", "true"),
            r"use_diffusers_scheduler: such policies could never be trained\. Set it",
        ),
        (("use_flow_matching_scheduler", "maybe"), r"use_flow_matching_scheduler must be true or false, got 'maybe'"),
        (("transformer.hidden_dims", "4"), r"model\.action_head\.transformer\.hidden_dims is unknown"),
        (("noise_scheduler.num_timesteps", "0"), r"action_head\.noise\.num_timesteps \(0\) must be at least 1"),
        (
            ("noise_scheduler.num_timesteps", "many"),
            r"action_head\.noise\.num_timesteps must be a whole number or null, got",
        ),
        (("noise_scheduler", "5"), r"model\.action_head\.noise must be a mapping of keys, got '5'"),
        (("vision_language_backbone.type", "unet"), r"vision_language_backbone\.type 'unet' is unknown"),
        (("vision_language_backbone.vlm_experiment_dir", "nowhere"), r"vlm_experiment_dir: there is no nowhere/config"),
    ],
)
def test_an_earlier_policy_that_cannot_be_meant(write: Write, words: tuple[str, str], message: str) -> None:
    policy = write("policy.yaml", EARLIER_POLICIES["vla_diffusion_1b"])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse_train("--model", f"include {policy}", f"--model.{words[0]}", words[1])
    head = ("--model.action_head.type", "ddpm_transformer", "--model.use_flow_matching_scheduler", "true")
    with pytest.raises(ValueError, match=r"use_flow_matching_scheduler contradicts model\.action_head\.type 'ddpm_tr"):
        parse_train("--model.type", "diffusion_policy", *head)


def test_a_policy_finds_its_vision_language_model(write: Write) -> None:
    vlm = "type: vlm\nprocessor: null\nimage_token_id: 7\nfreeze: true\nvit: {type: vit, freeze: true}\n"
    vlm += "transformer: {type: transformer, n_layers: %d, resume_from_checkpoint: s3://b/llm/checkpoints/c.pt}\n"
    policy = EARLIER_POLICIES["vla_diffusion_1b"].replace("_use: 4", "_use: 4, vlm_experiment_dir: %s")
    write("vlm/config_model.yaml", vlm % 5)
    path = write("run/config_model.yaml", policy % "../vlm")
    found: Any = load_params_from_yaml(ModelParams, path)
    assert found.vision_language_backbone.vlm == VLMParams(
        vit=ViTParams(), transformer=TransformerParams(n_layers=5), image_token_id=7
    )
    # a published policy has it beside
    write("run/vlm_config_model.yaml", vlm % 6)
    for given in ("null", "s3://someone/vlm"):
        found = load_params_from_yaml(ModelParams, write("run/config_model.yaml", policy % given))
        assert found.vision_language_backbone.vlm.transformer.n_layers == 6
    given = ("--model.vision_language_backbone.vlm_experiment_dir", str(Path(path).parents[1] / "vlm"))
    params = parse_train("--model", f"include {write('other/policy.yaml', policy % 'null')}", *given).params
    assert params.model.vision_language_backbone.vlm.transformer.n_layers == 5


def test_an_earlier_preprocessing_config_is_read(write: Write) -> None:
    text = """
type: lerobot
source_episodes: [a]
output_dir: b
output_dir_fixed_path: s3://your-bucket/your-path/vla_foundry_datasets_fixed/
auto_tag: true
skip_git_tagging: false
ray_num_cpus: null
db_logging: false
image_resizing_method: RESIZE_FIT
camera_rotations: null
observation_keys: [observation.state]
"""
    parsed = read_params(RoboticsPreprocessParams, write("preprocessing_config.yaml", text))
    assert parsed.params.image_resizing_method == "resize_fit"
    (notice,) = parsed.notices
    for name in ("output_dir_fixed_path", "auto_tag", "skip_git_tagging", "ray_num_cpus", "db_logging"):
        assert f"{name} (" in notice


def test_an_image_encoder_without_an_owner_is_timms() -> None:
    words = ("--model.type", "vlm", "--model.transformer.n_layers", "1", "--model.vit.hf_pretrained")
    for name, expected in {
        "vit_base_patch16_siglip_224": "timm:vit_base_patch16_siglip_224",
        "timm:vit_tiny": "timm:vit_tiny",
        "google/siglip-base-patch16-224": "google/siglip-base-patch16-224",
        "hf://google/siglip-base-patch16-224": "hf://google/siglip-base-patch16-224",
    }.items():
        params = parse_train(*words, name, "--model.vit.img_size", "224", "--total_train_samples", "512").params
        resolved = resolve_known(replace(params, data=TextDataParams(dataset_manifest=["m"])), Facts())
        assert resolved.params.model.vit.hf_pretrained == expected
        assert any("read as timm:" in notice for notice in resolved.notices) == (name != expected)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--model.type", "transformer", "--model.vit.hidden_dim", "8"), r"vlm has it \(--model\.type vlm\)"),
        (("--model.type", "vit", "--model.transformer.n_layers", "8"), r"vlm(, diffusion_policy)? has it"),
        (("--model.type", "vlm", "--model.n_layers", "8"), r"transformer, vit has it \(--model\.type transformer"),
    ],
)
def test_a_section_of_another_model_is_named_with_the_models_that_have_it(words: tuple[str, ...], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_train(*words)


def test_sections_of_another_type_are_not_taken_for_old_names() -> None:
    """A vision-language model has a transformer; so had earlier policies, as their action head."""
    preset, policy = "config_presets/training_jobs/vlm_quickstart.yaml", "config_presets/models/vla_11m.yaml"
    parsed = parse_train("--config_path", preset, "--model", f"include {policy}")
    assert parsed.params.model.action_head == load_params_from_yaml(ModelParams, policy).action_head
    (notice,) = (notice for notice in parsed.notices if "model.t" in notice)
    assert notice.endswith("dropped model.image_attention, model.vit, model.transformer, which belong to another type.")
    head = parse_train("--config_path", preset, "--model.type", "diffusion_policy").params.model.action_head
    assert head.registered_name() == "flow_transformer"


def test_what_an_earlier_head_was_given_does_not_bring_its_type_back() -> None:
    preset = "config_presets/training_jobs/vla_qwen3_st.yaml"
    head = parse_train("--config_path", preset, "--model.action_head.type", "flow_transformer").params.model.action_head
    assert head.registered_name() == "flow_transformer"


def test_a_type_can_change_twice_over_presets() -> None:
    preset = "config_presets/training_jobs/vla_qwen3_st.yaml"
    parsed = parse_train("--config_path", preset, "--model.vision_language_backbone.type", "clip_backbone")
    (notice,) = (notice for notice in parsed.notices if "clip_backbone" in notice)
    for key in ("vlm", "final_norm", "num_vlm_layers_to_use"):
        assert f"model.vision_language_backbone.{key}" in notice


# the commands of the paper
MANIFEST = ["--data.dataset_manifest", '["s3://B/P/manifest.jsonl"]', "--data.dataset_weighting", "[1.0]"]
BUDGET = ["--total_train_samples", "14_000_000", "--num_checkpoints", "5", "--hparams.per_gpu_batch_size"]


def test_the_commands_of_the_paper() -> None:
    words = ["--model", "include vla_foundry/config_presets/models/vlm_3b.yaml"]
    words += ["--model.vit", "include vla_foundry/config_presets/models/vit_paligemma.yaml"]
    words += ["--data.type", "image_caption", "--data.processor", "google/paligemma-3b-pt-224", *MANIFEST]
    words += ["--data.dataset_modality", '["image_caption"]', "--data.img_num_tokens", "256", *BUDGET, "2"]
    words += ["--hparams.global_batch_size", "64", "--remote_sync", "s3://B/P/run"]
    vlm = parse(TrainExperimentParams, words, prog="train").params
    assert (vlm.model.transformer.hidden_dim, vlm.model.vit.hidden_dim, vlm.remote_sync) == (2048, 1152, "s3://B/P/run")
    words = ["--model.type", "transformer", "--model", "include vla_foundry/config_presets/models/transformer_11m.yaml"]
    words += ["--distributed.fsdp", "True", "--data.type", "text", *MANIFEST, "--data.dataset_modality", '["text"]']
    words += ["--data.seq_len", "2048", *BUDGET, "8", "--hparams.global_batch_size", "512"]
    llm: Any = parse(TrainExperimentParams, words, prog="train").params
    assert (llm.model, llm.distributed.fsdp, llm.data.dataset_weighting) == (TransformerParams(), True, [1.0])
    assert llm.data.dataset_manifest == ["s3://B/P/manifest.jsonl"]
