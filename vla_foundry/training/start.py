"""Where a run begins: in a new folder, at its own newest checkpoint, or at another run's."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vla_foundry.config.loading import dump_params, to_plain
from vla_foundry.params.experiment import TrainExperimentParams, load_experiment_params_from_yaml
from vla_foundry.run_folder import (
    CHECKPOINTS_FOLDER,
    COMPLETE_NAME,
    CONFIG_NAME,
    MODEL_CONFIG_NAME,
    STATE_NAME,
    WRITING_PREFIX,
    find_checkpoint,
    list_step_folders,
    read_step,
    verify,
)
from vla_foundry.storage.uri import download, is_remote, join_uri, list_files

# leaves that say how a run is started, not what it is
_INCIDENTAL = ("resume", "resolve_configs", "resolve_configs_path", "log_level")


def find_start(params: TrainExperimentParams, run_folder: Path, notify: Callable[[str], None]) -> Path | None:
    """Return the step folder that a run goes on from, verified; None: it starts anew.

    With resume "auto": the newest sound checkpoint of the run's folder, else of its remote copy. Else, or if there is
    none: model.resume_from_checkpoint, unless only its weights are wanted.

    Args:
        notify: takes a line for each damaged checkpoint that is passed over.

    Raises:
        ValueError: the run's folder is there and resume is not set; or there is no usable checkpoint.
    """
    if params.resume not in (None, "auto"):
        raise ValueError(
            f"resume must be auto or null, got '{params.resume}'. To start from another run's checkpoint, "
            "use --model.resume_from_checkpoint."
        )
    if params.resume is None and run_folder.is_dir() and any(run_folder.iterdir()):
        raise ValueError(
            f"The run folder {run_folder} is there already. Continue it with --resume auto, or choose another --name."
        )
    if params.resume == "auto":
        if list_step_folders(run_folder):
            return find_checkpoint(run_folder, notify=notify)
        if params.remote_sync is not None:
            step_folder = fetch_checkpoint(join_uri(params.remote_sync, run_folder.name), run_folder)
            if step_folder is not None:
                return step_folder
    source = params.model.resume_from_checkpoint
    if source is None or params.model.resume_weights_only:
        return None
    if source.endswith((".pt", ".safetensors")):
        raise ValueError(
            f"model.resume_from_checkpoint '{source}' holds weights alone, so training can not go on from it. "
            "Add --model.resume_weights_only true, or give a run folder."
        )
    if not is_remote(source):
        step_folder = find_checkpoint(source, notify=notify)
        if not (step_folder / STATE_NAME).is_file():
            raise ValueError(
                f"model.resume_from_checkpoint {step_folder} was imported and holds weights alone. Add "
                "--model.resume_weights_only true."
            )
        return step_folder
    step_folder = fetch_checkpoint(source, run_folder)
    if step_folder is None:
        raise ValueError(f"model.resume_from_checkpoint '{source}' has no complete checkpoint.")
    return step_folder


def fetch_checkpoint(source: str, run_folder: Path) -> Path | None:
    """Download the newest complete checkpoint of a remote run or step folder into a run's folder, and verify it.

    Returns:
        The step folder; None if there is none at `source`.
    """
    try:
        files = list_files(source)
    except FileNotFoundError:
        return None
    marks = [file.removesuffix(f"/{COMPLETE_NAME}") for file in files if file.endswith(f"/{COMPLETE_NAME}")]
    if not marks:
        return None
    newest = max(marks, key=lambda mark: read_step(Path(mark.rpartition("/")[2])))
    final = run_folder / CHECKPOINTS_FOLDER / newest.rpartition("/")[2]
    aside = final.with_name(WRITING_PREFIX + final.name)
    shutil.rmtree(aside, ignore_errors=True)
    for file in files:
        if file.startswith(f"{newest}/"):
            download(file, str(aside / file.removeprefix(f"{newest}/")))
    verify(aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    return final


def write_configs(params: TrainExperimentParams, run_folder: Path) -> list[str]:
    """Write config.yaml and config_model.yaml.

    Returns:
        What differs from the config that was there, one line a leaf.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / CONFIG_NAME
    changes: list[str] = []
    if path.is_file():
        before = _leaves(to_plain(load_experiment_params_from_yaml(str(path))))
        now = _leaves(to_plain(params))
        changes = [
            f"{name} was {before.get(name)}, is {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and name not in _INCIDENTAL
        ]
    path.write_text(dump_params(params))
    (run_folder / MODEL_CONFIG_NAME).write_text(dump_params(params.model, params.plugins))
    return changes


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves.update(_leaves(item, f"{path}.{key}" if path else str(key)))
    return leaves
