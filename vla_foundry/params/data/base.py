"""What every dataset's params share."""

from dataclasses import dataclass, field

from vla_foundry.params.base import BaseParams, ChoiceParams


@dataclass(frozen=True, kw_only=True)
class DatasetCacheParams(BaseParams):
    """`--data.dataset_cache.` The node's cache of remote shards."""

    # folder of the cache; null: the user's cache folder
    cache_dir: str | None = None
    # the cache is kept below this, gigabytes
    cache_size_gb: float = 100.0


@dataclass(frozen=True, kw_only=True)
class DataParams(ChoiceParams):
    """`--data.` Base of every dataset's params; the concrete class is chosen by `type`."""

    _choice_registry = {}
    choice_path = "data.type"

    # manifests (local, s3:// or hf://), one per dataset
    dataset_manifest: list[str] = field(default_factory=list)
    # modality of each dataset
    dataset_modality: list[str] = field(default_factory=list)
    # share of each dataset in every batch; any positive numbers
    dataset_weighting: list[float] = field(default_factory=list)
    # the same for validation
    val_dataset_manifest: list[str] = field(default_factory=list)
    val_dataset_modality: list[str] = field(default_factory=list)
    val_dataset_weighting: list[float] = field(default_factory=list)
    # go over a dataset more than once where the budget asks for it
    allow_multiple_epochs: bool = False
    # loader processes per rank; null: the node's cores divided by its ranks, at most 8; 0: none, load in the trainer
    num_workers: int | None = None
    # microbatches each loader process prepares ahead
    prefetch_factor: int = 4
    # longest sequence the model is trained on, tokens
    seq_len: int = 2048
    # shuffle shards and samples; false: in order of the manifest
    shuffle: bool = True
    # samples are shuffled within blocks of shards of about this many samples
    shuffle_buffer_size: int = 200_000
    # seed of the order; null: hparams.seed
    seed: int | None = None
    # the run stops when more than this share of samples is broken or dropped
    max_bad_fraction: float = 0.01
    # go on although the order of the data has changed since the checkpoint
    accept_changed_data: bool = False
    dataset_cache: DatasetCacheParams = field(default_factory=DatasetCacheParams)
