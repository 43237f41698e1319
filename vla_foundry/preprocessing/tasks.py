"""Run a function over tasks, on Ray or in this process, and show progress."""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_foundry.config.command_line import describe_error
from vla_foundry.progress import say, show_progress
from vla_foundry.world import num_cores

# a task that fails for a reason of its own is run this often in all; its worker may also die this often
_ATTEMPTS = 3
_OBJECT_STORE_BYTES = 512 << 20
_CONNECT_SECONDS = 10.0
# errors that the user must fix: a retry would not help
_USER_ERRORS = (ValueError, FileNotFoundError, PermissionError)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One work unit of a job."""

    # index within the job; names the unit's output
    number: int
    # what the user knows it as, for messages
    name: str
    # how much work it is, in any unit that is the same for all tasks of the job (bytes of input, frames)
    weight: int
    # picklable argument of the function
    payload: Any


def run_tasks(
    function: Callable[[Any, Task], Any],
    tasks: Sequence[Task],
    *,
    shared: Any,
    title: str,
    num_workers: int | None,
    ray_address: str | None,
    done_weight: int = 0,
) -> Iterator[tuple[Task, Any]]:
    """Call `function(shared, task)` for every task and yield (task, result) as they finish, in any order.

    The number of tasks under way is bounded. A failed task is retried at most twice; ValueError, FileNotFoundError and
    PermissionError are not retried.

    Args:
        function: at the top level of a module; it may run again after dying half-way.
        tasks: the work units.
        shared: what all tasks need; sent to each node once.
        title: name of the job on the progress line.
        num_workers: tasks at a time; 0: in this process, without Ray; None: one per core.
        ray_address: address of a cluster to join; None: Ray on this machine only.
        done_weight: weight of the work that an earlier run did, for the progress line.

    Raises:
        ValueError: a task failed for good; the message holds its name.
    """
    total = done_weight + sum(task.weight for task in tasks)
    with show_progress(title, total, done_weight) as advance:
        if num_workers == 0 or not tasks:
            run = _run_here(function, tasks, shared)
        else:
            run = _run_on_ray(function, tasks, shared, num_workers, ray_address)
        for task, result in run:
            advance(task.weight)
            yield task, result


def run_unfinished(
    function: Callable[[Any, Task], Any],
    tasks: Sequence[Task],
    done: Mapping[int, Any],
    *,
    shared: Any,
    title: str,
    noun: str,
    num_workers: int | None,
    ray_address: str | None,
    check: Callable[[Any], None] | None = None,
) -> list[Any]:
    """Run the tasks that an earlier run has not finished; see run_tasks.

    Args:
        done: {task number: result} of the earlier run.
        noun: what the user calls the tasks.
        check: called with each new result; raises to stop the job.

    Returns:
        The results of all tasks, in order.
    """
    if done:
        say(f"resuming: {len(done):,} of {len(tasks):,} {noun} are done")
    results = dict(done)
    for task, result in run_tasks(
        function,
        [task for task in tasks if task.number not in done],
        shared=shared,
        title=title,
        num_workers=num_workers,
        ray_address=ray_address,
        done_weight=sum(task.weight for task in tasks if task.number in done),
    ):
        results[task.number] = result
        if check is not None:
            check(result)
    return [results[task.number] for task in tasks]


def _note_failure(task: Task, attempt: int, error: BaseException) -> None:
    """Log that a task failed, and stop the job after the last attempt."""
    _logger.warning("'%s' failed (attempt %d of %d): %r", task.name, attempt, _ATTEMPTS, error)
    if attempt == _ATTEMPTS:
        is_named = isinstance(error, (OSError, ValueError))
        text = (describe_error(error) if is_named else " ".join(str(error).split()))[:300]
        raise ValueError(
            f"'{task.name}' failed {_ATTEMPTS} times, the last time with {type(error).__name__}: {text}"
        ) from error


def _run_here(function: Callable[[Any, Task], Any], tasks: Sequence[Task], shared: Any) -> Iterator[tuple[Task, Any]]:
    for task in tasks:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                result = function(shared, task)
            except _USER_ERRORS:
                raise
            except Exception as error:  # a task is a process border: it is named, and its failures are counted
                _note_failure(task, attempt, error)
            else:
                yield task, result
                break


def _check_reachable(ray_address: str) -> None:
    """Fail at once if nothing listens: Ray would retry for a quarter of an hour.

    Raises:
        OSError, OverflowError: nothing answers at host:port.
    """
    host, _, port = ray_address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():  # not "auto" and the like
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


@contextmanager
def ray_cluster(num_workers: int | None, ray_address: str | None, *, flag: str = "--ray_address") -> Iterator[int]:
    """Join or start Ray, and yield the number of tasks to keep under way; shut down what this started.

    `run_tasks` does so itself. A job that calls it several times wraps all calls, so that Ray starts once. Nothing is
    started for num_workers 0.

    Args:
        num_workers: as the user gave it; None: as many as the cluster has CPUs.
        ray_address: address of a cluster to join; None: Ray on this machine only.
        flag: what named the address, for messages.

    Raises:
        ValueError: Ray is not installed, no cluster answers at `ray_address`, or it runs another version.
    """
    if num_workers == 0:
        yield 0
        return
    # read by Ray when it is imported or starts: no statistics, no `uv run` around each worker
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # where the file is, as local Ray writes it, `ray start` makes a cluster that asks for it; others do not mind it
    if ray_address is not None and (Path.home() / ".ray/auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        without = "give --num_workers 0 to work in this process" if flag == "--ray_address" else f"leave out {flag}"
        raise ValueError(f"Ray is not installed: uv pip install 'vla-foundry[preprocessing]', or {without}.") from None
    is_ours = not ray.is_initialized()
    if is_ours and ray_address is None:
        _start_ray(num_workers)
    elif is_ours:
        _join_ray(str(ray_address), flag)
    try:
        yield num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        if is_ours:
            ray.shutdown()


def _start_ray(num_workers: int | None) -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=num_workers or num_cores(),
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    except Exception as error:  # the border of Ray's processes, whose failures are plain exceptions
        ray.shutdown()
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Ray does not start ({type(error).__name__}: {reason}). Give --num_workers 0 to work in this process."
        ) from None


def _join_ray(address: str, flag: str) -> None:
    import ray

    try:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        if "ersion" in reason:
            raise ValueError(
                f"The Ray cluster at {flag} {address} runs other versions. Install the same Ray and Python "
                f"there and here. {reason}"
            ) from None
        hint = "If it asks for a token, put that into ~/.ray/auth_token, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
        raise ValueError(f"No Ray cluster answers at {flag} {address}: {reason.rstrip('.')}. {hint}") from None


def _run_on_ray(
    function: Callable[[Any, Task], Any],
    tasks: Sequence[Task],
    shared: Any,
    num_workers: int | None,
    ray_address: str | None,
) -> Iterator[tuple[Task, Any]]:
    with ray_cluster(num_workers, ray_address) as num_under_way:
        import ray

        remote = ray.remote(num_cpus=1, max_retries=_ATTEMPTS - 1, retry_exceptions=False)(_call_in_worker)
        shared_ref = ray.put(shared)
        waiting = iter(tasks)
        under_way: dict[Any, tuple[Task, int]] = {}
        try:
            while True:
                for task in waiting:
                    under_way[remote.remote(function, shared_ref, task)] = (task, 1)
                    if len(under_way) >= num_under_way:
                        break
                if not under_way:
                    return
                ready, _ = ray.wait(list(under_way), num_returns=1)
                task, attempt = under_way.pop(ready[0])
                result, error = _result_of(ready[0])
                if error is None:
                    yield task, result
                    continue
                if isinstance(error, _USER_ERRORS):
                    raise error
                _note_failure(task, attempt, error)
                under_way[remote.remote(function, shared_ref, task)] = (task, attempt + 1)
        finally:
            for reference in under_way:
                ray.cancel(reference, force=True)


def _call_in_worker(function: Callable[[Any, Task], Any], shared: Any, task: Task) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Ray shares out the cores
    return function(shared, task)


def _result_of(reference: Any) -> tuple[Any, BaseException | None]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference), None
    except RayTaskError as error:
        return None, error.cause if isinstance(error.cause, BaseException) else error
    except RayError as error:  # the worker died, or memory ran out
        return None, error
