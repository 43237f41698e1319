"""The migrations table: new names of old keys and values, what they imply, or why they are ignored."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vla_foundry.config.decode import find_text
from vla_foundry.config.schema import Migration, Retyped, register_migrations
from vla_foundry.config.tree import Branch, Leaf, Node, merge, place
from vla_foundry.config.values import decode_value
from vla_foundry.config.yaml_source import load_mapping
from vla_foundry.params.data.mixture import write_out_mixture
from vla_foundry.run_folder import MODEL_CONFIG_NAME
from vla_foundry.storage.uri import is_remote, join_uri, parent_uri

_RUNTIME = "it is read from the launcher when a run starts"
_LOADER = "the order of the data no longer depends on it"
_TOKENIZER_THREADS = "set TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS instead"
_LEGACY_ONLY = "only legacy checkpoints need it"
_HEAD_DEFAULTS = {"time_encoding": ("mlp",), "final_norm": ("true",)}
_FLOW_DEFAULTS = {
    "noise.num_timesteps": ("null",),
    "noise.clamp_range": ("null",),
    "noise.sampling_time_shift": ("0", "0.0"),
}
# keys of a section that start it from weights or freeze them
_STARTS = ("resume_from_checkpoint", "resume_weights_only", "freeze")
# sections and switches that only a policy of the earlier implementation has
_EARLIER_POLICY = ("use_flow_matching_scheduler", "use_diffusers_scheduler", "transformer", "noise_scheduler")
_VIT_KEYS = (
    *("hidden_dim", "inter_dim", "patch_size", "img_size", "n_heads", "n_layers", "dropout", "ln_eps", "cls_flag"),
    *("interpolation_mode", "pretrained", "projector_pixel_shuffle_factor"),
)
# keys of a clip_backbone alone
_CLIP_KEYS = ("disable_text", "freeze_text_encoder", "freeze_image_encoder")
_RESIZING_METHODS = ("center_crop", "resize_no_crop", "resize_fit")
# precisions that rounded attention keys, and with them the rotary frequencies, to bf16
BF16_PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "pure_bf16")
_ROUNDED = "rope_bf16_frequencies"
# beside a published policy: model config of the vision-language model that it started from
_VLM_CONFIG_NAME = "vlm_config_model.yaml"


def _imply_policy(tree: Branch, path: str) -> dict[str, Any]:
    """Return what a policy of the earlier implementation did where its config says nothing."""
    flow, diffusers = (
        isinstance(node := tree.children.get(f"use_{name}_scheduler"), Leaf)
        and decode_value(bool, node.value, f"{path}.use_{name}_scheduler", node.origin)
        for name in ("flow_matching", "diffusers")
    )
    if diffusers:
        raise ValueError(f"{path}.use_diffusers_scheduler: such policies could never be trained. Set it to false.")
    head_type = find_text(tree, "action_head.type")
    if head_type is not None and _EARLIER_POLICY[0] in tree.children and flow != ("flow" in head_type):
        raise ValueError(
            f"{path}.{_EARLIER_POLICY[0]} contradicts {path}.action_head.type '{head_type}'. Change one of them."
        )
    if head_type is not None or not any(key in tree.children for key in _EARLIER_POLICY):
        return {}
    num_times = find_text(tree, "action_head.noise.num_timesteps") or find_text(tree, "noise_scheduler.num_timesteps")
    num_times = (num_times or "1000").replace("_", "")
    head = {
        "type": "legacy_flow_transformer" if flow else "legacy_ddpm_transformer",
        "transformer.vocab_size": "0",
        "time_conditioning": "concat",
        "time_encoding": "table",
        "final_norm": "false",
        "noise.type": "legacy_flow" if flow else "legacy_ddpm",
        "noise.num_timesteps": num_times,
        "noise.clamp_range": "[-1.5, 1.5]",
    }
    if not flow:
        head |= {"noise.target": "velocity", "noise.beta_schedule": "linear"}
    elif num_times.isdigit() and int(num_times) > 0:
        head["noise.sampling_time_shift"] = str(1 / int(num_times))
    backbone = tree.children.get("vision_language_backbone")
    keys = backbone.children if isinstance(backbone, Branch) else {}
    kind = find_text(tree, "vision_language_backbone.type")
    implied = {f"action_head.{key}": value for key, value in head.items()}
    if kind == "vlm_foundry_backbone" or (kind is None and "vlm_experiment_dir" in keys):
        implied["vision_language_backbone.final_norm"] = "false"
    elif kind == "clip_backbone" or (kind is None and any(key in keys for key in _CLIP_KEYS)):
        implied["vision_language_backbone.text_norm_before_projection"] = "true"
    return implied


def _imply_vlm(tree: Branch, path: str) -> dict[str, Any]:
    """Return the architecture of the vision-language model that an earlier policy started from, from its files."""
    given = tree.children.get("vlm_experiment_dir")
    if given is None or find_text(tree, "vlm") is not None:
        return {}
    folder = None if given.origin.line is None else parent_uri(given.origin.source)
    names = [find_text(tree, key) for key in ("vlm_experiment_dir", _STARTS[0])]
    names = [None if name == "null" else name for name in names]
    places = list(vlm_config_places(folder, *names))
    for location in places:
        try:
            return {"vlm": _without_starts(load_mapping(location))}
        except FileNotFoundError:
            continue
    if names[0] is not None:
        raise FileNotFoundError(f"{given.origin.prefix}{path}.vlm_experiment_dir: there is no {' nor '.join(places)}.")
    return {}


def _imply_rounded_frequencies(tree: Branch, path: str) -> dict[str, Any]:
    """Return which transformers of an earlier run rounded their rotary frequencies, as training in bf16 did."""
    model, precision = tree.children.get("model"), find_text(tree, "hparams.precision")
    # only configs that the earlier implementation saved say what this was
    is_saved = find_text(tree, "hparams.world_size") is not None
    if not is_saved or precision not in BF16_PRECISIONS or not isinstance(model, Branch):
        return {}
    implied = {}
    backbone = model.children.get("vision_language_backbone")
    if isinstance(backbone, Branch) and (vlm := _imply_vlm(backbone, "model.vision_language_backbone").get("vlm")):
        implied["model.vision_language_backbone.vlm"] = vlm
        model = merge(model, place(("vision_language_backbone", "vlm"), vlm))
    return implied | {f"{found}.{_ROUNDED}": "true" for found in list_rounded_transformers(model, "model", precision)}


def list_rounded_transformers(tree: Node, path: str, precision: str | None) -> list[str]:
    """Return the config paths of the native transformers that training in bf16 gave rounded rotary frequencies.

    Args:
        precision: that of the run, under its earlier name; None: only known to be bf16.
    """
    if not isinstance(tree, Branch):
        return []
    below = (list_rounded_transformers(node, f"{path}.{key}", precision) for key, node in tree.children.items())
    inner = [found for paths in below for found in paths]
    # under autocast, query and key norms ran in fp32, and so the rotary tables stayed fp32
    has_fp32_norm = "lp_layer_norm" not in (find_text(tree, "norm_type") or "")
    has_fp32_keys = has_fp32_norm and find_text(tree, "qk_norm") in ("true", "True")
    in_fp32 = has_fp32_keys and precision != "pure_bf16"
    is_rotary = find_text(tree, "positional_embedding_type") in (None, "rotary")
    return inner + ([path] if find_text(tree, "type") == "transformer" and is_rotary and not in_fp32 else [])


def vlm_config_places(folder: str | None, experiment: str | None, checkpoint: str | None) -> Iterator[str]:
    """Return where the config of the vision-language model may be that an earlier policy started from.

    Args:
        folder: folder of the policy's config; None: it is not in a file.
        experiment: the policy's vlm_experiment_dir.
        checkpoint: the checkpoint that its backbone started from.
    """
    if folder is not None:
        yield join_uri(folder, _VLM_CONFIG_NAME)
    for start in (experiment, None if checkpoint is None else parent_uri(parent_uri(checkpoint))):
        if not start:
            continue
        # names in a config are relative to its folder or to the original working directory
        if folder is not None and not is_remote(start) and not is_remote(folder):
            yield os.path.normpath(os.path.join(folder, start, MODEL_CONFIG_NAME))
        yield join_uri(start, MODEL_CONFIG_NAME)


def _without_starts(tree: Branch) -> Branch:
    children = {key: _without_starts(node) if isinstance(node, Branch) else node for key, node in tree.children.items()}
    return replace(tree, children={key: node for key, node in children.items() if key not in _STARTS})


# by dataclass name; subclasses inherit their bases' migrations
MIGRATIONS: dict[str, Migration] = {
    "TrainExperimentParams": Migration(
        ignored={
            "db_logging": "there is no database to log to",
            "remote_sync_fixed_path": "remote_sync is the one place that a run is copied to",
        },
        values={"save_path": {"null": None}},
        implied=_imply_rounded_frequencies,
    ),
    "DataParams": Migration(
        written_out=write_out_mixture,
        ignored={
            "shuffle_initial": _LOADER,
            "dataloader_in_order": _LOADER,
            "use_hf_fast_tokenizer": "tokenizers are always fast ones",
            "hf_fast_tokenizers_parallelism": _TOKENIZER_THREADS,
            "hf_fast_tokenizer_rayon_threads": _TOKENIZER_THREADS,
        },
    ),
    "DatasetCacheParams": Migration(
        ignored={
            "enabled": "remote shards are always cached",
            "cache_verbose": "the cache reports through the log",
        },
        values={"cache_size_gb": {"null": None}},
    ),
    "HyperParams": Migration(
        ignored={
            "world_size": _RUNTIME,
            "loss_function": "the model's batch handler decides the loss",
        },
        values={
            "precision": {
                "amp": "amp_bfloat16",
                "amp_bf16": "amp_bfloat16",
                "bf16": "amp_bfloat16",
                "bfloat16": "amp_bfloat16",
                "float32": "fp32",
                "float64": "fp64",
            },
            "lr_scheduler": {"const": "constant", "wsd": "warmup_constant_decay"},
        },
    ),
    "DistributedParams": Migration(
        ignored={
            "world_size": _RUNTIME,
            "rank": _RUNTIME,
            "local_rank": _RUNTIME,
            "device": _RUNTIME,
            "use_distributed": _RUNTIME,
            "ddp_static_graph": "it never had an effect",
        },
    ),
    "RoboticsDataParams": Migration(
        ignored={
            "image_names": "camera_names and image_indices determine it",
            "tactile_fields": "it never had an effect",
            "use_point_cloud": "it never had an effect",
            "point_cloud_num_points": "it never had an effect",
        },
    ),
    "RoboticsPreprocessParams": Migration(
        ignored={
            "output_dir_fixed_path": "output_dir is the one place that is written to",
            "auto_tag": "nothing is tagged or pushed; the output records the commit",
            "skip_git_tagging": "nothing is tagged or pushed; the output records the commit",
            "ray_num_cpus": "num_workers limits the parallel tasks",
            "db_logging": "there is no database to log to",
        },
        values={"image_resizing_method": {name.upper(): name for name in _RESIZING_METHODS}},
    ),
    "ModelParams": Migration(
        retyped={"diffusion_policy": Retyped(to="regression_policy", when={"action_head.type": ("regression",)})}
    ),
    "DiffusionPolicyParams": Migration(
        renamed={
            "transformer": "action_head.transformer",
            "noise_scheduler": "action_head.noise",
            "diffusion_step_conditioning": "action_head.time_conditioning",
            "input_noise_std": "action_head.input_noise_std",
            "num_action_head_repeats": "action_head.num_action_head_repeats",
        },
        ignored={
            "use_flow_matching_scheduler": "action_head.type chooses the noise process",
            "use_diffusers_scheduler": "action_head.type chooses the noise process",
            "transformer.vocab_size": "an action head has no vocabulary",
            "noise_scheduler.type": "action_head.noise.type chooses the noise process",
            **{f"noise_scheduler.{key}": "a noise process has no weights" for key in _STARTS},
        },
        implied=_imply_policy,
    ),
    "BackboneParams": Migration(ignored={"resume_weights_only": "a backbone starts from weights alone"}),
    "VLMFoundryBackboneParams": Migration(
        ignored={"vlm_experiment_dir": "vlm holds the architecture, resume_from_checkpoint the weights"},
        implied=_imply_vlm,
    ),
    "ViTBackboneParams": Migration(renamed={key: f"vit.{key}" for key in _VIT_KEYS}),
    "ActionHeadParams": Migration(
        retyped={
            "flow_transformer": Retyped(to="legacy_flow_transformer", unless={**_HEAD_DEFAULTS, **_FLOW_DEFAULTS}),
            "ddpm_transformer": Retyped(to="legacy_ddpm_transformer", unless=_HEAD_DEFAULTS),
        }
    ),
    "TransformerParams": Migration(ignored={"attn_name": "there is one attention kernel for each device"}),
    "DenoisingHeadParams": Migration(
        ignored={"time_encoding": _LEGACY_ONLY, "final_norm": _LEGACY_ONLY},
        values={"time_conditioning": {"adaptive_norm": "adaln_zero"}, "num_action_head_repeats": {"null": None}},
    ),
    "FlowParams": Migration(
        ignored={
            **dict.fromkeys(("clamp_range", "num_timesteps", "sampling_time_shift"), _LEGACY_ONLY),
            **dict.fromkeys(("beta_start", "beta_end"), "flow matching has no betas"),
        }
    ),
    "ImageAugmentationParams": Migration(renamed={"random_crop": "crop"}),
    "ViTParams": Migration(ignored={"pretrained": "it never had an effect"}),
    "ViTHFParams": Migration(ignored={"hidden_dim": "the published config has it"}),
    "VLMParams": Migration(ignored={"processor": "data.processor names it"}),
}

register_migrations(MIGRATIONS)
