"""Facts about the machine and the data that values are derived from, besides the params."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vla_foundry.config.schema import Unavailable
from vla_foundry.robotics.spec import DatasetSpec, NamedSpec
from vla_foundry.text.tokenizers import Vocabulary

# means and standard deviations of colours that differ by less are the same, rounded
_SAME_COLOR = 1e-3


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
class ImageFacts:
    """How an image processor prepares images."""

    # subtracted from red, green and blue in 0 .. 1, which are then divided by `std`
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # (height, width) of its images; None: it varies
    size: tuple[int, ...] | None = None
    # side of its patches, pixels; None: it does not cut patches
    patch_size: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImageFacts | None":
        """Read our own processor's config or a Hugging Face image processor's; None: it is neither."""
        config = config.get("image_processor", config)
        if not config.get("image_mean") or not config.get("image_std"):
            return None
        size = config.get("image_size") or (config.get("crop_size") if config.get("do_center_crop", True) else None)
        size = size or config.get("size")
        if isinstance(size, Mapping):
            size = (size["height"], size["width"]) if {"height", "width"} <= size.keys() else None
        is_normalized = config.get("do_normalize", True)
        return cls(
            mean=tuple(config["image_mean"]) if is_normalized else (0.0, 0.0, 0.0),
            std=tuple(config["image_std"]) if is_normalized else (1.0, 1.0, 1.0),
            size=(size, size) if isinstance(size, int) else None if size is None else tuple(size),
            patch_size=config.get("patch_size"),
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "ImageFacts":
        """Return the facts from their JSON form."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        return cls(**values)

    def find_difference(self, other: "ImageFacts") -> tuple[str, Any, Any] | None:
        """Return (what, its value here, its value there) of the first difference beyond rounding, or None."""
        for key in ("mean", "std", "size", "patch_size"):
            own, others = getattr(self, key), getattr(other, key)
            if key in ("mean", "std"):
                is_same = len(own) == len(others) and all(
                    abs(a - b) < _SAME_COLOR for a, b in zip(own, others, strict=True)
                )
            else:
                is_same = None in (own, others) or own == others
            if not is_same:
                return key, own, others
        return None


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
class ChunkFacts:
    """The chunks of actions that an action tokenizer is for."""

    num_steps: int
    action_dim: int
    # names of the fields, in the order of their columns
    fields: tuple[str, ...]
    # how the actions were normalized; empty: unknown
    normalization: str = ""


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
    # how the processor that the data names prepares images; None: it names none, or the files are out of reach
    images: ImageFacts | None = None
    # checkpoint or published model that provides weights for images -> its image processor; None: it keeps none
    weights_images: dict[str, ImageFacts | None] = field(default_factory=dict)
    # processor/ or tokenizer/ of that run, if data with images names neither
    started_from: TokenizerFacts | None = None
    # published model -> its config.json, as far as it is on this machine
    model_configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    # dataset spec of that run's robot data, and the run's folder
    started_from_robotics: NamedSpec | None = None
    # field -> how that run or checkpoint normalizes it (RoboticsNormalizer.state); None: it does not say
    started_from_normalization: dict[str, Any] | None = None
    # field -> how the data's statistics normalize it; None: unknown
    normalization: dict[str, Any] | None = None
    # checkpoint of a model or part -> the model config in its run, as written; {}: it has none within reach
    checkpoint_configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    # checkpoint of a model part -> params of the model trained in its run
    checkpoint_models: dict[str, Any] = field(default_factory=dict)
    # file of a FAST tokenizer -> the chunks that it is for
    action_tokenizers: "dict[str, ChunkFacts]" = field(default_factory=dict)
    # dataset of a mixture -> what is known if it were the run's only one; the facts above are the main dataset's
    parts: "dict[str, Facts]" = field(default_factory=dict)
