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
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console

from vla_foundry.config.command_line import parse
from vla_foundry.evaluation.dashboard.jobs import end_with_parent
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.parsing import parse_object
from vla_foundry.run_folder import METRICS_NAME
from vla_foundry.storage.local import FULL as DISK_FULL
from vla_foundry.storage.local import name_errors
from vla_foundry.storage.uri import write_text
from vla_foundry.world import num_cores

# the batch sizes of the stages' presets are divisible by it
_MAX_TRAINERS = 16
# between two progress lines of a long step
_SECONDS_BETWEEN_LINES = 30
# when the version of one of these changes, all steps run again
_PINNED_PACKAGES = ("vla-foundry", "torch", "numpy", "tokenizers", "ray")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much data each stage makes and trains on; samples of None: as many as its preset says."""

    llm_samples: int | None = None
    scenes: int = 9_000
    held_out_scenes: int = 300
    # demonstrations of each task
    demos: int = 20
    vla_samples: int | None = None

    @staticmethod
    def training_flags(samples: int | None) -> dict[str, object]:
        """Return the flag that sets how many samples a run trains on."""
        return {} if samples is None else {"total_train_samples": samples}


# `--full true`
FULL = Sizes(llm_samples=2_400, held_out_scenes=500, demos=50, vla_samples=45_000)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the quickstart: a public command, or a function of its own."""

    # name of the step and of its marker files
    name: str
    # headline for the user
    what: str
    # seconds on two idle cores, for the progress line
    seconds: int = 1
    # words of `vla-foundry <words>`, run as a subprocess; without words, `function` runs in this process
    words: tuple[str, ...] = ()
    # processes that train together under torchrun; the first word is then `train`
    num_processes: int = 1
    # threads of torch in a process that does not train; None: one per core
    num_threads: int | None = None
    function: Callable[[], object] | None = None
    # what the function writes, if that is known beforehand: a change of it runs the step again
    text: str = ""
    # file for the command's standard output, which is printed when it ends
    output: Path | None = None
    # of training: the file with a line per logged step, and the last step; they say how far it is
    metrics: Path | None = None
    last_step: int = 1
    # files it writes; the step is not done while one is missing
    outputs: tuple[Path, ...] = ()
    # folder with all that it writes; deleted before the step runs with a new command
    folder: Path | None = None
    # run it even if it is done: it is quick, and reads what may have changed
    is_repeated: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A sequence of steps, and the page that reports their results."""

    steps: Sequence[Step]
    summary: Path


def words_of(command: str, **flags: object) -> tuple[str, ...]:
    """Return the words of a command line: `command --flag value ...`."""
    return (*command.split(), *(word for name, value in flags.items() for word in (f"--{name}", str(value))))


def count_trainers() -> int:
    """Return how many processes train together: one per GPU, or core; a power of two, which divides a batch."""
    import torch

    return 1 << (min(torch.cuda.device_count() or num_cores(), _MAX_TRAINERS).bit_length() - 1)


def training_step(
    name: str,
    what: str,
    *,
    seconds: int,
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
    params = parse(TrainExperimentParams, ["--config_path", preset], prog="train").params
    num_samples = int(str(flags.get("total_train_samples", params.total_train_samples)))
    if num_processes > 1:
        share = params.hparams.global_batch_size // num_processes
        words += words_of("", **{"hparams.per_gpu_batch_size": share, "data.num_workers": 0})
    return Step(
        name=name,
        what=what,
        seconds=seconds,
        words=words,
        num_processes=num_processes,
        metrics=run / METRICS_NAME,
        last_step=num_samples // params.hparams.global_batch_size,
        outputs=(run / METRICS_NAME,),
        folder=run,
    )


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
        ValueError: a step would delete or overwrite what is not the quickstart's; no step has run.
    """
    _check_ownership(steps, markers)
    markers.mkdir(parents=True, exist_ok=True)
    clock = _Clock(steps, console)
    fingerprint = json.dumps({name: metadata.version(name) for name in _PINNED_PACKAGES})
    for number, step in enumerate(steps, start=1):
        fingerprint = hashlib.sha256(
            (fingerprint + step.name + shlex.join(step.words) + step.text).encode()
        ).hexdigest()
        started, done = markers / f"{step.name}.started", markers / f"{step.name}.done"
        console.print(f"\n[bold]{number}/{len(steps)} {step.what}[/bold]")
        if step.words:
            console.print(f"  $ {shlex.join(shown_command(step))}", markup=False)
        is_done = _holds(done, fingerprint) and all(path.exists() for path in step.outputs)
        if is_done and not overwrite and not step.is_repeated:
            console.print("  done before; skipped")
            clock.skip(step)
            continue
        done.unlink(missing_ok=True)
        if step.folder is not None and (overwrite or not _holds(started, fingerprint)):
            shutil.rmtree(step.folder, ignore_errors=True)
        write_text(str(started), fingerprint)
        clock.begin(step)
        clock.show()
        _run(step, console, clock.show)
        seconds, cpu_seconds = clock.end(step)
        write_text(str(done), f"{fingerprint}\n{seconds:.1f}\n{cpu_seconds:.1f}\n")
        console.print(f"  {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time")


def _check_ownership(steps: Sequence[Step], markers: Path) -> None:
    """Refuse to run over files that no earlier quickstart made: a step's folder is its own once the step has started.

    Files outside such folders are the quickstart's own once any step has started.
    """
    is_first = next(markers.glob("*.started"), None) is None
    for step in steps:
        is_new = not (markers / f"{step.name}.started").exists()
        for path in (step.folder if is_new else None, *(step.outputs if is_first else ())):
            if path is not None and (any(path.iterdir()) if path.is_dir() else os.path.lexists(path)):
                raise ValueError(
                    f"{path} is not of an earlier quickstart, and the step '{step.name}' would replace it. Choose "
                    "another --output_dir, or move it away."
                )


def read_times(markers: Path, step: Step) -> tuple[float, float] | None:
    """Return the seconds and CPU seconds that a step took when it was done; None: it is not, or they are unknown."""
    with suppress(OSError, ValueError):
        _, seconds, cpu_seconds = (markers / f"{step.name}.done").read_text(encoding="utf-8").split()
        return float(seconds), float(cpu_seconds)
    return None


def _holds(marker: Path, fingerprint: str) -> bool:
    """Return whether a marker is of this fingerprint, which is its first line."""
    return marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").split("\n")[0] == fingerprint


class _Clock:
    """The progress of all steps together: what is done of their usual seconds, and how long the rest takes here."""

    def __init__(self, steps: Sequence[Step], console: Console) -> None:
        self._total = sum(step.seconds for step in steps)
        # usual seconds of steps that are over, and of those among them that ran now
        self._over = self._ran = 0.0
        self._start = time.monotonic()
        self._console = console
        self.begin(steps[0])

    def begin(self, step: Step) -> None:
        self._step, self._step_start, self._step_cpu = step, time.monotonic(), _cpu_seconds()
        # what an earlier, interrupted attempt left
        self._share_before = _trained_share(step) or 0.0

    def skip(self, step: Step) -> None:
        self._over += step.seconds

    def end(self, step: Step) -> tuple[float, float]:
        """Return how long the step took: seconds, and seconds of CPU time."""
        self._over += step.seconds
        self._ran += step.seconds * (1 - self._share_before)
        return time.monotonic() - self._step_start, _cpu_seconds() - self._step_cpu

    def show(self) -> None:
        """Print the progress line."""
        now, step = time.monotonic(), self._step
        ran, ran_for = self._ran, self._step_start - self._start
        share = _trained_share(step)
        if share is not None:
            ran, ran_for = ran + (share - self._share_before) * step.seconds, now - self._start
        # usual seconds that pass in a second here; a first guess counts as much as a minute
        pace = (ran + 60) / (ran_for + 60)
        if share is None:
            # one that takes longer than usual is taken to be nearly over
            share = min((now - self._step_start) * pace / step.seconds, 0.95)
        done = self._over + share * step.seconds
        left = (self._total - done) / pace / 60
        self._console.print(
            f"  \\[quickstart {done / self._total:.0%} after {(now - self._start) / 60:.1f} min, "
            f"{f'about {left:.0f} min' if left >= 1 else 'less than a minute'} left]"
        )


def _trained_share(step: Step) -> float | None:
    """Return how much of a training step is done, as its newest metrics say; None: they do not say."""
    if step.metrics is None:
        return None
    with suppress(OSError, ValueError, LookupError, TypeError):
        *_, last = step.metrics.read_text(encoding="utf-8").splitlines()
        return min(float(parse_object(last, str(step.metrics))["step"]) / step.last_step, 1.0)
    return None


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _run(step: Step, console: Console, show_progress: Callable[[], None]) -> None:
    if step.function is not None:
        # the file is not known where a write() fails
        with name_errors(os.path.commonpath(step.outputs), DISK_FULL) if step.outputs else nullcontext():
            step.function()
        return
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "vla_foundry.cli", *step.words]
    if step.num_threads is not None:
        environment |= {"OMP_NUM_THREADS": str(step.num_threads)}
    if step.num_processes > 1:
        # one thread each: matrices of these sizes gain more from processes than from threads
        environment |= {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", *_torchrun_words(step)]
    with ExitStack() as stack:
        file = stack.enter_context(step.output.open("w", encoding="utf-8")) if step.output else None
        process = stack.enter_context(
            subprocess.Popen(command, env=environment, stdout=file, preexec_fn=end_with_parent)
        )
        stack.callback(process.kill)
        while not _ends_within(process, _SECONDS_BETWEEN_LINES):
            show_progress()
    if process.returncode != 0:
        raise StepFailedError(
            f"The step '{step.name}' ended with code {process.returncode}. Start the quickstart again to resume."
        )
    if step.output is not None:
        console.print(step.output.read_text(encoding="utf-8").rstrip("\n"), markup=False)


def _ends_within(process: subprocess.Popen[bytes], seconds: int) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def shown_command(step: Step) -> tuple[str, ...]:
    """Return the words that run a step alone."""
    if step.num_processes > 1:
        return ("torchrun", *_torchrun_words(step))
    variables = () if step.num_threads is None else (f"OMP_NUM_THREADS={step.num_threads}",)
    return (*variables, "vla-foundry", *step.words)


def _torchrun_words(step: Step) -> tuple[str, ...]:
    assert step.words[0] == "train", step.words
    options = ("--standalone", "--nproc_per_node", str(step.num_processes))
    return (*options, "-m", "vla_foundry.main", *step.words[1:])
