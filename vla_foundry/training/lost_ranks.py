"""Name the rank that a run lost, and why, where a broken connection would only say that it broke."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d

from vla_foundry.config.command_line import EXPECTED_ERRORS, describe_any, describe_error
from vla_foundry.training.distributed import gather_objects
from vla_foundry.world import World

# ranks that one message names
_NUM_NAMED = 3
# the store that the ranks met through holds the error of each rank that failed, and which ranks lost a connection only
_ERROR_KEY, _ALIVE_KEY = "vla_foundry/error of rank {}", "vla_foundry/rank {} is alive"
_SECONDS_TO_HEAR, _SECONDS_BETWEEN_LOOKS, _SECONDS_TO_ANSWER = 5.0, 0.1, 10.0
# address of the other end of a connection, in the text of an error
_PEER = re.compile(r"\[([0-9a-fA-F.:]+)\]:\d+")


class _Place(NamedTuple):
    """Where a rank runs: host, name space of processes, number of the process, and the host's network address."""

    host: str
    space: str
    process: int
    address: str


@contextmanager
def naming_lost_ranks(world: World) -> Iterator[None]:
    """Collective: call on every rank. If another rank fails inside, say which and why, not that a connection broke.

    Raises:
        ValueError: another rank failed, or its process is gone; one line.
    """
    if world.world_size == 1:
        yield
        return
    places = gather_objects(_find_place())
    store = distributed_c10d._get_default_store()
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks must hear of it before their connections break
        is_expected = isinstance(error, EXPECTED_ERRORS)
        line = describe_error(error) if is_expected else describe_any(error)
        if not _is_of_connection(error):
            text = f"rank {world.rank} on {places[world.rank].host} failed: {line}"
            _ask(lambda: store.set(_ERROR_KEY.format(world.rank), text))
            raise
        # the launcher soon stops the others, perhaps before they have said which rank is gone: this process ends anyway
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        found = _describe_stopped(places, world.rank) or _ask(lambda: _find_lost_rank(store, places, world.rank, line))
        raise ValueError(found or _describe_silence(places, world.rank, [], line)) from error


def _find_place() -> _Place:
    host, space, address = socket.gethostname(), "", ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # sends nothing: the system says from which address it would reach the others
        probe.connect((os.environ.get("MASTER_ADDR", host), 9))
        address = probe.getsockname()[0]
    return _Place(host, space, os.getpid(), address)


def _is_of_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(mark in str(error) for mark in ("gloo/", "NCCL"))


def _ask(action: Callable[[], Any]) -> Any:
    """Return the result of an action that talks to the store; None if the store does not answer."""
    results = []

    def act() -> None:
        # the store is gone with the process that held it
        with suppress(RuntimeError):
            results.append(action())

    # a call to a host that is cut off never returns
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_ANSWER)
    return results[0] if results else None


def _find_lost_rank(store: distributed_c10d.Store, places: Sequence[_Place], rank: int, line: str) -> str:
    """Return which rank failed and why: what it reported, its process on this host is gone, or it says nothing.

    Raises:
        RuntimeError: the store is gone.
    """
    neighbours = _list_neighbours(places, rank)
    deadline = time.monotonic() + _SECONDS_TO_HEAR
    while True:
        # who finds a process gone reports it before leaving, so look at the reports again before believing it
        gone = [other for other in neighbours if _is_gone(places[other].process)]
        try:
            store.set(_ALIVE_KEY.format(rank), "")
            reported = [other for other in range(len(places)) if store.check([_ERROR_KEY.format(other)])]
            if reported:
                return store.get(_ERROR_KEY.format(reported[0])).decode()
        except RuntimeError:
            if not gone:
                raise
        if gone:
            place = places[gone[0]]
            found = (
                f"rank {gone[0]} on {place.host} (process {place.process}) ended without a word. It was killed, "
                "perhaps because memory ran out: see its node's log."
            )
            with suppress(RuntimeError):
                store.set(_ERROR_KEY.format(gone[0]), found)
            return found
        if time.monotonic() > deadline:
            heard = [other for other in range(len(places)) if store.check([_ALIVE_KEY.format(other)])]
            return _describe_silence(places, rank, heard, line)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _describe_silence(places: Sequence[_Place], rank: int, heard: Sequence[int], line: str) -> str:
    """Return one line that names the ranks elsewhere that gave no sign; `line` is the error of the connection."""
    silent = [other for other in range(len(places)) if other != rank and other not in heard]
    peers = _PEER.findall(line)
    silent = [other for other in silent if places[other].address in peers] or silent
    if not silent:
        return "the connection between the ranks failed, and all of them are alive. Look at the network of their hosts."
    names = [f"rank {other} on {places[other].host}" for other in silent[:_NUM_NAMED]]
    more = f" and {len(silent) - _NUM_NAMED} more" if len(silent) > _NUM_NAMED else ""
    return (
        f"the connection to {', '.join(names)}{more} is lost, without a word from there. A process was killed, or its "
        "host or network is down: see the log of that node."
    )


def _list_neighbours(places: Sequence[_Place], rank: int) -> list[int]:
    """Return the ranks whose processes this one sees."""
    return [other for other, place in enumerate(places) if place[:2] == places[rank][:2]]


def _describe_stopped(places: Sequence[_Place], rank: int) -> str:
    """Return one line about a rank of this host whose process was stopped; "" if there is none."""
    for other in _list_neighbours(places, rank):
        if _read_state(places[other].process) in ("T", "t"):
            place = places[other]
            return (
                f"rank {other} on {place.host} (process {place.process}) is stopped, by SIGSTOP or a debugger, so that "
                "the others waited longer than distributed.timeout_s. Let it go on (kill -CONT), or end it."
            )
    return ""


def _is_gone(pid: int) -> bool:
    return _read_state(pid) in ("", "Z")


def _read_state(pid: int) -> str:
    """Return the letter of a process's state; "" if there is no such process, "?" if it is not known."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return ""
    except OSError:
        return "?"
