"""The base class of all data params."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from vla_foundry.config.schema import (
    BaseParams,
    Bounds,
    ChoiceParams,
    Count,
    Derived,
    Fraction,
    Int,
    Location,
    MissingError,
    NumTokens,
    NumWorkers,
    Positive,
    Size,
    register_choice,
)
from vla_foundry.params.data.stages import StageParams, order_stages
from vla_foundry.params.facts import Facts
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import Window

_MOST_WORKERS = 8
NEEDS_MANIFEST = (
    "sequential_shards cannot be part of {}. Give dataset_manifest; `vla-foundry manifest build FOLDER` writes one."
)

T = TypeVar("T", bound=type)


def register_data_params(name: str) -> Callable[[T], T]:
    """Register a dataclass as the params of the data type `name`."""
    return register_choice(name)


@dataclass(frozen=True, kw_only=True)
class DatasetCacheParams(BaseParams):
    """`--data.dataset_cache.` How remote shards are read, and the node's cache of them."""

    # shards: download each shard whole, and keep it; ranges: read only the bytes of the samples, where a shard has an
    # index; its checksum is not checked then
    mode: Literal["shards", "ranges"] = "shards"
    # folder of the cache; null: the user's cache folder
    cache_dir: Location | None = None
    # largest size of the cache, gigabytes
    cache_size_gb: Annotated[float, Bounds(above=0, most=10**9)] = 100.0


@dataclass(frozen=True, kw_only=True)
class DataParams(ChoiceParams):
    """`--data.` The training data and how to read it; `type` selects the kind of data."""

    _choice_registry = {}
    choice_path = "data.type"
    # modalities that datasets of this type may have; the first is the default
    modalities: ClassVar[tuple[str, ...]] = ()

    # manifests (local, s3://, hf:// or https://), one per dataset
    dataset_manifest: list[Location] = field(default_factory=list)
    # instead of manifests: tars (paths and URIs, with braces or patterns, or folders), which are read in sequence, over
    # and over; a run that continues does not resume exactly
    sequential_shards: list[Location] = field(default_factory=list)
    # modality of each dataset
    dataset_modality: list[str] = field(default_factory=list)
    # relative weight of each dataset in every batch; any positive numbers
    dataset_weighting: list[Positive] = field(default_factory=list)
    # manifests of the validation data
    val_dataset_manifest: list[Location] = field(default_factory=list)
    # modality of each validation dataset
    val_dataset_modality: list[str] = field(default_factory=list)
    # relative weight of each validation dataset
    val_dataset_weighting: list[Positive] = field(default_factory=list)
    # repeat a dataset if the budget exceeds its size
    allow_multiple_epochs: bool = False
    # loader processes per rank; null: cores per rank on this node, at most 8; 0: load in the training process
    num_workers: NumWorkers | None = None
    # microbatches each loader process prepares ahead
    prefetch_factor: Size = 4
    # longest training sequence, tokens; longer records of tokenized text are cut into several samples
    seq_len: NumTokens = 2048
    # shuffle shards and samples; false: keep the manifest's order
    shuffle: bool = True
    # shuffle samples within blocks of shards that hold about this many samples
    shuffle_buffer_size: Count = 200_000
    # seed of the sample order; null: hparams.seed
    seed: Int | None = None
    # stop the run if more than this fraction of samples is broken or dropped
    max_bad_fraction: Fraction = 0.01
    # continue even if the order of the data has changed since the checkpoint
    accept_changed_data: bool = False
    # continue even if datasets, or the run that the model starts from, contradict each other about what is used:
    # tokenizers, robot fields, cameras
    accept_contradictions: bool = False
    dataset_cache: DatasetCacheParams = field(default_factory=DatasetCacheParams)
    # stages to insert into the pipeline of a sample, or to replace, move or remove, by name
    stages: dict[str, StageParams] = field(default_factory=dict)
    # names of the pipeline's stages in order; null: its own, with the changes of `stages`
    stage_order: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequential_shards and self.type in ("robotics", "mixture"):
            raise ValueError(NEEDS_MANIFEST.format(f"type '{self.type}'"))
        if self.sequential_shards and self.dataset_manifest:
            raise ValueError("sequential_shards and dataset_manifest are both given. Give one.")
        for prefix in ("", "val_"):
            manifests = getattr(self, f"{prefix}dataset_manifest")
            for name in (f"{prefix}dataset_modality", f"{prefix}dataset_weighting"):
                entries = getattr(self, name)
                if entries and len(entries) != len(manifests):
                    raise ValueError(
                        f"{name} has {len(entries)} entries and {prefix}dataset_manifest has {len(manifests)}. "
                        f"Give one for each manifest, or leave {name} out (null)."
                    )
            self._check_modalities(f"{prefix}dataset_modality", getattr(self, f"{prefix}dataset_modality"))
        if (self.stages or self.stage_order) and not self.modalities:
            raise ValueError("stages and stage_order belong to one dataset: --data.datasets.NAME.stages.")
        if self.default_stages():
            order_stages(self.default_stages(), self.stages, self.stage_order)

    def _check_modalities(self, name: str, modalities: list[str]) -> None:
        for modality in modalities:
            if self.modalities and modality not in self.modalities:
                fault = f"does not go with type '{self.type}'"
                known = list(self.modalities)
                raise ValueError(unknown_name_message(name, modality, known, fault=fault, listed_as="Choose from"))

    def default_stages(self) -> list[str]:
        """Return the names of the stages that data of this type goes through, in order; empty: not known here."""
        return []

    def tokenizer_name(self) -> str | None:
        """Return the tokenizer named here (name or folder), for types that have one."""
        return None

    def robot_widths(self) -> dict[str, int | None]:
        """Return `action_dim` and `proprioception_dim` (None: not known yet), for types that have them."""
        return {}

    def main(self) -> "DataParams":
        """Return the params of the data that the model is made for: these, but of a mixture one of its datasets."""
        return self

    def parts(self) -> "dict[str, DataParams]":
        """Return the datasets by name: these params alone as `data`, but of a mixture each of its own."""
        return {"data": self}

    def has_language(self) -> bool:
        """Return whether samples without a robot are among the data, for a policy to learn from too."""
        return False

    def robot_window(self) -> Window | None:
        """Return the steps of a sample, for types that have them; None: not known yet."""
        return None

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive the seed, the workers, and each dataset's modality and weight."""
        derived: dict[str, Derived] = {}
        if self.seed is None:
            derived["seed"] = Derived(root.hparams.seed, "hparams.seed")
        if self.num_workers is None:
            workers = min(_MOST_WORKERS, max(1, facts.num_cpus // facts.ranks_per_node))
            source = f"{facts.num_cpus} cores / {facts.ranks_per_node} ranks, at most {_MOST_WORKERS}"
            derived["num_workers"] = Derived(workers, source)
        if self.stage_order is None and self.default_stages():
            order = order_stages(self.default_stages(), self.stages, None)
            derived["stage_order"] = Derived(order, "data.stages" if self.stages else "data.type")
        for prefix in ("", "val_"):
            count = len(getattr(self, f"{prefix}dataset_manifest"))
            if count and not getattr(self, f"{prefix}dataset_weighting"):
                derived[f"{prefix}dataset_weighting"] = Derived([1.0] * count, "equal weights")
            if count and self.modalities and not getattr(self, f"{prefix}dataset_modality"):
                derived[f"{prefix}dataset_modality"] = Derived([self.modalities[0]] * count, "data.type")
        return derived

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that there are training datasets, and validation datasets if validation is on."""
        if not (self.dataset_manifest or self.sequential_shards):
            raise MissingError(
                f"{path}.dataset_manifest is empty. Give --{path}.dataset_manifest FOLDER/manifest.jsonl."
            )
        if self.sequential_shards and not self.allow_multiple_epochs:
            raise ValueError(
                f"{path}.sequential_shards are read over and over, for the number of their samples is not known. Give "
                f"--{path}.allow_multiple_epochs true."
            )
        if root.total_val_samples is not None and not self.val_dataset_manifest:
            raise ValueError(
                f"total_val_samples ({root.total_val_samples}) needs data. Give --{path}.val_dataset_manifest "
                "FOLDER/manifest.jsonl, or --total_val_samples null."
            )
        for name, stage in self.stages.items():
            try:
                _ = stage.load() if stage.use is not None else None
            except ValueError as error:
                raise ValueError(f"{path}.stages.{name}: {error}") from None
        for dataset in (*facts.datasets, *facts.val_datasets):
            if dataset.num_samples == 0:
                raise ValueError(f"{dataset.manifest} holds no samples. Leave it out, or make the dataset again.")
        held = [dataset.num_samples for dataset in facts.val_datasets]
        available = sum(count for count in held if isinstance(count, int))
        has_all = all(isinstance(count, int) for count in held)
        if root.total_val_samples is not None and has_all and root.total_val_samples > available:
            raise ValueError(
                f"total_val_samples ({root.total_val_samples}) must be at most the {available} samples of "
                f"{path}.val_dataset_manifest. Use --total_val_samples {available}."
            )
        inexact = f"{path}.sequential_shards have no index: a run that continues will not resume exactly."
        return [inexact] if self.sequential_shards else []
