"""Write metrics to metrics.jsonl and the terminal, and optionally to TensorBoard and Weights & Biases.

A line of metrics.jsonl is {"kind": "train" | "validation", "step": ..., name: value, ...}. Only rank 0 writes.
"""

import importlib.util
import json
import logging
import math
import netrc
import os
import sys
import uuid
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlparse

from jaxtyping import UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from vla_foundry.batch import Batch
from vla_foundry.config.loading import to_plain
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.parsing import parse_json, parse_record
from vla_foundry.provenance import hide_home
from vla_foundry.run_folder import METRICS_NAME
from vla_foundry.storage.local import name_errors
from vla_foundry.storage.uri import write_bytes, write_text

WANDB_ID_NAME = "wandb_run_id.txt"
TENSORBOARD_FOLDER = "tensorboard"

# how a metric is shown: name, label, format
_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("lr", "lr", "{:.2e}"),
    ("grad_norm", "grad norm", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("samples_per_sec_per_gpu", "samples/s/gpu", "{:.1f}"),
    ("data_wait_share", "data wait", "{:.1%}"),
    ("mfu", "MFU", "{:.1%}"),
    ("memory_gb", "memory", "{:.2f} GiB"),
)
# pictures of a batch that are shown
_MOST_PICTURES = 8
# the subset shown beside the progress bar
_SHOWN_IN_BAR = ("loss", "tokens_per_second")
# shown if they are not 0
_SHOWN_IF_ANY = (("skipped_steps", "skipped"), ("dropped_samples", "dropped"))


@runtime_checkable
class Sink(Protocol):
    """A destination for metrics."""

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class MetricLog:
    """All sinks of a run and its terminal output. Without sinks (rank > 0) it does nothing."""

    def __init__(self, sinks: list[Sink], terminal: "Terminal | None") -> None:
        self._sinks = sinks
        self._terminal = terminal

    def add(self, sinks: list[Sink]) -> None:
        """Write to more sinks, before the terminal."""
        self._sinks = sinks + self._sinks

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Write metrics of kind "train" or "validation" after `step` steps."""
        for sink in self._sinks:
            sink.write(kind, step, metrics)

    def show(self, step: int, batch: Batch) -> None:
        """Send a few of a batch's pictures to the sinks that show pictures, with the first sample's instruction."""
        pixels = batch.get("pixel_values")
        # a Hugging Face processor's patches are no pictures
        if pixels is None or pixels.ndim != 4 or pixels.shape[1] != 3:
            return
        caption = (batch.get("instructions") or [""])[0]
        for sink in self._sinks:
            if isinstance(sink, TensorBoardFile | Wandb):
                sink.show(step, pixels[:_MOST_PICTURES].cpu(), caption)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._terminal is not None:
            self._terminal.advance(step)

    def say(self, line: str) -> None:
        """Print one line for the user; wandb copies what is printed, so it must not tell where their home is."""
        if self._terminal is not None:
            self._terminal.say(hide_home(line))

    def close(self) -> None:
        """Flush and close all sinks."""
        for sink in self._sinks:
            sink.close()


class MetricsFile:
    """Write metrics to metrics.jsonl."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / METRICS_NAME
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line."""
        finite = {name: None if _is_non_finite(value) else value for name, value in metrics.items()}
        with name_errors(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with name_errors(self._path):
            self._file.close()


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def truncate_metrics(run_folder: Path, step: int) -> list[str]:
    """Atomically drop lines of metrics.jsonl after `step`, and a last line cut off by a kill.

    Returns:
        Lines for the user: how many damaged lines were dropped too.
    """
    path = run_folder / METRICS_NAME
    if not path.is_file():
        return []
    kept, num_damaged = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            is_kept = parse_record(line, METRICS_NAME)["step"] <= step
        except (ValueError, TypeError, KeyError):
            num_damaged += 1
            continue
        if is_kept:
            kept.append(line + b"\n")
    write_bytes(str(path), b"".join(kept))
    return [f"{num_damaged} damaged lines of {path} were dropped."] if num_damaged else []


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the error, where rich would end the process."""
        raise BrokenPipeError


class Terminal:
    """Print lines to standard output, with a progress bar below them on a terminal."""

    def __init__(self, *, total_steps: int, first_step: int) -> None:
        self._total_steps, self._first_step = total_steps, first_step
        # notebooks and CI set FORCE_COLOR, but show no bar that moves
        self._console = _Console(
            file=sys.stdout, force_terminal=sys.stdout.isatty(), soft_wrap=True, highlight=False, markup=False
        )
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, status="")
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, line: str) -> None:
        """Print a line, above the bar."""
        try:
            self._console.print(line)
        except OSError:
            # the terminal, pipe or disk that shows the lines is gone, but the run is not
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Print metrics as a line."""
        text = format_metrics(metrics)
        if self._progress is not None and kind == "train":
            self._progress.update(self._task, status=format_metrics(metrics, names=_SHOWN_IN_BAR))
        label = "" if kind == "train" else f"{kind} "
        left = metrics.get("step_seconds", 0.0) * (self._total_steps - step)
        # the bar shows it; the first step of a run is slower than others
        if self._progress is None and kind == "train" and step > self._first_step + 1 and left:
            text += f"  ETA {timedelta(seconds=round(left))}"
        self.say(f"step {step}/{self._total_steps}  {label}{text}")

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()


def format_metrics(metrics: Mapping[str, Any], names: Collection[str] | None = None) -> str:
    """Format the main metrics as one line; only `names`, if given."""
    parts = []
    for name, label, form in _SHOWN:
        if names is not None and name not in names:
            continue
        value = metrics.get(name)
        if value is not None:
            parts.append(f"{label} {form.format(value)}")
        elif name == "loss":
            parts.append("loss not finite")
    parts += [f"{label} {metrics[name]}" for name, label in _SHOWN_IF_ANY if metrics.get(name)]
    return "  ".join(parts)


class TensorBoardFile:
    """Event files for TensorBoard."""

    def __init__(self, run_folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_folder / TENSORBOARD_FOLDER), purge_step=first_step + 1)

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Write every number."""
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def show(self, step: int, pictures: UInt8[Tensor, "N 3 H W"], caption: str) -> None:
        """Write pictures."""
        self._writer.add_images("train/pictures", pictures, step)
        self._writer.add_text("train/caption", caption, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """Weights & Biases; a resumed run continues under its saved id."""

    def __init__(self, params: TrainExperimentParams, run_folder: Path) -> None:
        import wandb

        id_file = run_folder / WANDB_ID_NAME
        run_id = id_file.read_text(encoding="utf-8", errors="replace").strip() if id_file.is_file() else ""
        if not run_id.isalnum():
            run_id = uuid.uuid4().hex[:8]
            write_text(str(id_file), run_id)
        try:
            self._run = wandb.init(
                id=run_id,
                resume="allow",
                project=params.wandb_project_name,
                entity=params.wandb_entity,
                name=run_folder.name,
                tags=params.wandb_tags,
                dir=str(run_folder),
                config=parse_json(hide_home(json.dumps(to_plain(params))), "config"),
                # by itself it records the name of the host, the user's folders and the command
                settings=wandb.Settings(host="host", x_disable_machine_info=True),
            )
        except wandb.Error as error:
            raise ValueError(
                f"Weights & Biases: {error}. Run `wandb login`, set WANDB_MODE=offline, or give --wandb false."
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Log under `<kind>/<name>` against the step."""
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in metrics.items()}})

    def show(self, step: int, pictures: UInt8[Tensor, "N 3 H W"], caption: str) -> None:
        """Log pictures under train/pictures."""
        import wandb

        images = [wandb.Image(picture.permute(1, 2, 0).numpy(), caption=caption) for picture in pictures]
        self._run.log({"step": step, "train/pictures": images})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def has_wandb_credentials(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if there is an API key in WANDB_API_KEY, or for the server in ~/.netrc."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(environment.get("NETRC", "") or os.path.expanduser("~/.netrc"))
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wants_wandb(params: TrainExperimentParams, environment: Mapping[str, str] = os.environ) -> bool:
    """Decide whether to log to Weights & Biases: as params.wandb says, else if package and credentials exist.

    Raises:
        ValueError: it is requested but cannot work.
    """
    mode = environment.get("WANDB_MODE", "online")
    if params.wandb is False or mode == "disabled":
        return False
    is_installed = importlib.util.find_spec("wandb") is not None
    if params.wandb is None:
        return is_installed and has_wandb_credentials(environment)
    if not is_installed:
        raise ValueError("wandb is true, but the package is missing. Install vla-foundry[logging].")
    if mode not in ("offline", "dryrun") and not has_wandb_credentials(environment):
        raise ValueError(
            "wandb is true, but there are no credentials. Run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline."
        )
    return True


def create_metric_log(
    params: TrainExperimentParams, run_folder: Path, *, is_main: bool, total_steps: int, first_step: int
) -> MetricLog:
    """Return a run's log, which writes to the terminal alone until `open_sinks`; on other ranks it does nothing.

    Raises:
        ValueError: a sink that the params ask for cannot work.
    """
    if not is_main:
        return MetricLog([], None)
    if params.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard is true, but the package is missing. Install vla-foundry[logging].")
    terminal = Terminal(total_steps=total_steps, first_step=first_step)
    if not wants_wandb(params) and params.wandb is None:
        terminal.say(
            f"Metrics go to {run_folder / METRICS_NAME}. For Weights & Biases run `wandb login` or set WANDB_API_KEY; "
            "--wandb false hides this line."
        )
    return MetricLog([terminal], terminal)


def open_sinks(params: TrainExperimentParams, run_folder: Path, *, first_step: int) -> list[Sink]:
    """Open what a run writes its metrics to besides the terminal; call it on rank 0."""
    sinks: list[Sink] = [MetricsFile(run_folder)]
    if params.tensorboard:
        sinks.append(TensorBoardFile(run_folder, first_step))
    if wants_wandb(params):
        logging.getLogger("wandb").setLevel(logging.WARNING)
        sinks.append(Wandb(params, run_folder))
    return sinks
