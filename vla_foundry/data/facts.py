"""Read the facts needed to resolve a config: manifests, tokenizers, specs, earlier runs, cores, processes."""

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from vla_foundry.config.schema import BaseParams, Unavailable
from vla_foundry.data.kept import (
    find_run_spec,
    read_images,
    read_json,
    read_kept_tokenizer,
    read_model_config,
    read_tokenizer,
    read_weights_images,
    read_weights_normalization,
    read_weights_tokenizer,
)
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.experiment import TrainExperimentParams, load_params_from_yaml
from vla_foundry.params.facts import ChunkFacts, DatasetFacts, Facts, TokenizerFacts
from vla_foundry.params.models.action_heads import ActionHeadParams, FastTokensParams
from vla_foundry.params.models.backbones import BackboneParams, ViTBackboneParams, VLMFoundryBackboneParams
from vla_foundry.params.models.policy import with_model_files
from vla_foundry.params.models.roles import TIMM_PREFIX, LanguageModelParams, ModelParams, PublishedParams
from vla_foundry.params.models.vit import ImageEncoderParams, ViTHFParams
from vla_foundry.robotics.spec import SPEC_NAME, read_spec
from vla_foundry.run_folder import (
    MODEL_CONFIG_NAME,
    MODEL_FILES_FOLDER,
    TOKENIZER_FOLDER,
    run_folder_candidates,
)
from vla_foundry.shards import MANIFEST_NAME, PROVENANCE_NAME, ManifestEntry, parse_manifest
from vla_foundry.storage.hub import find_published
from vla_foundry.storage.uri import exists, file_test, is_remote, join_uri, parent_uri, read_text
from vla_foundry.text.chat import IMAGE_MARKER
from vla_foundry.world import read_ranks_per_node

# parts of a model that see no tokens, and no images
_WITHOUT_TOKENS = (ImageEncoderParams, ViTBackboneParams, ActionHeadParams)
_WITHOUT_IMAGES = (LanguageModelParams, ActionHeadParams)


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
    if isinstance(data, MixtureDataParams):
        return _read_mixture(params, data, world_size, offline=offline)
    checkpoint_models = _read_checkpoint_models(params.model, offline)
    model_configs = _read_model_configs(params.model, offline)
    for model in checkpoint_models.values():
        model_configs |= _read_model_configs(model, offline=True)
    name = data.tokenizer_name()
    started_from = None
    if isinstance(data, ImageProcessorParams) and name is None:
        name = params.model.image_inputs().processor
        started_from = _find_started_from(params.model, offline) if name is None else None
    tokenizer = _read_named_tokenizer(name, offline) or started_from
    weights = _list_weights(params, offline, besides=_WITHOUT_TOKENS)
    image_weights, processor = {}, None
    if isinstance(data, ImageProcessorParams):
        tokenizer = _with_image_token(tokenizer)
        image_weights = _list_weights(params, offline, besides=_WITHOUT_IMAGES)
        processor = None if name is None else find_published(name)
    _check_checkpoint(params.model.resume_from_checkpoint, "model.resume_from_checkpoint", offline)
    has_spec = isinstance(data, RoboticsDataParams)
    specs = (find_run_spec(name, offline) for name in list_checkpoints(params.model)) if has_spec else ()
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
        weights_tokenizers={name: read_weights_tokenizer(place, name) for name, place in weights.items()},
        images=None if processor is None or (is_remote(processor) and offline) else read_images(processor),
        weights_images={name: read_weights_images(place) for name, place in image_weights.items()},
        started_from=started_from,
        started_from_robotics=run,
        started_from_normalization=read_weights_normalization(params.model.resume_from_checkpoint, run, offline),
        normalization=_read_normalization(data, offline) if isinstance(data, RoboticsDataParams) else None,
        checkpoint_configs={
            name: {} if is_remote(name) and offline else read_model_config(name)
            for name in list_checkpoints(params.model)
        },
        checkpoint_models=checkpoint_models,
        model_configs=model_configs,
        action_tokenizers=_read_action_tokenizers(params.model, offline),
    )


def _read_mixture(params: TrainExperimentParams, data: MixtureDataParams, world_size: int, *, offline: bool) -> Facts:
    """Read the facts of each dataset as if it were the only one; the model's are those of the main one."""
    if not data.datasets:
        return read_facts(replace(params, data=DataParams()), world_size, offline=offline)
    parts = {}
    for name in data.datasets:
        facts = read_facts(data.part_of(params, name), world_size, offline=offline)
        # the datasets share the machine
        parts[name] = replace(facts, num_cpus=max(1, facts.num_cpus // len(data.datasets)))
    if data.merge_statistics and all(parts[name].normalization is not None for name in data.robots()):
        from vla_foundry.data.robotics import complete_params

        whole = data.merge_robots({name: complete_params(robot) for name, robot in data.robots().items()})
        for name, robot in whole.items():
            parts[name] = replace(parts[name], normalization=_read_normalization(robot, offline))
    return replace(parts[str(data.main_dataset())], parts=parts)


def _with_image_token(tokenizer: TokenizerFacts | None) -> TokenizerFacts | None:
    """Return a tokenizer with <image>, which our own processor adds at the end if there is no image token."""
    if tokenizer is None or tokenizer.image_token_id is not None:
        return tokenizer
    size = tokenizer.vocab_size
    vocabulary = None if tokenizer.vocabulary is None else tokenizer.vocabulary.with_token(IMAGE_MARKER)
    return replace(tokenizer, vocab_size=size + 1, image_token_id=size, vocabulary=vocabulary)


def _read_normalization(data: RoboticsDataParams, offline: bool) -> dict[str, Any] | None:
    """Return how the statistics of the training data normalize each field, or None if they are out of reach.

    Raises:
        FileNotFoundError: a dataset has no statistics.
        ValueError: the statistics lack a field, a step or percentiles.
    """
    from vla_foundry.data.robotics import complete_params, create_normalization, read_specs

    names = (*data.dataset_manifest, *data.dataset_statistics)
    # a config may be resolved on a machine without the datasets, but a dataset that is here must be whole
    is_whole = not any(map(is_remote, names)) and all(map(exists, data.dataset_manifest))
    if not data.dataset_manifest or (offline and not is_whole):
        return None
    specs = read_specs(data.dataset_manifest)
    return create_normalization(complete_params(data), specs).normalizer.state()["fields"]


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
    if not exists(join_uri(parent_uri(manifest), f"{entries[0].shard}.tar")):
        return None  # training says so; without numpy, --resolve_configs is fast
    from vla_foundry.data.cache import ShardCache
    from vla_foundry.data.pipelines.text import find_record_length
    from vla_foundry.data.reader import Dataset, ShardReader

    reader = ShardReader([Dataset(manifest=manifest, modality="text", entries=entries)], ShardCache("", 0))
    try:
        length = find_record_length(reader, 0)
    except (OSError, ValueError):
        return None  # training says why
    return None if length is None else length - 1


def read_provenance(folder: str) -> dict[str, Any]:
    """Return the `dataset` section of the provenance in a dataset's folder; {} if it has none."""
    dataset = read_json(join_uri(folder, PROVENANCE_NAME)).get("dataset")
    return dataset if isinstance(dataset, dict) else {}


def _read_dataset_tokenizer(folder: str) -> TokenizerFacts | None:
    """Return the facts about a dataset's own tokenizer, or None if it has no tokenizer folder."""
    try:
        return read_tokenizer(folder, folder)
    except FileNotFoundError:
        return None


def _find_started_from(model: BaseParams, offline: bool) -> TokenizerFacts | None:
    """Return the processor, or else the tokenizer, saved in the run that the model or one of its parts starts from."""
    kept = (read_kept_tokenizer(name, name) for name in list_checkpoints(model) if not is_remote(name) or not offline)
    return next((found for found in kept if found is not None), None)


def _list_weights(params: TrainExperimentParams, offline: bool, *, besides: tuple[type, ...]) -> dict[str, str]:
    """Return where weights come from, except those of some types of parts: {checkpoint or published model: place}."""
    found = _list_model_weights(params.model, besides)
    run = join_uri(params.save_path, params.name or "")
    if params.resume is not None and params.name is not None and os.path.isdir(run):
        found[run] = run
    return {name: place for name, place in found.items() if not (offline and is_remote(place))}


def _list_model_weights(model: BaseParams, besides: tuple[type, ...]) -> dict[str, str]:
    if isinstance(model, besides):
        return {}
    if isinstance(model, ModelParams | BackboneParams) and model.resume_from_checkpoint is not None:
        return {model.resume_from_checkpoint: model.resume_from_checkpoint}
    found: dict[str, str] = {}
    if isinstance(model, PublishedParams) and model.hf_load_weights:
        place = find_published(model.hf_pretrained)
        is_known = place is not None and (os.path.isdir(place) or place.startswith(TIMM_PREFIX))
        found = {model.hf_pretrained: place} if place is not None and is_known else {}
    for _, part in _parts(model):
        found |= _list_model_weights(part, besides)
    return found


def _read_model_configs(model: BaseParams, offline: bool) -> dict[str, dict[str, Any]]:
    """Return the config.json of each published model in a model; one that is not on this machine is fetched first.

    Args:
        offline: leave out what is not on this machine.

    Raises:
        FileNotFoundError: a model does not exist.
        ValueError: a model is not on this machine, and the hub cannot be reached.
    """
    configs = {}
    for path, part in _walk(model):
        if not isinstance(part, PublishedParams) or part.hf_pretrained.startswith(TIMM_PREFIX):
            continue
        name = part.hf_pretrained
        if isinstance(part, ViTHFParams) and "/" not in name and not os.path.isdir(name):
            continue  # its derived name is timm's
        try:
            folder = find_published(name, fetch=not offline)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{path}.hf_pretrained: {error}") from None
        if folder is not None and exists(join_uri(folder, "config.json")):
            configs[name] = read_json(join_uri(folder, "config.json"))
        elif not offline:
            raise FileNotFoundError(f"{path}.hf_pretrained: {name} is not a folder with a config.json.")
    return configs


def _read_action_tokenizers(model: BaseParams, offline: bool) -> dict[str, ChunkFacts]:
    """Return the chunks that each FAST tokenizer of a model is for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a FAST tokenizer.
    """
    found = {}
    for path, part in _walk(model):
        if not isinstance(part, FastTokensParams) or (offline and not _is_here(part.tokenizer)):
            continue
        from vla_foundry.robotics.action_tokens import read_fast_tokenizer

        try:
            tokenizer = read_fast_tokenizer(part.tokenizer)
        except (FileNotFoundError, IsADirectoryError):
            raise FileNotFoundError(
                f"{path}.tokenizer: there is no file {part.tokenizer}. Make it: `vla-foundry data action-tokenizer`."
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}.tokenizer: {error}") from None
        found[part.tokenizer] = ChunkFacts(
            num_steps=tokenizer.num_steps,
            action_dim=tokenizer.action_dim,
            fields=tuple(tokenizer.fields),
            normalization=tokenizer.normalization,
        )
    return found


def _is_here(location: str) -> bool:
    return not is_remote(location) and exists(location)


def _parts(model: BaseParams) -> list[tuple[str, BaseParams]]:
    values = [(item.name, getattr(model, item.name)) for item in fields(model)]
    return [(name, value) for name, value in values if isinstance(value, BaseParams)]


def _walk(model: BaseParams, path: str = "model") -> Iterator[tuple[str, BaseParams]]:
    """Yield a model and all of its parts, each with its config path."""
    yield path, model
    for name, part in _parts(model):
        yield from _walk(part, f"{path}.{name}")


def list_checkpoints(model: BaseParams) -> list[str]:
    """Return the checkpoint the model starts from, then those of its parts, in field order."""
    parts = (part for _, part in _walk(model) if isinstance(part, ModelParams | BackboneParams))
    return [part.resume_from_checkpoint for part in parts if part.resume_from_checkpoint is not None]


def _read_checkpoint_models(model: BaseParams, offline: bool) -> dict[str, ModelParams]:
    """Return the model params of each run that a part takes its weights and architecture from."""
    models: dict[str, ModelParams] = {}
    for path, part in _walk(model):
        if isinstance(part, VLMFoundryBackboneParams) and part.vlm is None and part.resume_from_checkpoint is not None:
            _check_checkpoint(part.resume_from_checkpoint, path, offline)
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
            return with_model_files(params, files) if _is_here(files) else params
    raise FileNotFoundError(
        f"model.vision_language_backbone.resume_from_checkpoint: {checkpoint} lies in no run folder (there is no "
        f"{MODEL_CONFIG_NAME} above it). Give a run folder, or the architecture in model.vision_language_backbone.vlm."
    )


def _read_named_tokenizer(name: str | None, offline: bool) -> TokenizerFacts | None:
    """Return the facts about the tokenizer named by data.tokenizer, or None if they cannot be read.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is on the hub, which cannot be reached.
    """
    if name is None:
        return None
    try:
        location = find_published(name, fetch=not offline) or f"hf://{name.removeprefix('hf://')}"
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"data.tokenizer or data.processor: {error}") from None
    if is_remote(location) and offline:
        return None
    try:
        return read_tokenizer(name, location)
    except (FileNotFoundError, ValueError):
        if location != name or is_remote(location) or offline:
            # loading the tokenizer will report the error; this function only reads its size
            return None
        raise FileNotFoundError(f"data.tokenizer: {name} is no folder with a tokenizer.json.") from None
