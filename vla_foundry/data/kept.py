"""What a run, a checkpoint or a published model says about its tokenizer, images and statistics."""

import itertools
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vla_foundry.params.facts import ImageFacts, TokenizerFacts
from vla_foundry.params.models.roles import TIMM_PREFIX
from vla_foundry.parsing import as_json, parse_object
from vla_foundry.robotics.spec import SPEC_NAME, NamedSpec, parse_spec
from vla_foundry.run_folder import (
    CONFIG_NAME,
    DATASETS_FOLDER,
    MODEL_CONFIG_NAME,
    PROCESSOR_CONFIG_NAME,
    PROCESSOR_FOLDER,
    STATE_NAME,
    TOKENIZER_FOLDER,
    find_fault,
    list_step_folders,
    newest_step_folder,
    run_folder_candidates,
)
from vla_foundry.storage.uri import exists, is_remote, join_uri, list_files, read_text, read_yaml
from vla_foundry.text.tokenizers import Vocabulary, read_vocabulary

# folders of a run that hold a tokenizer, the fuller one first
_KEPT = (PROCESSOR_FOLDER, TOKENIZER_FOLDER)


def find_run_spec(checkpoint: str, offline: bool) -> NamedSpec | None:
    """Return the dataset spec saved in the run of a checkpoint, or None."""
    if is_remote(checkpoint) and offline:
        return None
    for folder in run_folder_candidates(checkpoint):
        location = join_uri(folder, SPEC_NAME)
        if exists(location):
            return NamedSpec(folder, parse_spec(read_text(location), location))
    return None


def read_model_config(checkpoint: str) -> dict[str, Any]:
    """Return the model config of a checkpoint's run, as written; {}: it has none."""
    for folder in run_folder_candidates(checkpoint):
        location = join_uri(folder, MODEL_CONFIG_NAME)
        if exists(location):
            with suppress(ValueError):  # damaged
                config = read_yaml(location)
                return config if isinstance(config, dict) else {}
    return {}


def describe_inputs(run_folder: str) -> dict[str, Any]:
    """Return what checkpoints keep about their inputs, from the files of a run folder: see `_read_inputs`."""
    tokenizer, images = read_kept_tokenizer(run_folder, run_folder), _read_kept_images(run_folder)
    inputs = {
        "tokenizer": None if tokenizer is None or tokenizer.vocabulary is None else tokenizer.vocabulary.to_record(),
        "images": None if images is None else asdict(images),
        **_describe_robot(run_folder),
        # of a mixture, the other robots
        "datasets": {folder.name: _describe_robot(str(folder)) for folder in _dataset_folders(run_folder)} or None,
    }
    return {name: value for name, value in inputs.items() if value is not None}


def _describe_robot(folder: str) -> dict[str, Any]:
    """Return how the numbers of a robot's fields were normalized, and its spec; {}: there is no robot."""
    found = {"normalization": _read_run_normalization(folder), "spec": _read_spec(folder)}
    return {name: value for name, value in found.items() if value is not None}


def _read_spec(folder: str) -> dict[str, Any] | None:
    location = join_uri(folder, SPEC_NAME)
    return as_json(asdict(parse_spec(read_text(location), location))) if exists(location) else None


def _dataset_folders(run_folder: str) -> list[Path]:
    return sorted(path for path in Path(run_folder, DATASETS_FOLDER).glob("*") if path.is_dir())


def _read_inputs(checkpoint: str) -> dict[str, Any]:
    """Return what the state.json of a checkpoint says about its tokenizer, images and normalization; {}: nothing.

    It goes with the weights, wherever a step folder is copied, and however the files of its run change.
    """
    folders = run_folder_candidates(checkpoint)[:2]
    if is_remote(checkpoint):
        with suppress(FileNotFoundError):
            newest = newest_step_folder(list_files(checkpoint))
            folders = [newest, *folders] if newest is not None else folders
    else:
        folders += map(str, list_step_folders(Path(checkpoint))[:1])
        folders = [folder for folder in folders if find_fault(Path(folder), only={STATE_NAME}) is None]
    found = (read_json(join_uri(folder, STATE_NAME)).get("inputs") for folder in folders)
    return next((inputs for inputs in found if isinstance(inputs, dict)), {})


def check_kept_inputs(run_folder: str, checkpoint: str) -> None:
    """Check that a run folder's tokenizer, images, statistics and specs are those that a checkpoint was trained with.

    Raises:
        ValueError: they are not; the model would read and write something else.
    """
    inputs = _read_inputs(checkpoint)
    tokenizer, record = read_kept_tokenizer(run_folder, run_folder), inputs.get("tokenizer")
    difference = None
    if tokenizer is not None and tokenizer.vocabulary is not None and record is not None:
        difference = Vocabulary.from_record(record).find_difference(tokenizer.vocabulary)
    images, record = _read_kept_images(run_folder), inputs.get("images")
    if difference is None and images is not None and record is not None:
        changed = ImageFacts.from_record(record).find_difference(images)
        difference = changed and f"images have {changed[0]} {changed[1]} in the one and {changed[2]} in the other"
    difference = difference or _find_robot_difference(run_folder, inputs, checkpoint)
    for name, robot in inputs.get("datasets", {}).items():
        folder = join_uri(run_folder, DATASETS_FOLDER, name)
        difference = difference or _find_robot_difference(folder, robot, checkpoint, f" of dataset '{name}'")
    if difference is not None:
        raise ValueError(
            f"{run_folder} does not hold the files that {checkpoint} was trained with: {difference}. "
            "Put the run's own tokenizer, processor, normalizer and robotics.json back."
        )


def _find_robot_difference(folder: str, inputs: dict[str, Any], checkpoint: str, of: str = "") -> str | None:
    """Return how the statistics or the spec in a folder differ from those of a checkpoint; None: they do not."""
    own, trained = _read_run_normalization(folder), _parse_normalization(inputs, checkpoint)
    if own is not None and trained is not None:
        for name, field in trained.items():
            if own["fields"].get(name) != field:
                return f"the statistics of '{name}'{of} differ"
    own, trained = _read_spec(folder), inputs.get("spec")
    # a field that this version knows and the one that saved the checkpoint did not is no difference
    if own is not None and isinstance(trained, dict):
        key = next((key for key in own if key in trained and own[key] != trained[key]), None)
        return key and f"{SPEC_NAME} has another '{key}'{of}"
    return None


def read_weights_tokenizer(place: str, name: str) -> TokenizerFacts | None:
    """Return the tokenizer that a checkpoint or a published model was trained with; None: unknown."""
    record = _read_inputs(place).get("tokenizer")
    if record is None:
        return read_kept_tokenizer(place, name)
    kept = None
    with suppress(ValueError):  # a damaged file, which a resume replaces
        kept = read_kept_tokenizer(place, name)
    trained = Vocabulary.from_record(record)
    if kept is not None and kept.vocabulary is not None and trained.find_difference(kept.vocabulary) is None:
        return kept
    return TokenizerFacts(name=f"of {name}", vocab_size=record["size"], vocabulary=trained)


def read_weights_images(place: str) -> ImageFacts | None:
    """Return how images were prepared in the training of a checkpoint or a published model; None: unknown."""
    record = _read_inputs(place).get("images")
    return _read_kept_images(place) if record is None else ImageFacts.from_record(record)


def read_weights_normalization(checkpoint: str | None, run: NamedSpec | None, offline: bool) -> dict[str, Any] | None:
    """Return how the numbers of each field were normalized in the training of a checkpoint; None: unknown."""
    if checkpoint is not None and not (is_remote(checkpoint) and offline):
        trained = _parse_normalization(_read_inputs(checkpoint), checkpoint)
        if trained is not None:
            return trained
    state = None if run is None else _read_run_normalization(run.name)
    return None if state is None else state["fields"]


def _parse_normalization(inputs: dict[str, Any], origin: str) -> dict[str, Any] | None:
    """Return how the numbers of each field were normalized, from what a checkpoint keeps; None: it does not say."""
    record = inputs.get("normalization")
    if record is None:
        return None
    from vla_foundry.robotics.normalization import RoboticsNormalizer

    return RoboticsNormalizer.from_state(record, origin=origin).state()["fields"]


def _read_run_normalization(folder: str) -> dict[str, Any] | None:
    """Return the state of a run's normalizer, or None if it keeps none."""
    from vla_foundry.data.robotics import load_normalizer

    try:
        return load_normalizer(folder).state()
    except FileNotFoundError:
        return None


def read_json(location: str) -> dict[str, Any]:
    """Return the JSON object in a file; {} if the file is missing or holds something else."""
    try:
        text = read_text(location)
    except FileNotFoundError:
        return {}
    try:
        return parse_object(text, location)
    except ValueError:
        return {}


def read_tokenizer(name: str, location: str) -> TokenizerFacts:
    found = read_vocabulary(location)
    return TokenizerFacts(name=name, vocab_size=found.size, image_token_id=found.image_token_id, vocabulary=found)


def read_kept_tokenizer(checkpoint: str, name: str) -> TokenizerFacts | None:
    """Return the processor, or else the tokenizer, kept with a checkpoint or a published model; None: it has none.

    Args:
        checkpoint: where it is.
        name: name of a published model.
    """
    runs = (folder for folder in run_folder_candidates(checkpoint) if exists(join_uri(folder, MODEL_CONFIG_NAME)))
    folders = [join_uri(run, kept) for run in itertools.islice(runs, 1) for kept in _KEPT]
    for folder in (*folders, checkpoint):
        with suppress(FileNotFoundError):
            return read_tokenizer(name if folder == checkpoint else folder, folder)
    return None


def read_images(folder: str) -> ImageFacts | None:
    """Return how the processor in a folder prepares images; None: unknown."""
    for file in (PROCESSOR_CONFIG_NAME, "processor_config.json", "preprocessor_config.json"):
        found = ImageFacts.from_config(read_json(join_uri(folder, file)))
        if found is not None:
            return found
    return None


def _read_kept_images(checkpoint: str) -> ImageFacts | None:
    """Return how the images of a checkpoint or a published model were prepared; None: unknown."""
    if checkpoint.startswith(TIMM_PREFIX):
        return None
    for folder in run_folder_candidates(checkpoint):
        if exists(join_uri(folder, MODEL_CONFIG_NAME)):
            kept = read_images(join_uri(folder, PROCESSOR_FOLDER))
            config = join_uri(folder, CONFIG_NAME)
            if kept is None and exists(config):
                # without text, a run has no processor, and the data's params say all of it
                with suppress(ValueError, AttributeError):  # damaged
                    data = read_yaml(config).get("data")
                    kept = ImageFacts.from_config(data) if isinstance(data, dict) else None
            return kept
    return read_images(checkpoint)
