"""How loader processes are started, survive signals, and are mourned."""

import contextlib
import fcntl
import os
import signal
import threading
from multiprocessing import forkserver, get_all_start_methods, get_context
from typing import Any

from vla_foundry.params.data.base import DataParams

# a loader process outlives SIGTERM for so long, so that the trainer can save
_GRACE_SECONDS = 120.0
# a message of this size passes to the trainer without the sender having to wait, bytes
_PIPE_SIZE = 1 << 20
_SERVER_MODULE = "vla_foundry.data.loader"


def start_context() -> Any:
    """Return how to start loader processes: from a server that imports PyTorch once, without this process's threads."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([_SERVER_MODULE])
    forkserver.ensure_running()  # it imports while the trainer creates the model
    return context


def widen_pipe(iterator: Any) -> None:
    """Widen the pipe from the loader processes to the trainer, where the system can and allows it."""
    queue = getattr(iterator, "_worker_result_queue", None)
    if queue is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(queue._reader.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


def prepare_process(environment: dict[str, str], worker: int) -> None:
    """Set a loader process up."""
    os.environ.update(environment)  # the server has that of its own start
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer ends its loader processes itself
    signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(signal_number: int, frame: Any) -> None:
    timer = threading.Timer(_GRACE_SECONDS, os._exit, (128 + signal_number,))
    timer.daemon = True
    timer.start()


def describe_dead_process(iterator: Any, params: DataParams) -> str:
    codes = {process.exitcode for process in iterator._workers if process.exitcode}
    killed = " (killed; most often the machine ran out of memory)" if -signal.SIGKILL in codes else ""
    return (
        f"A loader process died with exit code {', '.join(str(code) for code in sorted(codes)) or 'unknown'}{killed}. "
        f"Lower data.num_workers ({params.num_workers}) or data.prefetch_factor ({params.prefetch_factor})."
    )
