"""`vla-foundry merge`: make a run folder with whole weights of a run that trained adapters (LoRA), or sharded."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vla_foundry.config.command_line import parse_command
from vla_foundry.importing.command import check_output, create_aside
from vla_foundry.inference.loading import find_run_folder
from vla_foundry.params.commands.runs import MergeParams
from vla_foundry.params.experiment import load_experiment_params_from_yaml
from vla_foundry.params.models.policy import list_starts, without_starts
from vla_foundry.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_NAME,
    EMA_WEIGHTS_NAME,
    EXPERIMENT_NAME,
    METRICS_NAME,
    MODEL_CONFIG_NAME,
    MODEL_WEIGHTS_NAME,
    read_step,
    step_folder_name,
)
from vla_foundry.storage.uri import download, join_uri, list_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

# what the run keeps of its training
_LEFT_OUT = (CHECKPOINTS_FOLDER, CONFIG_NAME, MODEL_CONFIG_NAME, METRICS_NAME, EXPERIMENT_NAME, "tensorboard", "wandb")


def merge(params: MergeParams) -> Path:
    """Create the run folder `params.output`: the run's files, and its newest or named checkpoint, merged.

    Returns:
        The step folder.

    Raises:
        FileNotFoundError: the run, or what its adapters belong to, is missing.
        ValueError: the output exists, or the run's weights are whole.
    """
    output = check_output(params.output)
    run_folder = find_run_folder(params.checkpoint)
    experiment = load_experiment_params_from_yaml(join_uri(run_folder, CONFIG_NAME))
    adapted = experiment.model
    # import torch last: errors up to here are reported within a second
    import torch

    from vla_foundry.config.loading import dump_params
    from vla_foundry.importing.weights import write_step_folder
    from vla_foundry.inference.loading import load_run_model
    from vla_foundry.models.weights import has_ema, locate_weights

    weights = Path(locate_weights(params.checkpoint))
    if adapted.lora is None and weights.suffix != ".json":
        raise ValueError(
            f"checkpoint {params.checkpoint} has no adapters (model.lora) and its weights are one file, so there is "
            "nothing to merge."
        )
    step = read_step(weights.parent)

    def load_each() -> "Iterator[tuple[str, nn.Module]]":
        for name, use_ema in ((MODEL_WEIGHTS_NAME, False), (EMA_WEIGHTS_NAME, True)):
            if not use_ema or has_ema(params.checkpoint):
                yield name, load_run_model(adapted, run_folder, params.checkpoint, use_ema, torch.device("cpu"))

    model = without_starts(replace(adapted, lora=None))
    experiment = replace(experiment, model=model, name=output.name, save_path=str(output.parent), remote_sync=None)
    with create_aside(output) as aside:
        write_step_folder(aside, step, load_each())
        for file in list_files(run_folder):
            name = file.removeprefix(run_folder).lstrip("/")
            if name.partition("/")[0] not in _LEFT_OUT and not name.startswith("."):
                download(file, str(aside / name))
        (aside / CONFIG_NAME).write_text(dump_params(experiment), encoding="utf-8")
        (aside / MODEL_CONFIG_NAME).write_text(dump_params(model, experiment.plugins), encoding="utf-8")
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "checkpoint": params.checkpoint,
            "base": list_starts(adapted),
        }
        (aside / EXPERIMENT_NAME).write_text(
            json.dumps({"merged": record, "starts": []}, indent=1) + "\n", encoding="utf-8"
        )
    return output / CHECKPOINTS_FOLDER / step_folder_name(step)


def main(argv: list[str]) -> None:
    """Run `vla-foundry merge` and print where the whole weights are."""
    sys.stdout.write(f"{merge(parse_command(MergeParams, argv, prog='vla-foundry merge'))}\n")
