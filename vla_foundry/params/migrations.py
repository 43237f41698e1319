"""The one table of names and values that earlier versions wrote: what they are called now, or why they are ignored."""

from vla_foundry.config.schema import Migration, register_migrations

_RUNTIME = "it is read from the launcher when a run starts"
_LOADER = "the order of the data no longer depends on it"
_TOKENIZER_THREADS = "set TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS instead"


# by name of the dataclass; a subclass has its bases' migrations too
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
            "image_names": "camera_names and image_indices tell them",
            "tactile_fields": "it never had an effect",
            "use_point_cloud": "it never had an effect",
            "point_cloud_num_points": "it never had an effect",
        },
    ),
    "ImageAugmentationParams": Migration(renamed={"random_crop": "crop"}),
    "ViTParams": Migration(ignored={"pretrained": "it never had an effect"}),
    "VLMParams": Migration(ignored={"processor": "data.processor names it"}),
}

register_migrations(MIGRATIONS)
