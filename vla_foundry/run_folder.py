"""The run folder: what it holds, which of its checkpoints is complete, and which process holds it.

    <save_path>/<name>/
      config.yaml, config_model.yaml   the resolved config, whole and its model section
      experiment.json                  the record of the run: what made it, from what, and what came of it
      evaluation/                      tables of evaluations, one JSON file each; absent if there is none
      metrics.jsonl                    one JSON object per line
      data_faults.jsonl                one JSON object per sample that could not be used; absent if there is none
      tokenizer/                       a Hugging Face tokenizer folder, where data is text
      processor/                       the processor of images and text, with its tokenizer
      normalizer.json, stats.json      how the numbers of robot data were normalised, and by what statistics
      robotics.json                    the model's spec: its cameras and fields, and what they mean
      preprocessing_config.yaml        how the robot data was preprocessed
      model_files/                     what a model's architecture needs beyond its params (Hugging Face's config.json)
      checkpoints/step_00000120/
        model.safetensors              all weights, tied ones once; ema.safetensors beside it where an average is kept;
                                       of a published run perhaps several files, and model.safetensors.index.json; of
                                       sharded ranks a file of each, with its rows of each tensor, and an index
        training_state/                optimizer moments, a file of each rank, tensors only (safetensors)
        state.json                     step, counters, parameter groups, the plan of the data, and what its tokenizer,
                                       images and statistics were
        COMPLETE                       {file: [bytes, SHA-256]}; a step folder without it is not a checkpoint

A step folder is written as `.writing_step_...` and renamed once all of it is on disk.
"""

import fcntl
import hashlib
import logging
import os
import posixpath
import re
import socket
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from vla_foundry.parsing import MAX_BYTES, parse_json, parse_object
from vla_foundry.shards import sha256_of

CONFIG_NAME = "config.yaml"
MODEL_CONFIG_NAME = "config_model.yaml"
EXPERIMENT_NAME = "experiment.json"
METRICS_NAME = "metrics.jsonl"
DATA_FAULTS_NAME = "data_faults.jsonl"
TOKENIZER_FOLDER = "tokenizer"
PROCESSOR_FOLDER = "processor"
PROCESSOR_CONFIG_NAME = "config_processor.json"
NORMALIZER_NAME = "normalizer.json"
STATISTICS_NAME = "stats.json"
PREPROCESSING_CONFIG_NAME = "preprocessing_config.yaml"
MODEL_FILES_FOLDER = "model_files"
FAST_TOKENIZER_NAME = "fast_tokenizer.json"
DATASETS_FOLDER = "datasets"
EVALUATION_FOLDER = "evaluation"
CHECKPOINTS_FOLDER = "checkpoints"

MODEL_WEIGHTS_NAME = "model.safetensors"
EMA_WEIGHTS_NAME = "ema.safetensors"
TRAINING_STATE_FOLDER = "training_state"
STATE_NAME = "state.json"
COMPLETE_NAME = "COMPLETE"
# of a run or dataset from the hub: {"files": {file: [bytes, SHA-256]}}, as it was published
PASSPORT_NAME = "passport.json"
WRITING_PREFIX = ".writing_"

_logger = logging.getLogger(__name__)
_STEP_PATTERN = re.compile(r"step_(\d+)")
_STEP_MARK = re.compile(rf"(^|/)step_(\d+)/{COMPLETE_NAME}$")


@contextmanager
def hold_lock(path: Path, *, wait: bool = False) -> Iterator[TextIO | None]:
    """Lock a file, which is created; the lock ends with the process that holds it, however it ends.

    Where the file system has no locks (some network and FUSE mounts), a file in this machine's temporary folder is
    locked in its place, and a notice says so.

    Yields:
        The open file; None if another process holds the lock and `wait` is False.
    """
    with path.open("a+", encoding="utf-8") as file, ExitStack() as stack:
        try:
            is_mine = _lock(file, wait)
        except OSError as error:
            _say_once(
                f"{path.parent} cannot be locked ({error.strerror}): a second process that uses it is noticed on this "
                "machine only."
            )
            name = f"vla_foundry_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.lock"
            is_mine = True
            with suppress(OSError):  # another user's
                is_mine = _lock(
                    stack.enter_context(Path(tempfile.gettempdir(), name).open("a", encoding="utf-8")), wait
                )
        yield file if is_mine else None


def _lock(file: TextIO, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@lru_cache
def _say_once(line: str) -> None:
    _logger.warning("%s", line)


@contextmanager
def lock_folder(folder: Path, *, what: str, flag: str) -> Iterator[None]:
    """Hold an output folder for this process: two commands that write to it would overwrite each other's files.

    The lock is on the file `.<name>.lock` beside the folder, or in it where only the folder is writable (a mount).

    Args:
        folder: the folder; it need not exist.
        what: kind of folder, for the message.
        flag: command-line flag that chooses another folder, for the message.

    Raises:
        ValueError: another process holds the folder; the message names the process and its host.
    """
    whole = folder.resolve()
    is_beside = not whole.exists() or os.access(whole.parent, os.W_OK)
    path = (whole.parent if is_beside else whole) / f".{whole.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(path) as file:
        if file is None:
            owner = path.read_text(encoding="utf-8").strip() or "another process"
            raise ValueError(
                f"The {what} {folder} is in use by {owner}. Wait until that process ends, or choose another {flag}."
            )
        # unbuffered, because a full disk must not fail here: the name only makes the message better
        with suppress(OSError):
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def run_folder_candidates(checkpoint: str) -> list[str]:
    """Return where a checkpoint's run folder can be, nearest first: the checkpoint itself or a folder above it.

    Args:
        checkpoint: path or URI of a run folder, a step folder, or a file of weights.
    """
    scheme, mark, path = checkpoint.rpartition("://")
    place = path.rstrip("/") if mark else os.path.abspath(os.path.expanduser(checkpoint))
    found = [place]
    # the deepest case is run/checkpoints/step_N/model.safetensors; nothing is above a repository of the hub
    is_hub = scheme == "hf"
    top = 2 + (place.partition("/")[0] in ("datasets", "spaces")) if is_hub else 0
    for _ in range(min(3, place.count("/") + 1 - top) if is_hub else 3):
        place = posixpath.dirname(place) or place
        found.append(place)
    return [scheme + mark + folder for folder in dict.fromkeys(found)]


def index_name(weights_name: str) -> str:
    """Return the name of the index beside weights that are divided into several files."""
    return f"{weights_name}.index.json"


def newest_step_folder(files: Iterable[str]) -> str | None:
    """Return the complete step folder with the highest number among the paths of a remote folder's files."""
    steps = {int(match[2]): file for file in files if (match := _STEP_MARK.search(file)) is not None}
    return posixpath.dirname(steps[max(steps)]) if steps else None


def step_folder_name(step: int) -> str:
    """Return the folder name of the checkpoint written after `step` optimizer steps."""
    return f"step_{step:08d}"


def read_step(step_folder: Path) -> int:
    """Return the number of optimizer steps from a step folder's name."""
    match = _STEP_PATTERN.fullmatch(step_folder.name)
    if match is None:
        raise ValueError(f"'{step_folder}' is not a checkpoint: its name must be step_<number>.")
    return int(match.group(1))


def weights_patterns(weights_name: str) -> set[str]:
    """Return patterns of the files that hold weights: the one of that name, or several and their index."""
    return {weights_name, index_name(weights_name), f"{weights_name.removesuffix('.safetensors')}-*.safetensors"}


def list_step_folders(run_folder: Path) -> list[Path]:
    """Return a run's step folders, newest first, complete or not."""
    checkpoints = run_folder / CHECKPOINTS_FOLDER
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.iterdir() if path.is_dir() and _STEP_PATTERN.fullmatch(path.name)]
    return sorted(folders, key=read_step, reverse=True)


def find_fault(step_folder: Path, only: Collection[str] | None = None) -> str | None:
    """Compare a step folder with its COMPLETE file, sizes first, then SHA-256.

    Args:
        only: names of the files to compare, or patterns as `*.safetensors`; None: all.

    Returns:
        None, or the fault of the first bad file, beginning with its path.
    """
    mark = step_folder / COMPLETE_NAME
    if not mark.is_file():
        return f"{mark} is missing, so the checkpoint was never finished"
    try:
        listed = parse_object(_read_limited(mark), str(mark))
    except ValueError as error:
        return str(error).removesuffix(".")
    for name, entry in listed.items():
        if not isinstance(entry, list) or [type(value) for value in entry] != [int, str]:
            return f"{mark}: '{name}' must be [bytes, SHA-256], not {entry!r}"
    wanted = [name for name in listed if only is None or any(fnmatchcase(name, pattern) for pattern in only)]
    entries = {step_folder / name: listed[name] for name in wanted}
    for path, (size, _) in entries.items():
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, not the {size} it was written with"
    for path, (_, digest) in entries.items():
        with path.open("rb") as file:
            if sha256_of(file) != digest:
                return f"{path} does not have the SHA-256 it was written with"
    return None


def _read_limited(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are read.")
    return path.read_bytes()


def read_side_file(path: Path) -> Any:
    """Return the contents of a JSON file of a run folder; None if it is missing or damaged, which a resume survives."""
    try:
        return parse_json(_read_limited(path), str(path))
    except (FileNotFoundError, ValueError):
        return None


def find_checkpoint(
    path: str | Path, *, only: Collection[str] | None = None, notify: Callable[[str], None] | None = None
) -> Path:
    """Return the step folder for `path`: the path itself, or the newest complete one of a run folder.

    Args:
        path: a run folder or a step folder.
        only: names or patterns of the files that must be intact; None: all. Reading weights does not need the rest.
        notify: called with one line for each newer checkpoint that is skipped because it is damaged.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the run has no usable checkpoint; the message says what is wrong with the newest.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Checkpoint folder {folder} does not exist. Give a run folder or one of its step folders."
        )
    if (folder / COMPLETE_NAME).is_file() or _STEP_PATTERN.fullmatch(folder.name):
        fault = find_fault(folder, only)
        if fault is not None:
            raise ValueError(f"Checkpoint {folder} is not usable: {fault}. Use an older step folder.")
        return folder
    run_folder = folder.parent if folder.name == CHECKPOINTS_FOLDER else folder
    first_fault = ""
    for step_folder in list_step_folders(run_folder):
        fault = find_fault(step_folder, only)
        if fault is None:
            return step_folder
        first_fault = first_fault or fault
        if notify is not None:
            notify(f"Checkpoint {step_folder.name} is skipped: {fault}.")
    reason = f": {first_fault}" if first_fault else f": {run_folder / CHECKPOINTS_FOLDER} has no step folders"
    raise ValueError(f"{run_folder} has no usable checkpoint{reason}.")
