"""Run simulators in worker processes, and check that an output folder was made with the same settings."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process
from multiprocessing.util import Finalize
from typing import Any

from vla_foundry.config.command_line import import_installed_plugins, import_plugins, named_plugins
from vla_foundry.simulators import Simulator, create_simulator

_SIMULATORS_PER_PROCESS = 4

# (function, arguments of each call) -> results, in any order
Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]


@contextmanager
def create_processes(num_processes: int) -> Iterator[Run]:
    """Yield a function that makes calls in worker processes, or in this process if `num_processes` is 0.

    Raises:
        ValueError: a process died.
    """
    if num_processes == 0:
        try:
            yield lambda function, calls: (function(*call) for call in calls)
        finally:
            get_simulator.cache_clear()
        return
    # spawn: no process inherits another's OpenGL context or threads
    context = get_context("spawn")
    setup = {"initializer": _start, "initargs": (named_plugins(),)}
    with ProcessPoolExecutor(num_processes, mp_context=context, **setup) as pool:

        def run(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
            for future in as_completed([pool.submit(function, *call) for call in calls]):
                yield future.result()

        try:
            yield run
        except BrokenProcessPool:
            raise ValueError(
                "A recording process died, most likely because the machine ran out of memory. "
                f"Use fewer processes than {num_processes} and run the same command again: finished work is kept."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(plugins: Sequence[str]) -> None:
    """Ignore interrupts, which the parent process handles, exit as soon as the parent is gone, and import plug-ins."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # while threads, and modules that renderers need to free themselves, are still there
    Finalize(None, get_simulator.cache_clear, exitpriority=0)
    import_installed_plugins()
    import_plugins(plugins, "--plugins")


@lru_cache(maxsize=_SIMULATORS_PER_PROCESS)
def get_simulator(simulator: str, task: str, cameras: tuple[str, ...], image_size: int, **source: str) -> Simulator:
    """Return this process's simulator of a task; creating one takes as long as several episodes."""
    return create_simulator(simulator, task, cameras=cameras, image_size=image_size, **source)


def check_settings(folder: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a folder's contents were made with the wanted settings.

    Raises:
        ValueError: settings differ; the message names all of them.
    """
    changed = [f"{name} {found.get(name)} -> {value}" for name, value in wanted.items() if found.get(name) != value]
    if changed:
        raise ValueError(
            f"'{folder}' was made with other settings ({'; '.join(changed)}). "
            "Choose another output folder, or delete this one."
        )
