"""The root of the config tree: one training run, its budget in steps, and checks across sections."""

import os
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Annotated, Any, Literal, TypeVar

import vla_foundry.params.data  # noqa: F401
import vla_foundry.params.models  # noqa: F401  (both register their types)
from vla_foundry.config.loading import load_params
from vla_foundry.config.resolve import naming_section
from vla_foundry.config.schema import BaseParams, Bounds, Count, Derived, Location, MissingError, Name, Unavailable
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.facts import Facts, TokenizerFacts
from vla_foundry.params.hparams import HyperParams, count_decay_steps
from vla_foundry.params.models.backbones import BackboneParams
from vla_foundry.params.models.policy import with_model_files, without_starts
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.params.models.vit import ViTParams
from vla_foundry.run_folder import CHECKPOINTS_FOLDER, CONFIG_NAME, MODEL_CONFIG_NAME, MODEL_FILES_FOLDER
from vla_foundry.storage.uri import join_uri, name_of, parent_uri

P = TypeVar("P")
_MAX_NAME_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class TrainExperimentParams(BaseParams):
    """One training run."""

    # the data derives from the model first, robots that share a model agree on widths, and the model takes them
    derivation_order = ("hparams", "distributed", "ema", "model", "data", "data", "model")

    # modules to import first; they register your own models, data types and so on
    plugins: list[Name] = field(default_factory=list)
    # name of the run and its folder; null: built from date, model, learning rate and batch size
    name: Name | None = None
    # folder that holds run folders
    save_path: Location = "experiments"
    # auto: resume from the newest checkpoint of the run with this name, if any; null: start a new run
    resume: Name | None = None
    # s3:// folder to copy the run folder to after each checkpoint
    remote_sync: Location | None = None
    # print the resolved config with the origin of each value, and stop
    resolve_configs: bool = False
    # folder where resolve_configs writes resolved_config.yaml
    resolve_configs_path: Location | None = None
    # log to Weights & Biases, with a few of a batch's pictures at each checkpoint; null: only if credentials are found
    wandb: bool | None = None
    # W&B entity; null: the W&B default
    wandb_entity: Name | None = None
    # W&B project
    wandb_project_name: Name = "vla_foundry"
    # W&B tags
    wandb_tags: list[Name] = field(default_factory=list)
    # write TensorBoard files to the run folder, with pictures too
    tensorboard: bool = False
    # steps between log lines
    log_every_n_steps: Count = 20
    # lowest level to log
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    # samples to train on
    total_train_samples: Count | None = None
    # training budget in passes over the data
    num_epochs: Count | None = None
    # number of checkpoints to save, spaced evenly over the run
    num_checkpoints: Count = 5
    # also save a checkpoint when this many minutes have passed since the last one; null: do not
    checkpoint_every_minutes: Annotated[float, Bounds(above=0, most=10**6)] | None = None
    # write checkpoints in the background: training only waits for a copy in host memory, which takes as much of it as
    # a rank's weights, average and moments; null: on a GPU
    checkpoint_async: bool | None = None
    # number of newest checkpoints to keep; an older one is deleted once a newer one is read back intact; null: all
    max_checkpoint_limit: Count | None = None
    # samples to validate on; null: no validation
    total_val_samples: Count | None = None
    # checkpoints between validations
    val_every_n_checkpoints: Count = 1
    data: DataParams
    model: ModelParams
    hparams: HyperParams = field(default_factory=HyperParams)
    distributed: DistributedParams = field(default_factory=DistributedParams)
    ema: EMAParams = field(default_factory=EMAParams)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and (not self.name.strip("./ ") or "/" in self.name):
            raise ValueError(f"name '{self.name}' cannot be the name of a folder. Leave out slashes.")
        # file systems take 255 bytes, and the names of locks and temporary files are longer
        if self.name is not None and len(self.name.encode()) > _MAX_NAME_BYTES:
            raise ValueError(f"name is {len(self.name.encode())} bytes long. Use at most {_MAX_NAME_BYTES}.")

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive the budget in samples from `num_epochs`."""
        if self.num_epochs is None:
            if self.total_train_samples is None:
                raise MissingError("There is no budget. Give --total_train_samples N or --num_epochs N.")
            return {}
        data, share = self.data, 1.0
        if isinstance(data, MixtureDataParams) and facts.parts:
            name = data.epochs_of or str(data.main_dataset())
            facts, share = facts.parts[name], data.shares()[name]
        if data.sequential_shards:
            raise ValueError(
                f"num_epochs ({self.num_epochs}) needs the number of samples, which data.sequential_shards do not say. "
                "Give --total_train_samples N."
            )
        counts = [dataset.num_samples for dataset in facts.datasets]
        missing = next((count for count in counts if isinstance(count, Unavailable)), None)
        if missing is not None:
            # an explicit budget needs no manifest; training checks at its start that both agree
            return (
                {} if self.total_train_samples is not None else {"total_train_samples": Derived(missing, "num_epochs")}
            )
        epoch = sum(count for count in counts if isinstance(count, int))
        # of a mixture, the passes over one dataset are to end within the budget
        samples = int(self.num_epochs * epoch / share * (1 + 1e-12))
        of = "" if share == 1 else f" of data.epochs_of / its share {share:g}"
        if self.total_train_samples not in (None, samples):
            raise ValueError(
                f"total_train_samples ({self.total_train_samples}) and num_epochs ({self.num_epochs}) x {epoch} "
                f"samples{of} = {samples} disagree. Give one of them."
            )
        source = f"num_epochs x {epoch} samples{of or ' in data.dataset_manifest'}"
        return {"total_train_samples": Derived(samples, source)}

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that the budget, the data and the model fit together."""
        _check_weights(self)
        notices = _check_budget(self, facts)
        if not isinstance(self.data, MixtureDataParams):
            return notices + _check_data(self, facts, self)
        for name, known in facts.parts.items():
            with naming_section("data", f"data.datasets.{name}"):
                notices += _check_data(self.data.part_of(self, name), known, self)
        return notices + _compare_datasets(self.data, facts)


def load_experiment_params_from_yaml(path: str) -> TrainExperimentParams:
    """Load the config of a whole run; see `load_params_from_yaml`."""
    return load_params(TrainExperimentParams, path)


def load_params_from_yaml(cls: type[P], path: str) -> P:
    """Load params from a YAML file, which may include others and may come from an earlier version.

    Args:
        cls: a config dataclass, or a role such as ModelParams. From a whole run's config.yaml, load its section. A
            run's config describes its architecture; what it started from may be gone.
        path: the file: a path, s3:// or hf://.

    Raises:
        ValueError: a key is unknown, or a value is wrong or missing.
        FileNotFoundError: the file does not exist.
    """
    params = load_params(cls, path, TrainExperimentParams)
    folder = parent_uri(path)
    if (
        isinstance(params, ModelParams)
        and name_of(path) in (CONFIG_NAME, MODEL_CONFIG_NAME)
        and os.path.isdir(join_uri(folder, CHECKPOINTS_FOLDER))
    ):
        params = with_model_files(
            without_starts(params, only_gone=True), f"{folder}/{MODEL_FILES_FOLDER}", only_gone=True
        )
    return params


def total_steps(params: TrainExperimentParams) -> int:
    """Return the optimizer steps of a run; samples that do not fill a global batch are not used.

    Raises:
        ValueError: the budget in samples is not set yet.
    """
    if params.total_train_samples is None:
        raise ValueError("total_train_samples is not known. Give --total_train_samples or --num_epochs.")
    return params.total_train_samples // params.hparams.global_batch_size


def accumulation_steps(params: TrainExperimentParams, world_size: int) -> int:
    """Return the forward passes per optimizer step on each rank.

    Raises:
        ValueError: the global batch does not divide evenly; the message names the nearest sizes that do.
    """
    hparams = params.hparams
    unit = world_size * hparams.per_gpu_batch_size
    if hparams.global_batch_size % unit == 0:
        return hparams.global_batch_size // unit
    below = hparams.global_batch_size // unit * unit
    nearest = f"{below} or {below + unit}" if below else str(unit)
    raise ValueError(
        f"hparams.global_batch_size ({hparams.global_batch_size}) must be a multiple of num_ranks ({world_size}) x "
        f"hparams.per_gpu_batch_size ({hparams.per_gpu_batch_size}) = {unit}. Use {nearest}."
    )


def checkpoint_steps(params: TrainExperimentParams) -> tuple[int, ...]:
    """Return the steps after which to save a checkpoint: spaced evenly, the last one at the end of the run."""
    steps = total_steps(params)
    count = min(params.num_checkpoints, steps)
    return tuple(steps * (index + 1) // count for index in range(count))


def _check_budget(params: TrainExperimentParams, facts: Facts) -> list[str]:
    """Check that the budget gives at least one step, the batch divides evenly, and the schedule fits."""
    accumulation_steps(params, facts.world_size)
    if params.total_train_samples is None:
        return []
    batch = params.hparams.global_batch_size
    steps = total_steps(params)
    if steps == 0:
        unit = facts.world_size * params.hparams.per_gpu_batch_size
        largest = params.total_train_samples // unit * unit
        other = f", or --hparams.global_batch_size {largest}" if largest else ""
        raise ValueError(
            f"total_train_samples ({params.total_train_samples}) is less than one global batch "
            f"(hparams.global_batch_size {batch}). Use --total_train_samples {batch}{other}."
        )
    count_decay_steps(params.hparams, steps)
    notices = []
    left = params.total_train_samples - steps * batch
    if left:
        notices.append(
            f"{left} of total_train_samples ({params.total_train_samples}) do not fill a global batch of {batch} and "
            f"are left over: {steps} steps."
        )
    if params.num_checkpoints > steps:
        notices.append(f"num_checkpoints ({params.num_checkpoints}) is more than the {steps} steps: one each step.")
    return notices


def _check_data(params: TrainExperimentParams, facts: Facts, whole: TrainExperimentParams) -> list[str]:
    """Check that the data is enough for its part of the budget of the whole run, and fits the model."""
    if not params.data.allow_multiple_epochs:
        _check_enough(params, facts, whole)
    return [*_check_seq_len(params.data, params, facts), *_check_tokens(params, facts)]


def _check_enough(params: TrainExperimentParams, facts: Facts, whole: TrainExperimentParams) -> None:
    """Check that no dataset needs to repeat."""
    data, used, budget = params.data, params.total_train_samples, whole.total_train_samples
    if used is None or len(data.dataset_weighting) != len(facts.datasets):
        return
    is_whole = params is whole
    if is_whole:
        used = used // params.hparams.global_batch_size * params.hparams.global_batch_size
    total_weight = sum(data.dataset_weighting)
    for dataset, weight in zip(facts.datasets, data.dataset_weighting, strict=True):
        share = used * weight / total_weight
        # shares are exact to within one sample
        if isinstance(dataset.num_samples, int) and share > dataset.num_samples + 1:
            part = "" if is_whole and len(facts.datasets) == 1 else f"its share {round(share)} of "
            raise ValueError(
                f"{part}total_train_samples ({budget}) is more than the {dataset.num_samples} samples of "
                f"{dataset.manifest}. Set --data.allow_multiple_epochs true, or lower the budget."
            )


def _check_seq_len(data: DataParams, params: TrainExperimentParams, facts: Facts) -> list[str]:
    """Check that rows fit the model and are no longer than tokenized records.

    Returns:
        A line for each dataset whose records are cut.
    """
    limits = params.model.token_limits(facts)
    longest, is_own = limits.max_seq_len, limits.source.startswith("model.")
    modalities = (*data.dataset_modality, *data.val_dataset_modality)
    notices = []
    for dataset, modality in zip((*facts.datasets, *facts.val_datasets), modalities, strict=False):
        made = dataset.provenance.get("seq_len")
        if modality != "text" or not isinstance(made, int) or made == data.seq_len:
            continue
        if made < data.seq_len:
            raise ValueError(
                f"data.seq_len ({data.seq_len}) is more than {made}, the length of the records of {dataset.manifest}. "
                f"Use --data.seq_len {made}, or preprocess the data again."
            )
        assert isinstance(data, TextDataParams)
        last = made % data.seq_len
        padding = f", of which the last has {last} tokens and padding" if last else ""
        notices.append(
            f"{dataset.manifest}: its records of {made} tokens are cut into {data.count_pieces(made)} samples of "
            f"data.seq_len ({data.seq_len}){padding}."
        )
    if longest is not None and data.seq_len > longest:
        path = f"{limits.source}{'max_seq_len' if is_own else 'number of positions'}"
        fix = f"raise {path}" if is_own else "choose a model with more positions"
        raise ValueError(
            f"data.seq_len ({data.seq_len}) is more than {path} ({longest}). Use --data.seq_len {longest}, or {fix}."
        )
    return notices


def _check_tokens(params: TrainExperimentParams, facts: Facts) -> list[str]:
    """Check that data and weights agree about what token ids mean, and that the model's token table covers them."""
    used = {item.manifest: item.tokenizer for item in (*facts.datasets, *facts.val_datasets)}
    if facts.tokenizer is not None:
        used = {f"data.tokenizer {facts.tokenizer.name}": facts.tokenizer} | used
    sizes = {source: tokenizer.vocab_size for source, tokenizer in used.items() if tokenizer is not None}
    for item in (*facts.datasets, *facts.val_datasets):
        size = item.provenance.get("vocab_size")
        if item.tokenizer is None and isinstance(size, int):
            sizes[item.manifest] = size
    notices = _compare_tokenizers(params.data, used, facts)
    if not sizes:
        return notices
    source, size = max(sizes.items(), key=lambda item: item[1])
    other, smallest = min(sizes.items(), key=lambda item: item[1])
    if size != smallest and any(used.get(name) is None for name in sizes):
        raise ValueError(
            f"The tokenizers differ: {source} has {size} tokens and {other} has {smallest}. "
            "Use data of one tokenizer, and name it with data.tokenizer."
        )
    limits = params.model.token_limits(facts)
    if limits.vocab_size is not None and size > limits.vocab_size:
        fix = f"Use --{limits.source}vocab_size {size} or more."
        if not limits.source.startswith("model."):
            fix = "Use data of its own tokenizer, or another model."
        raise ValueError(
            f"{limits.source}vocab_size ({limits.vocab_size}) is less than the {size} tokens of {source}. {fix}"
        )
    return notices


def _compare_datasets(data: MixtureDataParams, facts: Facts) -> list[str]:
    """Compare the tokenizers of a mixture's datasets: one model reads them all. See `_compare_tokenizers`."""
    used = {}
    for name, known in facts.parts.items():
        own = [item.tokenizer for item in known.datasets]
        used[f"data.datasets.{name}"] = known.tokenizer or next((item for item in own if item is not None), None)
    return _compare_tokenizers(data, used, Facts())


def _compare_tokenizers(data: DataParams, used: dict[str, TokenizerFacts | None], facts: Facts) -> list[str]:
    """Compare the tokenizer of the data with those of the weights, and datasets with each other.

    Returns:
        Accepted differences, and what cannot be compared.

    Raises:
        ValueError: the tokenizers differ, and this is not accepted.
    """
    known = {name: item.vocabulary for name, item in used.items() if item is not None and item.vocabulary is not None}
    weights = {name: item for name, item in facts.weights_tokenizers.items() if item is not None}
    modalities = zip(
        (*facts.datasets, *facts.val_datasets), (*data.dataset_modality, *data.val_dataset_modality), strict=False
    )
    silent = [item.manifest for item, modality in modalities if item.tokenizer is None and modality == "text"]
    has_others = bool(weights) or len(used) > 1
    notices = [f"{name} keeps no tokenizer, so it is not compared with the others." for name in silent if has_others]
    if not known:
        return notices
    source, vocabulary = next(iter(known.items()))
    differences = [
        f"{one} and {name} have different tokenizers: {difference}. Use data of one tokenizer."
        for (one, first), (name, other) in combinations(known.items(), 2)
        if (difference := first.find_difference(other)) is not None
    ]
    for name, tokenizer in facts.weights_tokenizers.items():
        if tokenizer is None or tokenizer.vocabulary is None:
            notices.append(f"{name} keeps no tokenizer, so it is not compared with that of {source}.")
        elif (difference := tokenizer.vocabulary.find_difference(vocabulary)) is not None:
            differences.append(
                f"The weights of {name} and {source} have different tokenizers: {difference}. "
                f"Use data of the tokenizer {tokenizer.name}."
            )
        elif len({tokenizer.vocabulary.chat_template, vocabulary.chat_template, None}) > 2:
            notices.append(f"The tokenizers of {name} and {source} have different chat templates.")
    if differences and not data.accept_contradictions:
        raise ValueError(f"{differences[0]} Or continue as is with --data.accept_contradictions true.")
    return differences + notices


# more weights than any machine can hold
_MOST_WEIGHTS = 10**14


def _check_weights(params: TrainExperimentParams) -> None:
    num_weights = sum(count_weights(params.model))
    if num_weights > _MOST_WEIGHTS:
        raise ValueError(
            f"model has about {num_weights:.0e} weights, more than any machine can train. Lower its hidden_dim, "
            "n_layers or vocab_size."
        )


def count_weights(model: BaseParams, *, is_frozen: bool = False) -> tuple[int, int]:
    """Return how many weights of a model are trained, and how many frozen, at least: published parts do not count."""
    is_frozen = is_frozen or (isinstance(model, ModelParams | BackboneParams) and model.freeze)
    own = model.num_weights() if isinstance(model, TransformerParams | ViTParams) else 0
    parts = [value for item in fields(model) if isinstance(value := getattr(model, item.name), BaseParams)]
    counts = [(0, own) if is_frozen else (own, 0), *(count_weights(part, is_frozen=is_frozen) for part in parts)]
    return sum(trained for trained, _ in counts), sum(frozen for _, frozen in counts)


def find_lack_of_memory(params: TrainExperimentParams, world_size: int, memory: int | None) -> str | None:
    """Return one line that says how a run does not fit in memory, or None if it may fit.

    Counts only what is certain: weights, gradients, the optimizer's two moments, the average, and block inputs.

    Args:
        memory: memory for one rank, bytes; None: unknown.
    """
    distributed = params.distributed
    if memory is None or (distributed.fsdp and distributed.fsdp_cpu_offload):
        return None
    trained, frozen = count_weights(params.model)
    if params.model.lora is not None or any(group.freeze for group in params.hparams.parameter_groups.values()):
        # how many they are is known when the model is made
        trained, frozen = 0, trained + frozen
    width = {"pure_bf16": 2, "fp64": 8}.get(params.hparams.precision, 4)
    # Muon has one moment of most weights
    copies = (3 if params.hparams.optimizer == "muon" else 4) + params.ema.enabled
    needed = width * (trained * copies + frozen) // (world_size if distributed.fsdp else 1)
    rows, model = params.hparams.per_gpu_batch_size, params.model
    kept = 0
    if isinstance(params.data, TextDataParams) and isinstance(model, TransformerParams):
        # bf16 or wider, even if activations are recomputed
        kept = 2 * rows * params.data.seq_len * model.hidden_dim * model.n_layers
    if needed + kept <= memory:
        return None
    sizes = {"weights": needed, "rows": kept, "all": needed + kept, "here": memory}
    gib = {name: f"{size / 2**30:,.1f} GiB" for name, size in sizes.items()}
    return (
        f"One rank needs at least {gib['all']} ({gib['weights']} for {trained + frozen:,} weights with gradients and "
        f"optimizer, {gib['rows']} for {rows} rows), but has {gib['here']} here. Use a smaller model or "
        "hparams.per_gpu_batch_size, or --distributed.fsdp true on more ranks."
    )
