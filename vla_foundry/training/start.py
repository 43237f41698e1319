"""Start a run: find the checkpoint it continues from, and write configs and tokenizer to its folder."""

import json
import os
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from vla_foundry.config.loading import dump_params, to_plain
from vla_foundry.config.schema import EXPANDED, BaseParams, annotated_types
from vla_foundry.data.facts import read_provenance
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.experiment import TrainExperimentParams, load_experiment_params_from_yaml
from vla_foundry.params.models.policy import without_starts
from vla_foundry.robotics.spec import SPEC_NAME
from vla_foundry.run_folder import (
    CHECKPOINTS_FOLDER,
    COMPLETE_NAME,
    CONFIG_NAME,
    DATA_FAULTS_NAME,
    DATASETS_FOLDER,
    EXPERIMENT_NAME,
    METRICS_NAME,
    MODEL_CONFIG_NAME,
    MODEL_FILES_FOLDER,
    MODEL_WEIGHTS_NAME,
    NORMALIZER_NAME,
    PREPROCESSING_CONFIG_NAME,
    PROCESSOR_FOLDER,
    STATE_NAME,
    STATISTICS_NAME,
    TOKENIZER_FOLDER,
    TRAINING_STATE_FOLDER,
    WRITING_PREFIX,
    find_checkpoint,
    find_fault,
    list_step_folders,
    read_step,
    weights_patterns,
)
from vla_foundry.storage.hub import loading_published
from vla_foundry.storage.local import TEMPORARY_SUFFIX, IncompleteDownload, replace_folder
from vla_foundry.storage.uri import download, is_remote, join_uri, list_files, parent_uri, write_text
from vla_foundry.text.tokenizers import GENERATION_NAME, read_end_token_ids, read_vocabulary
from vla_foundry.training.distributed import gather_objects, main_rank_first
from vla_foundry.training.metrics import TENSORBOARD_FOLDER, WANDB_ID_NAME
from vla_foundry.world import World

P = TypeVar("P", bound=BaseParams)
# what a start writes to a run folder, and what the run then logs there
_START_FILES = frozenset((
    CONFIG_NAME, MODEL_CONFIG_NAME, TOKENIZER_FOLDER, PROCESSOR_FOLDER, NORMALIZER_NAME, STATISTICS_NAME, SPEC_NAME,
    PREPROCESSING_CONFIG_NAME, MODEL_FILES_FOLDER, DATASETS_FOLDER,
))  # fmt: skip
_LOG_FILES = frozenset((
    METRICS_NAME, DATA_FAULTS_NAME, EXPERIMENT_NAME, TENSORBOARD_FOLDER, WANDB_ID_NAME, "wandb",
))  # fmt: skip
# params that say how to start a run, not what it trains
_INCIDENTAL = ("resume", "resolve_configs", "resolve_configs_path", "log_level")


def check_same_config(params: TrainExperimentParams, world: World) -> None:
    """Collective: call on every rank. Check that all ranks were given one config, but for where they find files.

    Raises:
        ValueError: they were not, as happens where two runs meet at one address.
    """
    every = gather_objects(dict(_list_values(params)))

    def check() -> None:
        for rank, given in enumerate(every):
            other = [key for key in every[0] | given if every[0].get(key) != given.get(key)]
            if other:
                raise ValueError(
                    f"{other[0]} is {given.get(other[0])} on rank {rank}, but {every[0].get(other[0])} on rank 0. Give "
                    "all ranks of a run the same config, and each run an address of its own (MASTER_ADDR, MASTER_PORT)."
                )

    main_rank_first(world, check)


def _list_values(params: BaseParams, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value but those of data, and paths and URIs, which may differ between machines."""
    hints = annotated_types(type(params))
    for name, value in to_plain(params).items():
        section = getattr(params, name, None)
        if isinstance(section, BaseParams) and not isinstance(section, DataParams):
            yield from _list_values(section, f"{path}{name}.")
        elif not isinstance(section, DataParams) and not _holds_locations(hints.get(name)):
            yield f"{path}{name}", value


def _holds_locations(hint: Any) -> bool:
    return hint == EXPANDED or any(map(_holds_locations, get_args(hint)))


def find_start(params: TrainExperimentParams, run_folder: Path, notify: Callable[[str], None]) -> Path | None:
    """Return the verified step folder that a run continues from; None starts a new run.

    resume "auto" takes the newest valid checkpoint of the run's folder, else of its remote copy. Without one, or
    without resume, model.resume_from_checkpoint decides, unless it only provides weights.

    Args:
        notify: called with one line for each damaged checkpoint that is skipped.

    Raises:
        ValueError: the run's folder has checkpoints, or files of something else, and resume is not set; or there is no
            usable checkpoint.
    """
    if params.resume not in (None, "auto"):
        raise ValueError(
            f"resume must be auto or null, got '{params.resume}'. To start from another run's checkpoint, "
            "use --model.resume_from_checkpoint."
        )
    if params.resume is None and list_step_folders(run_folder):
        raise ValueError(
            f"The run folder {run_folder} has checkpoints. Continue it with --resume auto, or choose another --name."
        )
    _clear_attempt(params, run_folder, notify)
    if params.resume == "auto":
        if list_step_folders(run_folder):
            return _check_state(find_checkpoint(run_folder, notify=notify))
        if params.remote_sync is not None:
            remote = join_uri(params.remote_sync, run_folder.name)
            step_folder = fetch_checkpoint(remote, run_folder, notify=notify, with_metrics=True)
            if step_folder is not None:
                return step_folder
    source = params.model.resume_from_checkpoint
    if source is None or params.model.resume_weights_only:
        return None
    if source.endswith((".pt", ".safetensors")):
        raise ValueError(
            f"model.resume_from_checkpoint '{source}' holds only weights, so training cannot continue from it. "
            "Add --model.resume_weights_only true, or give a run folder."
        )
    if not is_remote(source):
        return _check_state(find_checkpoint(source, notify=notify), f"model.resume_from_checkpoint {source}")
    step_folder = fetch_checkpoint(source, run_folder, notify=notify)
    if step_folder is None:
        raise ValueError(f"model.resume_from_checkpoint '{source}' has no complete checkpoint.")
    try:
        return _check_state(step_folder, f"model.resume_from_checkpoint {source}")
    except ValueError:
        shutil.rmtree(step_folder)
        with suppress(OSError):  # of a new run, nothing is left
            step_folder.parent.rmdir()
            run_folder.rmdir()
        raise


def _check_state(step_folder: Path, what: str = "") -> Path:
    """Check that training can continue from a step folder: imported and published ones hold weights alone."""
    if not (step_folder / STATE_NAME).is_file() or not (step_folder / TRAINING_STATE_FOLDER).is_dir():
        raise ValueError(
            f"{what or step_folder} holds only weights, so training cannot continue from it. Start a new run from it "
            "with --model.resume_weights_only true."
        )
    return step_folder


def _clear_attempt(params: TrainExperimentParams, run_folder: Path, notify: Callable[[str], None]) -> None:
    """Delete what an attempt that saved no checkpoint wrote, so that it neither blocks its name nor leaves its data."""
    names = {path.name for path in run_folder.glob("*") if not path.name.startswith(".")}
    if not names or list_step_folders(run_folder):
        return
    others = [f"{CHECKPOINTS_FOLDER}/{path.name}" for path in (run_folder / CHECKPOINTS_FOLDER).glob("*")]
    strangers = sorted(names - _START_FILES - _LOG_FILES - {CHECKPOINTS_FOLDER}) + sorted(others)
    if strangers and params.resume is None:
        raise ValueError(
            f"The folder {run_folder} holds {strangers[0]}, which is not part of a run. Choose another --name."
        )
    if not strangers and CONFIG_NAME in names:
        notify(f"{run_folder} held an attempt without a checkpoint, which is replaced.")
        # resume auto continues its logs
        for name in sorted(names & (_START_FILES if params.resume else _START_FILES | _LOG_FILES)):
            path = run_folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_unfinished(run_folder: Path) -> None:
    """Delete what a killed process left half-written; call it while holding the run."""
    for path in [
        *run_folder.glob(f".*{TEMPORARY_SUFFIX}"),
        *run_folder.glob(f"{CHECKPOINTS_FOLDER}/{WRITING_PREFIX}*"),
    ]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def fetch_checkpoint(
    source: str, run_folder: Path, *, notify: Callable[[str], None] | None = None, with_metrics: bool = False
) -> Path | None:
    """Download the newest checkpoint of a remote run or step folder that verifies into a run's folder.

    Args:
        source: the remote folder.
        run_folder: where the step folder goes.
        notify: called with one line for each damaged checkpoint that is skipped.
        with_metrics: download metrics.jsonl and data_faults.jsonl too, so that the continued run appends to them.

    Returns:
        The step folder; None if `source` has no checkpoint.

    Raises:
        ValueError: every checkpoint is damaged; the message is about the newest one.
    """
    try:
        files = list_files(source)
    except FileNotFoundError:
        return None
    marks = [file.removesuffix(f"/{COMPLETE_NAME}") for file in files if file.endswith(f"/{COMPLETE_NAME}")]
    marks.sort(key=lambda mark: read_step(Path(mark.rpartition("/")[2])), reverse=True)
    faults = []
    for mark in marks:
        final = run_folder / CHECKPOINTS_FOLDER / mark.rpartition("/")[2]
        aside = final.with_name(WRITING_PREFIX + final.name)
        fault: str | None = None
        # bytes that were damaged on their way are right the second time
        for _ in range(2):
            shutil.rmtree(aside, ignore_errors=True)
            try:
                for file in files:
                    if file.startswith(f"{mark}/"):
                        download(file, str(aside / file.removeprefix(f"{mark}/")))
                fault = find_fault(aside)
            except (IncompleteDownload, FileNotFoundError) as error:
                fault = str(error).removesuffix(".")
            if fault is None:
                break
        if fault is not None:
            shutil.rmtree(aside, ignore_errors=True)
            faults.append(f"Checkpoint {mark} is not usable: {fault}.")
            if notify is not None:
                notify(faults[-1])
            continue
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        if with_metrics:
            _fetch_logs(source, files, run_folder)
        return final
    if faults:
        raise ValueError(f"{faults[0]} {source} has no other usable checkpoint.")
    return None


def fetch_to_other_disks(params: TrainExperimentParams, world: World, run_folder: Path, checkpoint: Path) -> None:
    """Collective: call on every rank. Fetch rank 0's checkpoint on machines that do not see its disk.

    Raises:
        ValueError: neither the run's remote copy nor what it starts from has it.
    """
    is_found = True
    if world.local_rank == 0 and not checkpoint.is_dir():
        copy = params.remote_sync and join_uri(params.remote_sync, run_folder.name, CHECKPOINTS_FOLDER, checkpoint.name)
        sources = [source for source in (copy, params.model.resume_from_checkpoint) if source and is_remote(source)]
        is_found = any(fetch_checkpoint(source, run_folder) == checkpoint for source in sources)
    if all(gather_objects(is_found)):
        return
    if not world.is_main:
        raise SystemExit(2)
    raise ValueError(
        f"Not every machine has the checkpoint {checkpoint}. Put save_path on a file system that all share, or give "
        "--remote_sync, from which they fetch it."
    )


def _fetch_logs(source: str, files: Container[str], run_folder: Path) -> None:
    for name in (METRICS_NAME, DATA_FAULTS_NAME):
        if join_uri(source, name) in files:
            download(join_uri(source, name), str(run_folder / name))


def write_configs(params: TrainExperimentParams, run_folder: Path) -> list[str]:
    """Write config.yaml, and config_model.yaml: the architecture alone, without the checkpoints it started from.

    Returns:
        Differences from the config that the folder already had, one line per leaf.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / CONFIG_NAME
    changes: list[str] = []
    if path.is_file():
        try:
            before = _leaves(to_plain(load_experiment_params_from_yaml(str(path))))
        except ValueError as error:
            changes.append(f"{path} is rewritten, because it could not be read: {error}")
        else:
            now = _leaves(to_plain(params))
            changes += [
                f"{name} was {before.get(name)}, is {now.get(name)}"
                for name in sorted(before.keys() | now.keys())
                if before.get(name) != now.get(name) and name not in _INCIDENTAL
            ]
    write_text(str(path), dump_params(params))
    write_text(str(run_folder / MODEL_CONFIG_NAME), dump_params(without_starts(params.model), params.plugins))
    return changes


def pin_starts(params: P) -> P:
    """Return model params that start from step folders, not from runs that may go on; remote ones stay as they are."""
    changed: dict[str, Any] = {}
    for item in fields(params):
        value: Any = getattr(params, item.name)
        if isinstance(value, BaseParams):
            changed[item.name] = pin_starts(value)
        elif item.name == "resume_from_checkpoint" and value is not None and list_step_folders(Path(value)):
            changed[item.name] = str(find_checkpoint(value, only=weights_patterns(MODEL_WEIGHTS_NAME)))
    return replace(params, **changed)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves.update(_leaves(item, f"{path}.{key}" if path else str(key)))
    return leaves


def copy_tokenizer(data: DataParams, run_folder: Path) -> list[str]:
    """Copy data.tokenizer, else the tokenizer beside the first manifest, to the run: its folder must be self-contained.

    The tokens that end the datasets' documents are recorded with it, for they need not be the tokenizer's own. Data
    with images saves its processor instead, which includes the tokenizer. Without a tokenizer nothing is copied.

    Returns:
        Lines for the user: whether what the folder had was damaged, and is replaced.

    Raises:
        FileNotFoundError: data.tokenizer names a remote folder that does not exist.
        ValueError: data.tokenizer or data.processor cannot be loaded.
    """
    target = run_folder / (PROCESSOR_FOLDER if isinstance(data, ImageProcessorParams) else TOKENIZER_FOLDER)
    notices = _remove_damaged(target)
    if isinstance(data, ImageProcessorParams):
        if data.tokenizer_name() is not None:
            _save_processor(data, target)
        return notices
    if not isinstance(data, TextDataParams) or not (data.dataset_manifest or data.tokenizer):
        return notices
    folders = [parent_uri(manifest) for manifest in data.dataset_manifest]
    if target.is_dir():
        pass
    elif data.tokenizer is None:
        try:
            _copy_folder(join_uri(folders[0], TOKENIZER_FOLDER), target)
        except FileNotFoundError:
            return notices
    elif is_remote(data.tokenizer) or os.path.isdir(data.tokenizer):
        _copy_folder(data.tokenizer, target)
    else:
        _save_named(data.tokenizer, target)
    found = [read_provenance(folder) for folder in folders]
    ends = {facts["eos_token_id"] for facts in found if "eos_token_id" in facts}
    known = read_end_token_ids(target)
    if not ends <= set(known):
        write_text(str(target / GENERATION_NAME), json.dumps({"eos_token_id": sorted({*known, *ends})}) + "\n")
    return notices


def _remove_damaged(folder: Path) -> list[str]:
    """Delete a run's tokenizer or processor if its files are damaged; return lines for the user."""
    try:
        read_end_token_ids(folder)
        read_vocabulary(folder)
    except FileNotFoundError:  # there is none, or it is of another kind
        return []
    except ValueError as error:
        shutil.rmtree(folder)
        return [f"{folder} is replaced: {str(error).removesuffix('.')}."]
    return []


def _save_processor(data: ImageProcessorParams, target: Path) -> None:
    if target.is_dir():
        return
    from vla_foundry.data.pipelines.image_caption import create_image_processor

    with replace_folder(target) as aside:
        create_image_processor(data).save(aside)


def _copy_folder(source: str, target: Path) -> None:
    files = list_files(source)
    with replace_folder(target) as aside:
        for file in files:
            download(file, str(aside / file.removeprefix(source).lstrip("/")))


def _save_named(name: str, target: Path) -> None:
    from transformers import AutoTokenizer

    with loading_published(f"data.tokenizer '{name}'", name=name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    with replace_folder(target) as aside:
        tokenizer.save_pretrained(str(aside))
