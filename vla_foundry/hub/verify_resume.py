"""`vla-foundry verify-resume`: prove for a config that a run which is killed and resumed is the run never killed.

    whole     steps 1 to 2k
    killed    steps 1 to k, a checkpoint, SIGKILL in a later step, and resumed to 2k

Both are trained as `vla-foundry train` or torchrun train them. Losses, weights, moments and counters must be the same
bits.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

from vla_foundry.config.command_line import parse_command
from vla_foundry.config.loading import dump_params
from vla_foundry.config.resolve import resolve
from vla_foundry.data.facts import read_facts
from vla_foundry.params.commands.sharing import VerifyResumeParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.progress import say
from vla_foundry.record import read_losses
from vla_foundry.run_folder import (
    CHECKPOINTS_FOLDER,
    COMPLETE_NAME,
    EMA_WEIGHTS_NAME,
    MODEL_WEIGHTS_NAME,
    STATE_NAME,
    TRAINING_STATE_FOLDER,
    step_folder_name,
)
from vla_foundry.storage.uri import read_object

_POLL_S = 0.02


def training_command(config: Path, num_processes: int) -> list[str]:
    """Return the command that trains a config in `num_processes` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    words = ["-m", "vla_foundry.main", "--config_path", str(config)]
    return [sys.executable, *(launcher if num_processes > 1 else []), *words]


def verify_resume(params: VerifyResumeParams) -> dict[str, bool]:
    """Train twice, kill and resume the second, and compare.

    Returns:
        For each thing compared, whether it is the same in both.

    Raises:
        ValueError: the config cannot be trained, the output exists, or training fails.
        FileNotFoundError: a file that the config names does not exist.
    """
    output = Path(params.output).absolute()
    if output.exists():
        raise ValueError(f"output {params.output} exists. Choose another name, or delete it.")
    job = _shorten(params, output)
    output.mkdir(parents=True)
    runs = {}
    for name in ("whole", "killed"):
        runs[name] = output / name
        config = output / f"{name}.yaml"
        config.write_text(dump_params(replace(job, name=name)), encoding="utf-8")
        command = training_command(config, params.num_processes)
        if name == "killed":
            _train_and_kill(command, runs[name], params.steps)
        say(f"{name}: {'goes on' if name == 'killed' else 'trains'} to step {2 * params.steps}")
        _check(subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode)
    return dict(compare(runs["whole"], runs["killed"], params.steps))


def _shorten(params: VerifyResumeParams, output: Path) -> TrainExperimentParams:
    """Return the config of a run of 2k steps that saves at step k, and at the end."""
    names = [field.name for field in fields(TrainExperimentParams)]
    job = TrainExperimentParams(**{name: getattr(params, name) for name in names})
    job = replace(
        job,
        total_train_samples=2 * params.steps * params.hparams.global_batch_size,
        num_epochs=None,
        num_checkpoints=2,
        checkpoint_every_minutes=None,
        max_checkpoint_limit=None,
        total_val_samples=None,
        log_every_n_steps=1,
        save_path=str(output),
        resume="auto",
        remote_sync=None,
        wandb=False,
        tensorboard=False,
    )
    # what cannot be trained is said once, and before anything is made
    resolve(replace(job, resume=None), read_facts(job, params.num_processes))
    return job


def _train_and_kill(command: list[str], run: Path, steps: int) -> None:
    """Train, and kill all processes in a step after the checkpoint of step `steps`."""
    mark = run / CHECKPOINTS_FOLDER / step_folder_name(steps) / COMPLETE_NAME
    last = run / CHECKPOINTS_FOLDER / step_folder_name(2 * steps)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None:
            if mark.exists() and _count_steps(run) > steps:
                break
            time.sleep(_POLL_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    _check(0 if code == -signal.SIGKILL else code)
    if last.exists():
        raise ValueError(f"Training ended before it could be killed. Raise --steps above {steps}.")
    say(f"killed: SIGKILL in step {_count_steps(run) + 1}, after the checkpoint of step {steps}")


def _count_steps(run: Path) -> int:
    return max((step for step, _ in read_losses(run)["train"]), default=0)


def _check(code: int) -> None:
    if code:
        raise ValueError(f"Training ended with code {code}; see above.")


def compare(whole: Path, killed: Path, steps: int) -> Iterator[tuple[str, bool]]:
    """Yield each thing that two runs of 2k steps must have in common, and whether they do."""
    # a step that was done again counts as it was then
    losses = [dict(map(tuple, read_losses(run)["train"])) for run in (whole, killed)]
    for when, first in (("before", 1), ("after", steps + 1)):
        among = range(first, first + steps)
        is_same = all(step in losses[0] and losses[0][step] == losses[1].get(step) for step in among)
        yield f"losses {when} the checkpoint", is_same
    folders = [run / CHECKPOINTS_FOLDER / step_folder_name(2 * steps) for run in (whole, killed)]
    files = [read_object(str(folder / COMPLETE_NAME)) for folder in folders]
    for name, what in ((MODEL_WEIGHTS_NAME, "weights"), (EMA_WEIGHTS_NAME, "averaged weights")):
        # one file, or one of each rank
        pair = [{file: each[file] for file in each if file.startswith(Path(name).stem)} for each in files]
        if pair[0] or pair[1]:
            yield what, pair[0] == pair[1]
    moments = [{file: each[file] for file in each if file.startswith(TRAINING_STATE_FOLDER)} for each in files]
    yield "moments of the optimizer", moments[0] == moments[1]
    states = [read_object(str(folder / STATE_NAME)) for folder in folders]
    yield "step, counters and place in the data", states[0] == states[1]


def main(argv: list[str]) -> None:
    """Run `vla-foundry verify-resume`, and print a table."""
    params = parse_command(VerifyResumeParams, argv, prog="vla-foundry verify-resume")
    found = verify_resume(params)
    for what, is_same in found.items():
        sys.stdout.write(f"{'same     ' if is_same else 'DIFFERENT'}  {what}\n")
    if not all(found.values()):
        raise ValueError(f"Resuming is not exact for this config. Both runs are in {params.output}.")
