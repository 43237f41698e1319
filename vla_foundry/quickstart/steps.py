"""Run the steps of the quickstart in order, and skip those that are already done."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console

from vla_foundry.config.command_line import parse
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.world import num_cores

# the batch sizes of the stages' presets are divisible by it
_MAX_TRAINERS = 16
# when the version of one of these changes, all steps run again
_PINNED_PACKAGES = ("vla-foundry", "torch", "numpy", "tokenizers", "ray")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the quickstart: a public command, or a function of its own."""

    # name of the step and of its marker files
    name: str
    # headline for the user
    what: str
    # words of `vla-foundry <words>`, run as a subprocess; without words, `function` runs in this process
    words: tuple[str, ...] = ()
    # processes that train together under torchrun; the first word is then `train`
    num_processes: int = 1
    function: Callable[[], object] | None = None
    # file for the command's standard output
    output: Path | None = None
    # files it writes; the step is not done while one is missing
    outputs: tuple[Path, ...] = ()
    # folder with all that it writes; deleted before the step runs with a new command
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A sequence of steps, and the page that reports their results."""

    steps: Sequence[Step]
    summary: Path


def words_of(command: str, **flags: object) -> tuple[str, ...]:
    """Return the words of a command line: `command --flag value ...`."""
    return (*command.split(), *(word for name, value in flags.items() for word in (f"--{name}", str(value))))


def count_trainers() -> int:
    """Return how many processes train together: one per core, rounded down to a power of two that divides a batch."""
    return 1 << (min(num_cores(), _MAX_TRAINERS).bit_length() - 1)


def training_step(
    name: str,
    what: str,
    *,
    preset: str,
    run: Path,
    shards: Path,
    num_processes: int,
    flags: Mapping[str, object] = {},
) -> Step:
    """Return a step that trains in one process or several.

    Args:
        preset: a file of config_presets/training_jobs; the processes share its global batch.
        run: folder of the run.
        shards: folder of the datasets `train` and `validation`.
        flags: values that the preset does not set.
    """
    words = words_of("train", config_path=preset, **flags)
    words += words_of("", **{"data.dataset_manifest": shards / "train" / "manifest.jsonl"})
    words += words_of("", **{"data.val_dataset_manifest": shards / "validation" / "manifest.jsonl"})
    words += words_of("", save_path=run.parent, name=run.name, resume="auto")
    if num_processes > 1:
        params = parse(TrainExperimentParams, ["--config_path", preset], prog="train").params
        share = params.hparams.global_batch_size // num_processes
        words += words_of("", **{"hparams.per_gpu_batch_size": share, "data.num_workers": 0})
    outputs = (run / "metrics.jsonl",)
    return Step(name=name, what=what, words=words, num_processes=num_processes, outputs=outputs, folder=run)


class StepFailedError(ValueError):
    """A step's command failed; it has printed its own error."""


def run_steps(steps: Sequence[Step], markers: Path, console: Console, *, overwrite: bool) -> None:
    """Run steps in order; skip a step that is done and would run the same way.

    A step's fingerprint hashes its command, the commands before it, and package versions. It is written when the step
    starts, so that an interrupted step resumes, and again when the step is done.

    Args:
        markers: folder of the fingerprints.
        overwrite: run every step again.

    Raises:
        StepFailedError: a command failed; earlier steps stay done.
    """
    markers.mkdir(parents=True, exist_ok=True)
    fingerprint = json.dumps({name: metadata.version(name) for name in _PINNED_PACKAGES})
    for number, step in enumerate(steps, start=1):
        fingerprint = hashlib.sha256((fingerprint + step.name + shlex.join(step.words)).encode()).hexdigest()
        started, done = markers / f"{step.name}.started", markers / f"{step.name}.done"
        console.print(f"\n[bold]{number}/{len(steps)} {step.what}[/bold]")
        if step.words:
            console.print(f"  $ {shlex.join(_shown_command(step))}", markup=False)
        if not overwrite and _holds(done, fingerprint) and all(path.exists() for path in step.outputs):
            console.print("  done before; skipped")
            continue
        done.unlink(missing_ok=True)
        if step.folder is not None and (overwrite or not _holds(started, fingerprint)):
            shutil.rmtree(step.folder, ignore_errors=True)
        started.write_text(fingerprint, encoding="utf-8")
        start = time.monotonic()
        _run(step)
        done.write_text(fingerprint, encoding="utf-8")
        console.print(f"  {time.monotonic() - start:.0f} s")


def _holds(marker: Path, fingerprint: str) -> bool:
    return marker.is_file() and marker.read_text(encoding="utf-8") == fingerprint


def _run(step: Step) -> None:
    if step.function is not None:
        step.function()
        return
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "vla_foundry.cli", *step.words]
    if step.num_processes > 1:
        # one thread each: matrices of these sizes gain more from processes than from threads
        environment |= {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", *_torchrun_words(step)]
    if step.output is None:
        finished = subprocess.run(command, env=environment, check=False)
    else:
        with step.output.open("w", encoding="utf-8") as file:
            finished = subprocess.run(command, env=environment, check=False, stdout=file)
    if finished.returncode != 0:
        raise StepFailedError(
            f"The step '{step.name}' ended with code {finished.returncode}. Start the quickstart again to resume."
        )


def _shown_command(step: Step) -> tuple[str, ...]:
    return ("torchrun", *_torchrun_words(step)) if step.num_processes > 1 else ("vla-foundry", *step.words)


def _torchrun_words(step: Step) -> tuple[str, ...]:
    assert step.words[0] == "train", step.words
    options = ("--standalone", "--nproc_per_node", str(step.num_processes))
    return (*options, "-m", "vla_foundry.main", *step.words[1:])
