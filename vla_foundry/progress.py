"""Print a command's output for the user: lines, and a progress bar or plain progress lines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """Print one line for the user."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Advance(Protocol):
    """Reports completed work, and what else the user wants to see of it."""

    def __call__(self, weight: int, note: str = "", /) -> None: ...


@contextmanager
def show_progress(title: str, total: int, done: int) -> Iterator[Advance]:
    """Yield a function that reports completed work: a progress bar on a terminal, else an occasional line."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"))
        with Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        ) as bar:
            row = bar.add_task(title, total=total, completed=done, note="")
            yield lambda weight, note="", /: bar.update(row, advance=weight, note=note)
        return
    lines = _ProgressLines(title, total, done)
    yield lines.advance


class _ProgressLines:
    """Progress without a terminal: a plain line every few seconds."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done
        self._first_done = done
        self._start = self._last_line = time.monotonic()

    def advance(self, weight: int, note: str = "", /) -> None:
        self._done += weight
        now = time.monotonic()
        is_end = self._done >= self._total and self._last_line > self._start
        if now - self._last_line < _SECONDS_BETWEEN_LINES and not is_end:
            return
        self._last_line = now
        seconds = now - self._start
        left = seconds * (self._total - self._done) / max(self._done - self._first_done, 1)
        percentage = 100 * self._done / max(self._total, 1)
        rest = f", {note}" if note else ""
        sys.stderr.write(f"{self._title}: {percentage:.1f}% after {seconds:.0f} s, ETA {left:.0f} s{rest}\n")
        sys.stderr.flush()
