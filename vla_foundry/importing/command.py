"""`vla-foundry import-checkpoint`: convert a run of the earlier implementation, completely or not at all."""

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.runs import ImportParams
from vla_foundry.run_folder import CONFIG_NAME, EXPERIMENT_NAME, MODEL_CONFIG_NAME, lock_folder, step_folder_name
from vla_foundry.storage.uri import download, is_remote, join_uri, name_of, read_text

if TYPE_CHECKING:
    from vla_foundry.importing.source import Source

# files that describe the earlier run, copied unchanged
_KEPT_NAMES = (
    CONFIG_NAME,
    MODEL_CONFIG_NAME,
    "vlm_config_model.yaml",
    "config_normalizer.yaml",
    "config_processor.yaml",
    "processing_metadata.json",
)
_KEPT_FOLDER = "imported"


def import_checkpoint(params: ImportParams) -> list[str]:
    """Create the run folder `params.output`.

    Returns:
        One line for each thing that changed.

    Raises:
        FileNotFoundError: part of the source is missing.
        ValueError: the output exists, or part of the source is not understood.
    """
    from vla_foundry.importing.source import read_source

    output = check_output(params.output)
    params = dataclasses.replace(params, output=str(output))
    source = read_source(params.source, params.checkpoint)
    with create_aside(output) as aside, tempfile.TemporaryDirectory(prefix="vla_foundry_import_") as scratch:
        return _write_run(params, source, aside, Path(scratch))


def check_output(name: str) -> Path:
    """Return the absolute path of a folder to create.

    Raises:
        ValueError: it exists, or is not on this machine's file system.
    """
    if "://" in name:
        raise ValueError(f"output {name} must be a folder of this machine. Give its path.")
    output = Path(name).expanduser().absolute()
    if output.exists():
        raise ValueError(f"output {name} exists. Choose another name, or delete it.")
    return output


@contextmanager
def create_aside(output: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `output` if all goes well, else it is deleted.

    Raises:
        ValueError: another process creates it, or has created it.
    """
    with lock_folder(output, what="output", flag="--output"):
        check_output(str(output))
        aside = output.with_name(f".importing_{output.name}")
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        aside.mkdir()
        try:
            yield aside
            aside.rename(output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _write_run(params: ImportParams, source: "Source", folder: Path, scratch: Path) -> list[str]:
    # import torch last: errors in the source up to here are reported within a second
    from vla_foundry.config.loading import dump_params
    from vla_foundry.importing.configs import translate
    from vla_foundry.importing.files import write_data_files
    from vla_foundry.importing.weights import describe_left_out, read_weights_facts, write_imported

    local = [None if name is None else _fetch(name, scratch) for name in (source.weights, source.ema)]
    assert local[0] is not None
    stored = read_weights_facts(local[0], local[1])
    config = translate(source, params, has_bf16_tables=stored.has_bf16_tables)
    experiment, data_lines = write_data_files(source, config, params, folder)
    (folder / MODEL_CONFIG_NAME).write_text(dump_params(config.model), encoding="utf-8")
    if experiment is not None:
        (folder / CONFIG_NAME).write_text(dump_params(experiment), encoding="utf-8")
    for name in _KEPT_NAMES:
        _keep(join_uri(source.folder, name), folder / _KEPT_FOLDER / name)
    count = write_imported(folder, config.model, stored)
    lines = [*config.lines, *data_lines, *describe_left_out(stored, config.model)]
    lines.append(
        f"{name_of(source.weights)}: {count:,} numbers of a {config.model.type} in {step_folder_name(stored.step)}"
        + ("." if source.ema is None else f", and their average ({name_of(source.ema)}).")
    )
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "source": source.folder,
        "checkpoint": name_of(source.weights),
        "notes": lines,
    }
    (folder / EXPERIMENT_NAME).write_text(
        json.dumps({"imported": record, "starts": []}, indent=1) + "\n", encoding="utf-8"
    )
    return lines


def _fetch(location: str, scratch: Path) -> Path:
    if not is_remote(location):
        return Path(location)
    local = scratch / name_of(location)
    download(location, str(local))
    return local


def _keep(location: str, target: Path) -> None:
    try:
        text = read_text(location)
    except FileNotFoundError:
        return
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")


def main(argv: list[str]) -> None:
    """Run `vla-foundry import-checkpoint` and print one line for each thing that changed."""
    params = parse_command(ImportParams, argv, prog="vla-foundry import-checkpoint")
    for line in import_checkpoint(params):
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"Run folder {params.output}\n")
