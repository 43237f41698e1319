"""The migrations table: new names of old keys and values, or why they are ignored."""

from vla_foundry.config.schema import Migration, Retyped, register_migrations

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


# by dataclass name; subclasses inherit their bases' migrations
MIGRATIONS: dict[str, Migration] = {
    "TrainExperimentParams": Migration(
        ignored={
            "db_logging": "there is no database to log to",
            "remote_sync_fixed_path": "remote_sync is the one place that a run is copied to",
        },
        values={"save_path": {"null": None}},
    ),
    "DataParams": Migration(
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
    "ModelParams": Migration(
        retyped={"diffusion_policy": Retyped(to="regression_policy", when={"action_head.type": ("regression",)})}
    ),
    "ActionHeadParams": Migration(
        retyped={
            "flow_transformer": Retyped(to="legacy_flow_transformer", unless={**_HEAD_DEFAULTS, **_FLOW_DEFAULTS}),
            "ddpm_transformer": Retyped(to="legacy_ddpm_transformer", unless=_HEAD_DEFAULTS),
        }
    ),
    "TransformerParams": Migration(ignored={"attn_name": "there is one attention kernel for each device"}),
    "DenoisingHeadParams": Migration(
        ignored={"time_encoding": _LEGACY_ONLY, "final_norm": _LEGACY_ONLY},
        values={"time_conditioning": {"adaptive_norm": "adaln_zero"}},
    ),
    "FlowParams": Migration(
        ignored=dict.fromkeys(("clamp_range", "num_timesteps", "sampling_time_shift"), _LEGACY_ONLY)
    ),
    "ImageAugmentationParams": Migration(renamed={"random_crop": "crop"}),
    "ViTParams": Migration(ignored={"pretrained": "it never had an effect"}),
    "VLMParams": Migration(ignored={"processor": "data.processor names it"}),
}

register_migrations(MIGRATIONS)
