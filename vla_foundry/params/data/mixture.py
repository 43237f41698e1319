"""Params of a mixture: named datasets of several types, mixed into every batch of one run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

from vla_foundry.config import schema
from vla_foundry.config.schema import Count, Derived, MissingError, Name, Positive
from vla_foundry.config.tree import COMMAND_LINE, TYPE_KEY, Branch, Leaf, Node, Scalar, text_of, to_value
from vla_foundry.config.values import decode_value
from vla_foundry.params.data.base import NEEDS_MANIFEST, DataParams, register_data_params
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.params.data.robotics import RoboticsDataParams, specs_of
from vla_foundry.params.facts import Facts
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.fit import find_contradictions

# keys of the mixture itself; any other key beside `datasets` is given to each dataset that has it
_OWN_KEYS = {TYPE_KEY, "datasets", "weights", "modality_block", "epochs_of", "merge_statistics", "seed"}
_LISTS = {"manifest": str, "modality": str, "weighting": float, "statistics": str}
# blocks in the longest pattern
_MOST_BLOCKS = 1 << 13
_LIST_KEYS = {f"{prefix}dataset_{name}" for prefix in ("", "val_") for name in _LISTS}


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
    # dataset whose passes num_epochs counts; null: the first of robots, else of images, else of all
    epochs_of: Name | None = None
    # normalize all robots, which have the same fields, by the statistics of all; false: each by its own
    merge_statistics: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, part in self.datasets.items():
            if isinstance(part, MixtureDataParams):
                raise ValueError(f"datasets.{name}.type is mixture. A mixture cannot be a part of another.")
            if part.sequential_shards:
                raise ValueError(f"datasets.{name}.{NEEDS_MANIFEST.format('a mixture')}")
            if not name.isidentifier():
                raise ValueError(f"datasets has the name '{name}'. Use letters, digits and _.")
        unknown = [name for name in self.weights if name not in self.datasets]
        missing = [name for name in self.datasets if name not in self.weights]
        if unknown:
            raise ValueError(f"weights has '{unknown[0]}', which is not one of datasets: {', '.join(self.datasets)}.")
        if self.weights and missing:
            raise ValueError(f"weights lacks '{missing[0]}'. Give a weight for each of datasets, or none (null).")
        if self.epochs_of is not None and self.epochs_of not in self.datasets:
            raise ValueError(unknown_name_message("epochs_of", self.epochs_of, list(self.datasets)))
        if self.dataset_manifest or self.val_dataset_manifest:
            name = "dataset_manifest" if self.dataset_manifest else "val_dataset_manifest"
            raise ValueError(f"{name} goes into a dataset of the mixture: --data.datasets.NAME.{name}.")

    def blocks(self) -> dict[str, int]:
        """Return the blocks of each dataset in the pattern that the run repeats: exactly the weights, or nearly."""
        weights = self.weights or dict.fromkeys(self.datasets, 1.0)
        return dict(zip(self.datasets, pattern_blocks([weights[name] for name in self.datasets]), strict=True))

    def shares(self) -> dict[str, float]:
        """Return each dataset's share of the samples; they sum to 1."""
        blocks = self.blocks()
        return {name: count / sum(blocks.values()) for name, count in blocks.items()}

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

    def parts(self) -> dict[str, DataParams]:
        """Return the datasets by name."""
        return dict(self.datasets)

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
        samples, batch, data = root.total_train_samples, root.hparams.global_batch_size, self.datasets[name]
        return replace(
            root,
            data=replace(data, allow_multiple_epochs=data.allow_multiple_epochs or self.allow_multiple_epochs),
            total_train_samples=None
            if samples is None
            else max(1, int(samples // batch * batch * self.shares()[name])),
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

    def robots(self) -> dict[str, RoboticsDataParams]:
        """Return the datasets of robots."""
        return {name: part for name, part in self.datasets.items() if isinstance(part, RoboticsDataParams)}

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
        """Return the steps that hold a sample of any robot; None: not known yet. A batch has the steps of its robot."""
        windows = [window for part in self.datasets.values() if (window := part.robot_window()) is not None]
        if not windows:
            return None
        return Window(max(window.past for window in windows), max(window.future for window in windows))

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive the seed, the block, and the common widths of the robots, once each has its own."""
        derived = {}
        widths = {name: width for name, width in self.robot_widths().items() if width is not None}
        if widths:
            robots = self.robots()
            if self.merge_statistics and all(part.robot_window() for part in robots.values()):
                robots = self.merge_robots(robots)
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
        """Check that there are datasets, that blocks divide the batch, and that there is data to validate on."""
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
        samples = root.total_train_samples
        rare = [
            f"{path}.weights.{name} gives {name} less than one block of {block} samples in this run, perhaps none."
            for name, share in self.shares().items()
            if block is not None and samples is not None and share * samples < block
        ]
        return rare + self._check_merged(facts, path)

    def merge_robots(self, robots: dict[str, RoboticsDataParams]) -> dict[str, RoboticsDataParams]:
        """Return the robots, each of which knows its own statistics and steps, normalized by the statistics of all.

        Raises:
            ValueError: their fields or how they are normalized differ.
        """
        if not robots:
            raise ValueError("data.merge_statistics is true, but no dataset is of a robot. Leave it out.")
        (first, main), *others = robots.items()
        rules = replace(main.normalization, lowdim_past_timesteps=None, lowdim_future_timesteps=None)
        for name, part in others:
            for key in ("action_fields", "proprioception_fields"):
                for one, other in ((first, name), (name, first)):
                    lacking = [field for field in getattr(robots[one], key) if field not in getattr(robots[other], key)]
                    if lacking:
                        raise ValueError(
                            f"data.merge_statistics needs robots with the same fields, but data.datasets.{other}.{key} "
                            f"lacks '{lacking[0]}' of {one}. Add it, or leave data.merge_statistics out."
                        )
            own = replace(part.normalization, lowdim_past_timesteps=None, lowdim_future_timesteps=None)
            for key, differs in (
                ("normalization", own != rules),
                ("statistics_weighting", part.statistics_weighting != main.statistics_weighting),
            ):
                if differs:
                    raise ValueError(
                        f"data.merge_statistics: data.datasets.{name}.{key} differs from that of {first}. Give it "
                        f"once, as data.{key}."
                    )
        files: dict[str, str] = {}
        shares: dict[str, float] = {}
        shares_of_robots = self.shares()
        for name, part in robots.items():
            weights = part.dataset_weighting or [1.0] * len(part.dataset_statistics)
            for manifest, file, weight in zip(part.dataset_manifest, part.dataset_statistics, weights, strict=False):
                files[manifest] = file
                shares[manifest] = shares.get(manifest, 0.0) + shares_of_robots[name] * weight / sum(weights)
        windows = [part.normalization_window for part in robots.values()]
        past, future = max(window.past for window in windows), max(window.future for window in windows)
        normalization = replace(rules, lowdim_past_timesteps=past, lowdim_future_timesteps=future)
        return {
            name: replace(part, merged_statistics=files, merged_weighting=shares, normalization=normalization)
            for name, part in robots.items()
        }

    def _check_merged(self, facts: Facts, path: str) -> list[str]:
        """Check that the robots mean the same by their fields; return accepted contradictions."""
        robots = self.robots()
        if not self.merge_statistics:
            kept = next((name for name, part in robots.items() if part.merged_statistics), None)
            if kept is None:
                return []
            raise ValueError(
                f"{path}.datasets.{kept}.merged_statistics needs {path}.merge_statistics true. Set it, or leave it out."
            )
        specs = {name: specs_of(facts.parts[name].datasets)[:1] for name in robots}
        found = find_contradictions(
            [(spec, robots[name].describe_fields(spec)) for name in robots for spec in specs[name]]
        )
        if found and not any(part.accept_contradictions for part in robots.values()):
            raise ValueError(f"{path}.merge_statistics: {found[0]} Or set --{path}.accept_contradictions true.")
        return found


def pattern_blocks(weights: Sequence[float]) -> list[int]:
    """Return the blocks of each dataset in the shortest pattern with exactly these shares, else in the longest."""
    exact = [Fraction(weight).limit_denominator(10**6) or Fraction(weight) for weight in weights]
    whole = math.lcm(*(weight.denominator for weight in exact))
    blocks = [int(weight * whole) for weight in exact]
    blocks = [count // math.gcd(*blocks) for count in blocks]
    if sum(blocks) > _MOST_BLOCKS:
        edges = [round(edge / sum(weights) * _MOST_BLOCKS) for edge in accumulate([0.0, *weights])]
        blocks = [max(1, end - start) for start, end in pairwise(edges)]
    return blocks


def write_out_mixture(tree: Branch, path: str) -> Branch:
    """Return a data section in which the datasets of a mixture are written out.

    With type mixture or several modalities in `dataset_modality`, each modality becomes a dataset of its name, which
    has the manifests of that modality. A key beside the datasets is given to each dataset that has it and does not give
    it itself; one on the command line is given to all that have it.

    Raises:
        ValueError: the lists contradict each other.
    """
    kinds = set(_read_list(tree, "dataset_modality", path))
    if text_of(tree.children.get(TYPE_KEY)) != "mixture" and (len(kinds) < 2 or not kinds <= _modalities()):
        return tree
    children = {TYPE_KEY: Leaf(Scalar("mixture"), tree.origin), **tree.children}
    if kinds and text_of(children[TYPE_KEY]) != "mixture":
        children[TYPE_KEY] = Leaf(Scalar("mixture"), tree.children["dataset_modality"].origin)
    if _read_list(tree, "dataset_manifest", path) or kinds:
        children |= _split_lists(tree, path)
        # divided, they are no key of the mixture
        children = {
            key: node for key, node in children.items() if not key.endswith("_statistics") or to_value(node) != []
        }
    parts = children.get("datasets")
    if not isinstance(parts, Branch):
        return replace(tree, children=children)
    shared = children.keys() - _OWN_KEYS - _LIST_KEYS - tree.superseded.keys()
    types = schema.members(DataParams)
    taken: set[str] = set()
    given: dict[Any, Node] = {}
    for name, part in parts.children.items():
        given[name] = part
        if isinstance(part, Branch) and (kind := types.get(text_of(part.children.get(TYPE_KEY)) or "")) is not None:
            keys = shared & schema.accepted_keys(kind)
            own = {key: _under(part.children.get(key), children[key]) for key in keys}
            given[name] = replace(part, children={**part.children, **own})
            taken |= keys
    # what no dataset has is an unknown key
    kept = {key: node for key, node in children.items() if key not in taken - schema.accepted_keys(MixtureDataParams)}
    return replace(tree, children=kept | {"datasets": replace(parts, children=given)})


def _under(own: Node | None, shared: Node) -> Node:
    """Return a dataset's own value over the one that all datasets share."""
    if isinstance(own, Branch) and isinstance(shared, Branch):
        both = {key: _under(own.children.get(key), node) for key, node in shared.children.items()}
        return replace(own, children={**own.children, **both})
    return shared if own is None or (shared.origin == COMMAND_LINE != own.origin) else own


def _modalities() -> set[str]:
    return {name for name, kind in schema.members(DataParams).items() if name in kind.modalities[:1]}


def _read_list(tree: Branch, key: str, path: str) -> list[Any]:
    node = tree.children.get(key)
    if not isinstance(node, Leaf) or node.value is None or text_of(node) in ("null", "~", ""):
        return []
    kind = _LISTS[key.removeprefix("val_").removeprefix("dataset_")]
    return decode_value(list[kind], node.value, f"{path}.{key}", node.origin)


def _split_lists(tree: Branch, path: str) -> dict[str, Node]:
    """Return `datasets`, one for each modality, and their `weights`; the lists are left empty.

    Raises:
        ValueError: the lists contradict each other, or a modality is unknown.
    """
    given = tree.children.get("datasets")
    if isinstance(given, Branch) and given.children:
        raise ValueError(
            f"{path}.dataset_manifest and {path}.datasets are both given. Use one of them; each of the "
            f"datasets has its own, such as --{path}.datasets.NAME.dataset_manifest."
        )
    parts: dict[str, dict[str, Any]] = {}
    weights: dict[str, float] = {}
    for prefix in ("", "val_"):
        lists = {name: _read_list(tree, f"{prefix}dataset_{name}", path) for name in _LISTS}
        _check_lists(lists, f"{path}.{prefix}dataset_")
        for modality in dict.fromkeys(lists["modality"]):
            places = [place for place, name in enumerate(lists["modality"]) if name == modality]
            if prefix and modality not in parts:
                raise ValueError(
                    f"{path}.val_dataset_modality has '{modality}', which {path}.dataset_modality lacks. Leave out its "
                    f"manifest: {lists['manifest'][places[0]]}."
                )
            part = parts.setdefault(modality, {TYPE_KEY: Scalar(modality)})
            for name, values in lists.items():
                own = [values[place] for place in places] if len(values) == len(lists["manifest"]) else values
                # the statistics may be those of the robots alone
                if own and (name != "statistics" or modality == "robotics"):
                    part[f"{prefix}dataset_{name}"] = own
            if not prefix:
                weights[modality] = sum(part.get("dataset_weighting", [1.0] * len(places)))
    origin = next(tree.children[key].origin for key in ("dataset_manifest", "dataset_modality") if key in tree.children)
    datasets = {
        name: Branch({key: Leaf(value, tree.children.get(key, tree).origin) for key, value in part.items()}, origin)
        for name, part in parts.items()
    }
    shares = Branch({name: Leaf(weight, origin) for name, weight in weights.items()}, origin)
    given = tree.children.get("weights")
    written: dict[str, Node] = {
        "datasets": Branch(dict(datasets), origin),
        "weights": given if isinstance(given, Branch) and given.children else shares,
    }
    used = {key for part in parts.values() for key in part}
    return written | {key: Leaf([], origin) for key in _LIST_KEYS & tree.children.keys() & used}


def _check_lists(lists: dict[str, list[Any]], path: str) -> None:
    manifests, modalities = lists["manifest"], lists["modality"]
    known = sorted(_modalities())
    if manifests and not modalities:
        raise ValueError(f"{path}modality is missing. Give one of {', '.join(known)} for each of {path}manifest.")
    for name in ("modality", "weighting"):
        if lists[name] and len(lists[name]) != len(manifests):
            raise ValueError(
                f"{path}{name} has {len(lists[name])} entries and {path}manifest has {len(manifests)}. Give one for "
                "each manifest."
            )
    for modality in modalities:
        if modality not in known:
            raise ValueError(unknown_name_message(f"{path}modality", modality, known, listed_as="Choose from"))
