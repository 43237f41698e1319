"""Params of a mixture: named datasets of several types, mixed into every batch of one run."""

from dataclasses import dataclass, field, replace
from typing import Any

from vla_foundry.config.schema import Count, Derived, MissingError, Positive
from vla_foundry.params.data.base import DataParams, register_data_params
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.facts import Facts
from vla_foundry.robotics.fields import Window


@register_data_params("mixture")
@dataclass(frozen=True, kw_only=True)
class MixtureDataParams(DataParams):
    """Named datasets, each with its own type and params."""

    # the datasets by name; each has all params of its type
    datasets: dict[str, DataParams] = field(default_factory=dict)
    # relative share of each dataset in the samples of a run; none: equal shares
    weights: dict[str, Positive] = field(default_factory=dict)
    # a dataset's samples in a global batch are a multiple of this; null: num_ranks x hparams.per_gpu_batch_size. To
    # continue on another number of ranks, give the old value
    modality_block: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, part in self.datasets.items():
            if isinstance(part, MixtureDataParams):
                raise ValueError(f"datasets.{name}.type is mixture. A mixture cannot be a part of another.")
            if not name.isidentifier():
                raise ValueError(f"datasets has the name '{name}'. Use letters, digits and _.")
        unknown = [name for name in self.weights if name not in self.datasets]
        missing = [name for name in self.datasets if name not in self.weights]
        if unknown:
            raise ValueError(f"weights has '{unknown[0]}', which is not one of datasets: {', '.join(self.datasets)}.")
        if self.weights and missing:
            raise ValueError(f"weights lacks '{missing[0]}'. Give a weight for each of datasets, or none (null).")
        if self.dataset_manifest or self.val_dataset_manifest:
            name = "dataset_manifest" if self.dataset_manifest else "val_dataset_manifest"
            raise ValueError(f"{name} goes into a dataset of the mixture: --data.datasets.NAME.{name}.")

    def shares(self) -> dict[str, float]:
        """Return each dataset's share of the samples; they sum to 1."""
        weights = self.weights or dict.fromkeys(self.datasets, 1.0)
        return {name: weights[name] / sum(weights.values()) for name in self.datasets}

    def main_dataset(self) -> str | None:
        """Return the name of the dataset that the model is made for: the first of robots, else of images, else of all.

        Its tokenizer or processor is the run's.
        """
        order = (RoboticsDataParams, ImageProcessorParams, DataParams)
        return next((name for kind in order for name, part in self.datasets.items() if isinstance(part, kind)), None)

    def main(self) -> DataParams:
        """Return the main dataset."""
        name = self.main_dataset()
        return self if name is None else self.datasets[name]

    def num_val_samples(self, total: int | None) -> dict[str, int | None]:
        """Return how many samples of each dataset to validate on; None: the dataset has no validation data."""
        has = [name for name, part in self.datasets.items() if part.val_dataset_manifest]
        shares = self.shares()
        whole = sum(shares[name] for name in has)
        return {
            name: max(1, round(total * shares[name] / whole)) if total is not None and name in has else None
            for name in self.datasets
        }

    def part_of(self, root: Any, name: str) -> Any:
        """Return the whole config as one dataset sees it: as if it were the run's only one."""
        samples = root.total_train_samples
        return replace(
            root,
            data=self.datasets[name],
            total_train_samples=None if samples is None else max(1, int(samples * self.shares()[name])),
            total_val_samples=self.num_val_samples(root.total_val_samples)[name],
        )

    def view(self, root: Any, facts: Facts, name: str, key: str | None) -> tuple[Any, Facts]:
        """Return what a dataset derives its values from and is checked against."""
        if name != "datasets" or key is None:
            return root, facts
        return self.part_of(root, key), facts.parts[key]

    def tokenizer_name(self) -> str | None:
        """Return the tokenizer of the main dataset."""
        return None if self.main() is self else self.main().tokenizer_name()

    def robot_widths(self) -> dict[str, int | None]:
        """Return `action_dim` and `proprioception_dim` of the widest robot; narrower ones are padded."""
        widths = [part.robot_widths() for part in self.datasets.values() if part.robot_widths()]
        names = widths[0] if widths else {}
        found = {name: [width[name] for width in widths] for name in names}
        return {name: None if None in values else max(values) for name, values in found.items()}  # pyright: ignore

    def has_language(self) -> bool:
        """Return whether a dataset is of text or captions."""
        return any(not isinstance(part, RoboticsDataParams) for part in self.datasets.values())

    def robot_window(self) -> Window | None:
        """Return the steps of a sample, on which all robots agree; None: not known yet."""
        windows = [window for part in self.datasets.values() if (window := part.robot_window()) is not None]
        return windows[0] if windows else None

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive the seed, the block, and the common widths of the robots, once each has its own."""
        derived = {}
        widths = {name: width for name, width in self.robot_widths().items() if width is not None}
        if widths:
            robots = {name: part for name, part in self.datasets.items() if part.robot_widths()}
            padded: dict[str, Any] = {f"padded_{name}": width for name, width in widths.items()}
            wide = {name: replace(part, **padded) for name, part in robots.items()}
            derived["datasets"] = Derived(self.datasets | wide, "the widest robot")
        if self.seed is None:
            derived["seed"] = Derived(root.hparams.seed, "hparams.seed")
        if self.modality_block is None:
            block = facts.world_size * root.hparams.per_gpu_batch_size
            derived["modality_block"] = Derived(block, "num_ranks x hparams.per_gpu_batch_size")
        if not self.weights and self.datasets:
            derived["weights"] = Derived(dict.fromkeys(self.datasets, 1.0), "equal weights")
        return derived

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that there are datasets, that blocks divide the batch, and that robots agree on the window."""
        if not self.datasets:
            raise MissingError(f"{path}.datasets is empty. Give --{path}.datasets.NAME.type and its params.")
        block, batch = self.modality_block, root.hparams.global_batch_size
        unit = facts.world_size * root.hparams.per_gpu_batch_size
        if block is not None and (block % unit or batch % block):
            raise ValueError(
                f"{path}.modality_block ({block}) must be a multiple of num_ranks ({facts.world_size}) x "
                f"hparams.per_gpu_batch_size ({root.hparams.per_gpu_batch_size}) = {unit}, and divide "
                f"hparams.global_batch_size ({batch})."
            )
        if root.total_val_samples is not None and not any(self.num_val_samples(1).values()):
            raise ValueError(
                f"total_val_samples ({root.total_val_samples}) needs data. Give --{path}.datasets.NAME."
                "val_dataset_manifest FOLDER/manifest.jsonl, or --total_val_samples null."
            )
        windows = {name: part.robot_window() for name, part in self.datasets.items()}
        known = {name: window for name, window in windows.items() if window is not None}
        (first, window), *others = known.items() or (("", None),)
        for name, other in others:
            if other != window:
                raise ValueError(
                    f"{path}.datasets.{name} has a window of {other}, and {first} one of {window}. Give both the same "
                    "lowdim_past_timesteps and lowdim_future_timesteps."
                )
        return []
