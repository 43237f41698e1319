"""What values are derived from besides the params: facts about the machine and the data."""

from dataclasses import dataclass, field
from typing import Any

from vla_foundry.config.schema import Unavailable
from vla_foundry.robotics.spec import DatasetSpec, NamedSpec


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """What is known about a tokenizer."""

    # its folder or name
    name: str
    # 1 + its largest token id, the image token's among them where data has images
    vocab_size: int
    # the token that an image's features replace; None: it has none
    image_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What is known about one dataset."""

    # its manifest
    manifest: str
    # samples in one pass over it
    num_samples: int | Unavailable
    # what the part `dataset` of its provenance.json says (vocab_size, seq_len, ...); empty if there is none
    provenance: dict[str, Any]
    # its own tokenizer folder, if it has one
    tokenizer: TokenizerFacts | None = None
    # what it holds and what its numbers mean, if it is robot data
    robotics: DatasetSpec | Unavailable | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What `resolve` has to know besides the params."""

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
    # the tokenizer that the data uses: the one it names, or else the one of the run that the model starts from
    tokenizer: TokenizerFacts | None = None
    # processor/ or tokenizer/ of that run, where data with images names neither
    started_from: TokenizerFacts | None = None
    # what the robot data of that run was, and the run's folder
    started_from_robotics: NamedSpec | None = None
    # checkpoint that a part of the model starts from -> params of the model that its run trained
    checkpoint_models: dict[str, Any] = field(default_factory=dict)
