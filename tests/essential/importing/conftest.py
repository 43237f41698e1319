"""Runs of the earlier implementation: the published ones, and one of a robot policy as it was saved with its data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vla_foundry.config.decode import Decoding, decode
from vla_foundry.config.loading import dump_value
from vla_foundry.config.yaml_source import parse_inline
from vla_foundry.models import create_model
from vla_foundry.params import ModelParams

PROPRIOCEPTION = ["robot__actual__poses__left::panda__xyz", "robot__actual__grippers__left::panda_hand", "speed"]
ACTIONS = [f"robot__action__poses__left::panda__{name}_relative" for name in ("xyz", "rot_6d")]
ACTIONS += ["robot__action__grippers__left::panda_hand"]
ACTION_DIM = 10
CAMERAS = ["scene_right_0", "wrist_left_plus"]
NUM_TOKENS = 257
IMAGE_TOKEN = 200
# a vision-language model that a policy starts from
VLM: dict[str, Any] = {
    "type": "vlm",
    "image_token_id": IMAGE_TOKEN,
    "processor": None,
    "vit": {
        "type": "vit",
        "hidden_dim": 16,
        "inter_dim": 32,
        "patch_size": 14,
        "img_size": 56,
        "n_heads": 2,
        "n_layers": 1,
        "pretrained": None,
        "projector_pixel_shuffle_factor": 2,
    },
    "transformer": {
        "type": "transformer",
        "hidden_dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "vocab_size": NUM_TOKENS,
        "max_seq_len": 96,
    },
}


@pytest.fixture
def parity(shared_data: Path) -> Path:
    """The folder of published checkpoints and what was recorded of them."""
    return shared_data / "parity"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer whose words w0, w1, ... are its ids, but for `<eos>`, `<unk>` and `<image>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {0: "<eos>", 1: "<unk>", IMAGE_TOKEN: "<image>"}
    backend = Tokenizer(models.WordLevel({words.get(id, f"w{id}"): id for id in range(NUM_TOKENS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Metaspace(replacement=" ", prepend_scheme="never")
    folder = tmp_path / "tokenizer"
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def save_source() -> Callable[..., None]:
    """Saves a run that has a model config and weights: (folder, model section, state_dict)."""
    return _save_source


@pytest.fixture
def language_source(tmp_path: Path) -> Path:
    """A language model's folder without config.yaml."""
    torch.manual_seed(0)
    params = create_params(ModelParams, VLM["transformer"])
    state = create_model(params, load_pretrained=False).state_dict()
    for number in range(2):
        state[f"layers.{number}.attention.pos_embed.inv_freq"] = torch.ones(4)
    _save_source(tmp_path / "sources" / "llm", VLM["transformer"], state)
    return tmp_path / "sources" / "llm"


@pytest.fixture
def policy_source(tmp_path: Path) -> Path:
    """A policy's whole folder: config, statistics, normalizer, preprocessing, and its vision-language model beside."""
    folder, vlm = tmp_path / "sources" / "policy", tmp_path / "sources" / "vlm"
    vlm.mkdir(parents=True)
    (vlm / "config_model.yaml").write_text(yaml.safe_dump(VLM), encoding="utf-8")
    model = create_policy_config()
    save_policy(folder, model)
    (folder / "config.yaml").write_text(yaml.safe_dump(create_config(model)), encoding="utf-8")
    (folder / "stats.json").write_text(json.dumps(create_statistics()), encoding="utf-8")
    (folder / "config_normalizer.yaml").write_text(
        yaml.safe_dump(create_config(model)["data"]["normalization"]), encoding="utf-8"
    )
    preprocessing = {
        "type": "spartan",
        "camera_names": CAMERAS,
        "image_indices": [-1, 0],
        "past_lowdim_steps": 2,
        "future_lowdim_steps": 16,
        "resize_images_size": [56, 56],
        "image_resizing_method": "CENTER_CROP",
        "padding_strategy": "copy",
    }
    (folder / "preprocessing_config.yaml").write_text(yaml.safe_dump(preprocessing), encoding="utf-8")
    return folder


@pytest.fixture
def change_checkpoint() -> Callable[..., None]:
    """Changes what a checkpoint holds."""

    def change(folder: Path, edit: Callable[[dict[str, Any]], None], name: str = "checkpoint_1.pt") -> None:
        path = folder / "checkpoints" / name
        content = torch.load(path, weights_only=True)
        edit(content)
        torch.save(content, path)

    return change


def create_policy_config() -> dict[str, Any]:
    """The model section of a small policy."""
    backbone = {
        "type": "vlm_foundry_backbone",
        "num_vlm_layers_to_use": 2,
        "vlm_experiment_dir": "../vlm",
        "resume_from_checkpoint": "../vlm/checkpoints/checkpoint_1.pt",
        "freeze": False,
    }
    head = {"type": "transformer", "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 16, "is_causal": True}
    return {
        "type": "diffusion_policy",
        "vision_language_backbone": backbone,
        "transformer": head,
        "noise_scheduler": {"num_timesteps": 20, "clamp_range": [-1.5, 1.5], "beta_start": 1e-4, "beta_end": 0.02},
        "use_diffusers_scheduler": False,
        "use_flow_matching_scheduler": True,
        "input_noise_std": 0.05,
        "diffusion_step_conditioning": "add",
        "num_action_head_repeats": 8,
        "action_dim": ACTION_DIM,
        "proprioception_dim": 5,
    }


def save_policy(folder: Path, config: dict[str, Any]) -> None:
    """Save a policy with new weights, by the names that the earlier implementation had."""
    torch.manual_seed(0)
    backbone = {key: value for key, value in config["vision_language_backbone"].items() if key != "vlm_experiment_dir"}
    backbone |= {"vlm": VLM, "resume_from_checkpoint": None}
    params = create_params(ModelParams, {**config, "vision_language_backbone": backbone})
    state: dict[str, torch.Tensor] = {}
    weights = create_model(params, load_pretrained=False).state_dict()
    token = weights.pop("vision_language_backbone.observation_token")
    for name, value in weights.items():
        inner = name.removeprefix("vision_language_backbone.model.")
        if inner.startswith("transformer.") and inner.endswith(("embeddings.weight", "output.weight")):
            value = torch.cat((value, token[None]))
        old = name.removeprefix("action_head.") if inner == name else f"vision_language_backbone._model.{inner}"
        state[old] = value
    state |= {"transformer.norm.weight": torch.ones(16), "sinusoidal_position_embeddings.emb": torch.ones(8)}
    _save_source(folder, config, state)


def _save_source(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config_model.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    torch.save({"global_step": 7, "state_dict": state}, folder / "checkpoints" / "checkpoint_1.pt")


def create_params(cls: Any, values: dict[str, Any]) -> Any:
    return decode(cls, parse_inline(dump_value(values)), Decoding(root=cls))


def create_config(model: dict[str, Any]) -> dict[str, Any]:
    """Every key that the earlier implementation wrote for a policy."""
    field = {"method": "percentile_1_99", "scope": "per_timestep", "epsilon": 0.01, "enabled": True}
    return {
        "name": "foundry_vla",
        "resolve_configs": False,
        "resolve_configs_path": None,
        "save_path": None,
        "wandb": True,
        "db_logging": True,
        "wandb_entity": None,
        "wandb_project_name": "vla_foundry",
        "wandb_tags": [],
        "log_every_n_steps": 20,
        "log_level": "INFO",
        "remote_sync": "s3://someone/models",
        "remote_sync_fixed_path": "s3://your-bucket/your-path/vla_foundry_models_fixed/",
        "total_train_samples": 102400,
        "num_epochs": None,
        "num_checkpoints": 5,
        "max_checkpoint_limit": None,
        "total_val_samples": None,
        "val_every_n_checkpoints": 1,
        "data": create_data(field),
        "distributed": {
            "dist_url": "env://",
            "dist_backend": "nccl",
            "fsdp": True,
            "fsdp_cpu_offload": False,
            "fsdp_reshard_after_forward": False,
            "ddp_static_graph": False,
            "use_distributed": True,
            "world_size": 8,
            "rank": 0,
            "local_rank": 0,
            "device": "cuda:0",
        },
        "ema": {
            "enabled": False,
            "type": "ema",
            "alpha": 0.999,
            "update_after_step": 0,
            "inv_gamma": 1.0,
            "power": 0.75,
            "min_value": 0.0,
            "max_value": 0.9999,
        },
        "hparams": {
            "precision": "amp_bfloat16",
            "global_batch_size": 1024,
            "per_gpu_batch_size": 16,
            "seed": 42,
            "lr": 5e-5,
            "lr_scheduler": "cosine",
            "warmup": "1000",
            "decay": "0.3",
            "lr_cooldown_end": 0.0,
            "force_min_lr": 0.0,
            "optimizer": "adamw",
            "wd": 0.01,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "loss_function": "mse",
            "z_loss_coefficient": 0.0,
            "grad_clip_norm": 1.0,
            "world_size": 8,
            "grad_checkpointing": False,
            "torchcompile": False,
        },
        "model": model,
    }


def create_data(field: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "robotics",
        "dataset_manifest": ["s3://someone/data/manifest.jsonl"],
        "dataset_weighting": [1.0],
        "dataset_modality": ["robotics"],
        "val_dataset_manifest": [],
        "val_dataset_weighting": [],
        "allow_multiple_epochs": True,
        "num_workers": 8,
        "prefetch_factor": 8,
        "seq_len": 2048,
        "shuffle": True,
        "shuffle_buffer_size": 2000,
        "shuffle_initial": 500,
        "use_hf_fast_tokenizer": True,
        "hf_fast_tokenizers_parallelism": True,
        "hf_fast_tokenizer_rayon_threads": None,
        "dataloader_in_order": False,
        "dataset_cache": {"enabled": False, "cache_dir": None, "cache_size_gb": None, "cache_verbose": None},
        "seed": 42,
        "dataset_statistics": [None],
        "val_dataset_statistics": [],
        "processor": "simple_vlm",
        "processor_kwargs": {},
        "img_num_tokens": 4,
        "image_size": 56,
        "max_text_seq_len": None,
        "language_instruction_types": ["original", "randomized"],
        "camera_names": CAMERAS,
        "image_indices": [],
        "image_names": [f"{camera}_t{index}" for index in (-1, 0) for camera in CAMERAS],
        "pad_missing_images": False,
        "mask_padded_images": False,
        "proprioception_fields": PROPRIOCEPTION,
        "tactile_fields": [],
        "action_fields": ACTIONS,
        "pose_groups": [
            {
                "name": "left_action",
                "position_key": "robot__action__poses__left::panda__xyz",
                "rotation_key": "robot__action__poses__left::panda__rot_6d",
            }
        ],
        "intrinsics_fields": [],
        "extrinsics_fields": [],
        "use_point_cloud": False,
        "point_cloud_num_points": 4096,
        "normalization": {
            "enabled": True,
            "method": "percentile_1_99",
            "scope": "per_timestep",
            "epsilon": 0.01,
            "include_fields": [*PROPRIOCEPTION, *ACTIONS],
            "centered_norm": True,
            "lowdim_past_timesteps": 2,
            "lowdim_future_timesteps": 16,
            "field_configs": {
                **dict.fromkeys([*PROPRIOCEPTION, *ACTIONS], field),
                # found by a part of the name, and by no field
                "gripper": {**field, "method": "min_max"},
            },
        },
        "augmentation": {
            "enabled": True,
            "image": {
                "color_jitter": {
                    "enabled": True,
                    "brightness": 0.2,
                    "contrast": 0.4,
                    "saturation": 0.2,
                    "hue": [-0.05, 0.05],
                },
                "random_crop": {"enabled": False, "shape": [56, 56], "mode": "random"},
            },
        },
        "lowdim_past_timesteps": 1,
        "lowdim_future_timesteps": 14,
        "action_dim": ACTION_DIM,
        "proprioception_dim": 5,
    }


def create_statistics() -> dict[str, Any]:
    """Statistics of 19 steps (2 past, 16 future) as they were merged: without sketches."""
    random, found = np.random.default_rng(0), {}
    widths = dict(zip([*PROPRIOCEPTION, *ACTIONS], [3, 1, 1, 3, 6, 1], strict=True))
    # what a robot senses and is told, of which relative poses are made
    widths |= {f"robot__{who}__poses__left::panda__rot_6d": 6 for who in ("actual", "action")}
    widths["robot__action__poses__left::panda__xyz"] = 3
    for name, width in widths.items():
        values = random.normal(size=(50, 19, width)) * 0.2
        entry: dict[str, Any] = {"count": [50] * 19, "percentile_sample_count": None, "tdigest_state": None}
        for suffix, axes in (("", (0, 1)), ("_per_timestep", (0,))):
            entry |= {f"mean{suffix}": values.mean(axes), f"std{suffix}": values.std(axes)}
            entry |= {f"min{suffix}": values.min(axes), f"max{suffix}": values.max(axes)}
            for percentile in (1, 2, 5, 95, 98, 99):
                entry[f"percentile_{percentile}{suffix}"] = np.percentile(values, percentile, axis=axes)
        found[name] = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in entry.items()}
    return found
