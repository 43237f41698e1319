"""Read the facts needed to resolve a config: manifests, tokenizers, specs, earlier runs, cores, processes."""

import itertools
import json
import os
import re
from dataclasses import fields, replace
from typing import Any

import yaml

from vla_foundry.config.schema import BaseParams, Unavailable
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.experiment import TrainExperimentParams, load_params_from_yaml
from vla_foundry.params.facts import DatasetFacts, Facts, ImageFacts, TokenizerFacts
from vla_foundry.params.models.action_heads import ActionHeadParams
from vla_foundry.params.models.backbones import BackboneParams, ViTBackboneParams, VLMFoundryBackboneParams
from vla_foundry.params.models.policy import with_model_files
from vla_foundry.params.models.roles import LanguageModelParams, ModelParams, PublishedParams
from vla_foundry.params.models.vit import ImageEncoderParams
from vla_foundry.robotics.spec import SPEC_NAME, NamedSpec, parse_spec, read_spec
from vla_foundry.run_folder import (
    CONFIG_NAME,
    MODEL_CONFIG_NAME,
    MODEL_FILES_FOLDER,
    PROCESSOR_CONFIG_NAME,
    PROCESSOR_FOLDER,
    TOKENIZER_FOLDER,
    run_folder_candidates,
)
from vla_foundry.shards import MANIFEST_NAME, PROVENANCE_NAME, ManifestEntry, parse_manifest
from vla_foundry.storage.hub import find_cached
from vla_foundry.storage.uri import exists, file_test, is_remote, join_uri, parent_uri, read_text
from vla_foundry.text.chat import IMAGE_MARKER
from vla_foundry.text.tokenizers import read_vocabulary
from vla_foundry.world import read_ranks_per_node

# parts of a model that see no tokens, and no images
_WITHOUT_TOKENS = (ImageEncoderParams, ViTBackboneParams, ActionHeadParams)
_WITHOUT_IMAGES = (LanguageModelParams, ActionHeadParams)
# folders of a run that hold a tokenizer, the fuller one first
_KEPT = (PROCESSOR_FOLDER, TOKENIZER_FOLDER)
# owner/name on the Hugging Face hub, or a legacy name without an owner
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_facts(params: TrainExperimentParams, world_size: int, *, offline: bool = False) -> Facts:
    """Read the facts that these params need.

    Args:
        params: the parsed params, not yet resolved.
        world_size: number of processes.
        offline: read nothing remote; remote facts and missing files are then Unavailable.

    Raises:
        FileNotFoundError: a manifest or a checkpoint is missing.
        ValueError: a manifest is malformed.
    """
    data = params.data
    name = data.tokenizer_name()
    started_from = None
    if isinstance(data, ImageProcessorParams) and name is None:
        name = params.model.image_inputs().processor
        started_from = _find_started_from(params.model, offline) if name is None else None
    tokenizer = _read_named_tokenizer(name, offline) or started_from
    if isinstance(data, ImageProcessorParams) and tokenizer is not None and tokenizer.image_token_id is None:
        # our own processor adds <image> at the end
        vocabulary = None if tokenizer.vocabulary is None else tokenizer.vocabulary.with_token(IMAGE_MARKER)
        tokenizer = replace(
            tokenizer,
            vocab_size=tokenizer.vocab_size + 1,
            image_token_id=tokenizer.vocab_size,
            vocabulary=vocabulary,
        )
    resumed = [] if params.resume is None or params.name is None else [join_uri(params.save_path, params.name)]
    weights = _list_weights(params.model, besides=_WITHOUT_TOKENS) + resumed
    image_weights: list[str] = []
    if isinstance(data, ImageProcessorParams):
        image_weights = _list_weights(params.model, besides=_WITHOUT_IMAGES) + resumed
    _check_checkpoint(params.model.resume_from_checkpoint, "model.resume_from_checkpoint", offline)
    has_spec = isinstance(data, RoboticsDataParams)
    specs = (_find_run_spec(name, offline) for name in list_checkpoints(params.model)) if has_spec else ()
    run = next((spec for spec in specs if spec is not None), None)
    return Facts(
        world_size=world_size,
        ranks_per_node=read_ranks_per_node(world_size),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        datasets=tuple(_read_dataset(name, "data.dataset_manifest", offline, data) for name in data.dataset_manifest),
        val_datasets=tuple(
            _read_dataset(name, "data.val_dataset_manifest", offline, data) for name in data.val_dataset_manifest
        ),
        tokenizer=tokenizer,
        weights_tokenizers={name: _read_kept_tokenizer(name) for name in weights if not is_remote(name) or not offline},
        images=None if name is None or not isinstance(data, ImageProcessorParams) else _read_images(name),
        weights_images={name: _read_kept_images(name) for name in image_weights if not is_remote(name) or not offline},
        started_from=started_from,
        started_from_robotics=run,
        started_from_normalization=None if run is None else _read_run_normalization(run.name),
        normalization=_read_normalization(data, offline) if isinstance(data, RoboticsDataParams) else None,
        checkpoint_models=_read_checkpoint_models(params.model, offline),
        model_configs=_read_model_configs(params.model),
    )


def _find_run_spec(checkpoint: str, offline: bool) -> NamedSpec | None:
    """Return the dataset spec saved in the run of a checkpoint, or None."""
    if is_remote(checkpoint) and offline:
        return None
    for folder in run_folder_candidates(checkpoint):
        location = join_uri(folder, SPEC_NAME)
        if exists(location):
            return NamedSpec(folder, parse_spec(read_text(location), location))
    return None


def _read_run_normalization(folder: str) -> dict[str, Any] | None:
    """Return how a run normalizes each field, or None if it keeps no normalizer."""
    from vla_foundry.data.robotics import load_normalizer

    try:
        return load_normalizer(folder).state()["fields"]
    except FileNotFoundError:
        return None


def _read_normalization(data: RoboticsDataParams, offline: bool) -> dict[str, Any] | None:
    """Return how the statistics of the training data normalize each field, or None if they are out of reach.

    Raises:
        FileNotFoundError: a dataset has no statistics.
        ValueError: the statistics lack a field, a step or percentiles.
    """
    from vla_foundry.data.robotics import complete_params, create_normalization, read_specs

    if not data.dataset_manifest or (
        offline and any(map(is_remote, (*data.dataset_manifest, *data.dataset_statistics)))
    ):
        return None
    try:
        specs = read_specs(data.dataset_manifest)
        return create_normalization(complete_params(data), specs).normalizer.state()["fields"]
    except FileNotFoundError:
        if offline:
            return None
        raise


def _check_checkpoint(location: str | None, path: str, offline: bool) -> None:
    if location is None or (is_remote(location) and offline):
        return
    if not exists(location):
        raise FileNotFoundError(f"{path}: {location} does not exist.")


def _read_dataset(manifest: str, path: str, offline: bool, data: DataParams) -> DatasetFacts:
    """Read one dataset's manifest and the files beside it."""
    folder, has_spec = parent_uri(manifest), isinstance(data, RoboticsDataParams)
    missing = DatasetFacts(
        manifest=manifest,
        num_samples=Unavailable(manifest),
        provenance={},
        robotics=Unavailable(join_uri(folder, SPEC_NAME)) if has_spec else None,
    )
    if offline and is_remote(manifest):
        return missing
    try:
        entries = parse_manifest(read_text(manifest), manifest, file_test(parent_uri(manifest)))
    except (FileNotFoundError, IsADirectoryError):
        if offline:
            return missing
        inside = join_uri(manifest, MANIFEST_NAME)
        is_folder = not manifest.endswith(MANIFEST_NAME) and exists(inside)
        fix = f"Did you mean {inside}?" if is_folder else "Make it with `vla-foundry preprocess` or `manifest build`."
        raise FileNotFoundError(f"{path}: there is no manifest {manifest}. {fix}") from None
    provenance = read_provenance(folder)
    num_samples = sum(entry.num_sequences for entry in entries)
    if type(data) is TextDataParams:
        if "seq_len" not in provenance:
            provenance["seq_len"] = _read_record_length(manifest, tuple(entries))
        if isinstance(provenance["seq_len"], int):
            num_samples *= data.count_pieces(provenance["seq_len"])
    return DatasetFacts(
        manifest=manifest,
        num_samples=num_samples,
        provenance=provenance,
        tokenizer=_read_dataset_tokenizer(join_uri(folder, TOKENIZER_FOLDER)),
        robotics=read_spec(manifest) if has_spec else None,
    )


def _read_record_length(manifest: str, entries: tuple[ManifestEntry, ...]) -> int | None:
    """Return the seq_len of a dataset of tokenized text whose provenance is unknown; None: it holds no records."""
    from vla_foundry.data.cache import ShardCache
    from vla_foundry.data.pipelines.text import find_record_length
    from vla_foundry.data.reader import Dataset, ShardReader

    reader = ShardReader([Dataset(manifest=manifest, modality="text", entries=entries)], ShardCache("", 0))
    try:
        length = find_record_length(reader, 0)
    except (OSError, ValueError):
        return None  # training says so when it opens the shard
    return None if length is None else length - 1


def read_provenance(folder: str) -> dict[str, Any]:
    """Return the `dataset` section of the provenance in a dataset's folder; {} if it has none."""
    dataset = _read_json(join_uri(folder, PROVENANCE_NAME)).get("dataset")
    return dataset if isinstance(dataset, dict) else {}


def _read_json(location: str) -> dict[str, Any]:
    """Return the JSON object in a file; {} if the file is missing or holds something else."""
    try:
        values = json.loads(read_text(location))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_dataset_tokenizer(folder: str) -> TokenizerFacts | None:
    """Return the facts about a dataset's own tokenizer, or None if it has no tokenizer folder."""
    try:
        return _read_tokenizer(folder, folder)
    except FileNotFoundError:
        return None


def _read_tokenizer(name: str, location: str) -> TokenizerFacts:
    found = read_vocabulary(location)
    return TokenizerFacts(name=name, vocab_size=found.size, image_token_id=found.image_token_id, vocabulary=found)


def _find_started_from(model: BaseParams, offline: bool) -> TokenizerFacts | None:
    """Return the processor, or else the tokenizer, saved in the run that the model or one of its parts starts from."""
    kept = (_read_kept_tokenizer(name) for name in list_checkpoints(model) if not is_remote(name) or not offline)
    return next((found for found in kept if found is not None), None)


def _read_kept_tokenizer(checkpoint: str) -> TokenizerFacts | None:
    """Return the processor, or else the tokenizer, kept with a checkpoint or a published model; None: it has none."""
    runs = (folder for folder in run_folder_candidates(checkpoint) if exists(join_uri(folder, MODEL_CONFIG_NAME)))
    folders = [join_uri(run, kept) for run in itertools.islice(runs, 1) for kept in _KEPT]
    found = (_read_dataset_tokenizer(folder) for folder in (*folders, checkpoint))
    return next((tokenizer for tokenizer in found if tokenizer is not None), None)


def _read_images(name: str) -> ImageFacts | None:
    """Return how a processor prepares images, from its folder or the hub's cache; None: unknown."""
    for file in (PROCESSOR_CONFIG_NAME, "processor_config.json", "preprocessor_config.json"):
        is_hub_name = not os.path.isdir(name) and _HUB_NAME.fullmatch(name) is not None
        path = find_cached(name, file) if is_hub_name else join_uri(name, file)
        found = None if path is None else ImageFacts.from_config(_read_json(path))
        if found is not None:
            return found
    return None


def _read_kept_images(checkpoint: str) -> ImageFacts | None:
    """Return how the images of a checkpoint or a published model were prepared; None: unknown."""
    for folder in run_folder_candidates(checkpoint):
        if exists(join_uri(folder, MODEL_CONFIG_NAME)):
            kept = _read_images(join_uri(folder, PROCESSOR_FOLDER))
            config = join_uri(folder, CONFIG_NAME)
            if kept is None and exists(config):
                # without text, a run has no processor, and the data's params say all of it
                data = (yaml.safe_load(read_text(config)) or {}).get("data")
                kept = ImageFacts.from_config(data) if isinstance(data, dict) else None
            return kept
    return _read_images(checkpoint)


def _list_weights(model: BaseParams, *, besides: tuple[type, ...]) -> list[str]:
    """Return the checkpoints and local published models that weights come from, except those of some types of parts."""
    if isinstance(model, besides):
        return []
    if isinstance(model, ModelParams | BackboneParams) and model.resume_from_checkpoint is not None:
        return [model.resume_from_checkpoint]
    is_published = isinstance(model, PublishedParams) and model.hf_load_weights and os.path.isdir(model.hf_pretrained)
    own = [model.hf_pretrained] if isinstance(model, PublishedParams) and is_published else []
    return own + [name for part in _parts(model) for name in _list_weights(part, besides=besides)]


def _read_model_configs(model: BaseParams) -> dict[str, dict[str, Any]]:
    """Return the config.json of each published model in a model that is a local folder or in the hub's cache."""
    own = {}
    if isinstance(model, PublishedParams):
        name = model.hf_pretrained
        is_hub_name = not os.path.isdir(name) and _HUB_NAME.fullmatch(name.removeprefix("hf://")) is not None
        path = find_cached(name.removeprefix("hf://"), "config.json") if is_hub_name else join_uri(name, "config.json")
        own = {name: _read_json(path)} if path is not None and os.path.isfile(path) else {}
    below = (_read_model_configs(part) for part in _parts(model))
    return own | {name: config for configs in below for name, config in configs.items()}


def _parts(model: BaseParams) -> list[BaseParams]:
    return [value for item in fields(model) if isinstance(value := getattr(model, item.name), BaseParams)]


def list_checkpoints(model: BaseParams) -> list[str]:
    """Return the checkpoint the model starts from, then those of its parts, in field order."""
    own = model.resume_from_checkpoint if isinstance(model, ModelParams | BackboneParams) else None
    below = [name for part in _parts(model) for name in list_checkpoints(part)]
    return below if own is None else [own, *below]


def _read_checkpoint_models(model: BaseParams, offline: bool) -> dict[str, ModelParams]:
    """Return the model params of each run that a part takes its weights and architecture from."""
    models: dict[str, ModelParams] = {}
    for part in _parts(model):
        if isinstance(part, VLMFoundryBackboneParams) and part.vlm is None and part.resume_from_checkpoint is not None:
            _check_checkpoint(part.resume_from_checkpoint, "model.vision_language_backbone", offline)
            if not (is_remote(part.resume_from_checkpoint) and offline):
                models[part.resume_from_checkpoint] = _read_run_model(part.resume_from_checkpoint)
    return models


def _read_run_model(checkpoint: str) -> ModelParams:
    """Return the model params of a checkpoint; Hugging Face parts are read from the run's own files."""
    for folder in run_folder_candidates(checkpoint):
        config = join_uri(folder, MODEL_CONFIG_NAME)
        if exists(config):
            params = load_params_from_yaml(ModelParams, config)
            files = join_uri(folder, MODEL_FILES_FOLDER)
            return with_model_files(params, files) if not is_remote(files) and exists(files) else params
    raise FileNotFoundError(
        f"model.vision_language_backbone.resume_from_checkpoint: {checkpoint} lies in no run folder (there is no "
        f"{MODEL_CONFIG_NAME} above it). Give a run folder, or the architecture in model.vision_language_backbone.vlm."
    )


def _read_named_tokenizer(name: str | None, offline: bool) -> TokenizerFacts | None:
    """Return the facts about the tokenizer named by data.tokenizer, or None if they cannot be read.

    Raises:
        FileNotFoundError: the name can only be a local folder, and the folder does not exist.
    """
    if name is None:
        return None
    is_hub_name = _HUB_NAME.fullmatch(name) is not None and not os.path.isdir(name)
    location = f"hf://{name}" if is_hub_name else name
    if is_remote(location) and offline:
        return None
    try:
        return _read_tokenizer(name, location)
    except (FileNotFoundError, ValueError):
        if is_remote(location) or offline:
            # loading the tokenizer will report the error; this function only reads its size
            return None
        raise FileNotFoundError(f"data.tokenizer: {name} is no folder with a tokenizer.json.") from None
