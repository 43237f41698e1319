"""Facts about the machine and the data that values are derived from, besides the params."""

from dataclasses import dataclass, field
from typing import Any

from vla_foundry.config.schema import Unavailable
from vla_foundry.robotics.spec import DatasetSpec, NamedSpec
from vla_foundry.text.tokenizers import Vocabulary


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What is known about a tokenizer."""

    # its folder or name
    name: str
    # 1 + its largest token id, including the image token if the data has images
    vocab_size: int
    # token replaced by image features; None if it has none
    image_token_id: int | None = None
    # what its ids mean; None: unknown
    vocabulary: Vocabulary | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What is known about one dataset."""

    # its manifest
    manifest: str
    # samples in one pass over it
    num_samples: int | Unavailable
    # the `dataset` section of its provenance.json (vocab_size, seq_len, ...); empty if absent
    provenance: dict[str, Any]
    # its own tokenizer folder, if it has one
    tokenizer: TokenizerFacts | None = None
    # dataset spec, for robot data
    robotics: DatasetSpec | Unavailable | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What `resolve` needs besides the params."""

    # number of processes
    world_size: int = 1
    # processes on this machine
    ranks_per_node: int = 1
    # CPU cores of this machine that this process may use
    num_cpus: int = 1
    # one per data.dataset_manifest
    datasets: tuple[DatasetFacts, ...] = ()
    # one per data.val_dataset_manifest
    val_datasets: tuple[DatasetFacts, ...] = ()
    # the data's tokenizer: the one it names, else that of the run that the model starts from
    tokenizer: TokenizerFacts | None = None
    # checkpoint or published model that provides weights for tokens -> the tokenizer kept with it; None: it keeps none
    weights_tokenizers: dict[str, TokenizerFacts | None] = field(default_factory=dict)
    # processor/ or tokenizer/ of that run, if data with images names neither
    started_from: TokenizerFacts | None = None
    # published model -> its config.json, as far as it is on this machine
    model_configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    # dataset spec of that run's robot data, and the run's folder
    started_from_robotics: NamedSpec | None = None
    # field -> how that run normalizes it (RoboticsNormalizer.state); None: the run keeps no normalizer
    started_from_normalization: dict[str, Any] | None = None
    # field -> how the data's statistics normalize it; None: unknown
    normalization: dict[str, Any] | None = None
    # checkpoint of a model part -> params of the model trained in its run
    checkpoint_models: dict[str, Any] = field(default_factory=dict)
