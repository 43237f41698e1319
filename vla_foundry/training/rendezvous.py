"""Meet the other ranks: where, for how long, and if they do not come, why in one line."""

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from vla_foundry.config.command_line import print_error
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.world import World, find_meeting_point

# torch waits without an end for a server that is not its own, so it gets this many seconds more
_MORE_SECONDS, _SECONDS_BETWEEN_TRIES, _SECONDS_BETWEEN_LOOKS = 10.0, 0.5, 0.05
_SAME = "Start the others, and give all nodes the same number of nodes and of processes on each."
# what torch says -> what it means
_MEANINGS = {
    r"EADDRINUSE|address already in use": (
        "the port of {place} is in use, by another run or program. Choose another: torchrun --rdzv_endpoint HOST:PORT, "
        "or MASTER_PORT."
    ),
    r"Ping failed|[Ii]nvalid value returned": (
        "what answers at {place} is not a run. Check MASTER_ADDR and MASTER_PORT, or choose another port."
    ),
    r"(\d+)/\d+ clients joined": f"only {{match}} of {{count}} ranks came to {{place}} within {{limit}}. {_SAME}",
    "no answer": (
        "no answer from {place} within {limit}. The port is another program's, or ranks are missing or were told of "
        "another number of ranks."
    ),
    "": f"not all {{count}} ranks came to {{place}} within {{limit}}. {_SAME}",
}
_NOBODY = (
    "nobody answers at {place} within {limit}. Does rank 0 start there, is the address right, and does the network let "
    "it through?"
)


@contextmanager
def meeting_other_ranks(params: DistributedParams, world: World) -> Iterator[None]:
    """Collective: call on every rank. Tell torch where ranks meet, and say in one line why they do not.

    Raises:
        ValueError: the others were not reached in `params.timeout_s`, or it is not known where they are.
    """
    url = params.dist_url
    if url == "env://":
        os.environ |= find_meeting_point(world.world_size)
        host = os.environ["MASTER_ADDR"]
        url = f"tcp://{f'[{host}]' if ':' in host else host}:{os.environ['MASTER_PORT']}"
    about = {"place": url.removeprefix("tcp://"), "limit": f"distributed.timeout_s ({params.timeout_s:g} s)"}
    start = f"rank {world.rank} on {socket.gethostname()} did not reach the other ranks: "
    if not world.is_main and url.startswith("tcp://") and not _is_answered(url, params.timeout_s):
        raise ValueError(start + _NOBODY.format(**about))
    late = start + _explain("no answer", world.world_size, about)
    watch = threading.Timer(params.timeout_s + _MORE_SECONDS, _give_up, (late,))
    watch.daemon = True
    watch.start()
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(mark in text for mark in ("gloo", "NCCL")):
            raise
        raise ValueError(start + _explain(text, world.world_size, about)) from error
    finally:
        watch.cancel()


def join_session(store: Store, world: World, seconds: float) -> Store:
    """Collective: call on every rank. Return the store without what ranks of an earlier start left in it.

    torchrun keeps one store over restarts of its group, and its nodes count them differently. So each rank says hello
    with a number of its own, rank 0 offers a session to those it heard, and all join once each has accepted the same.

    Raises:
        ValueError: not all ranks came in time.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"hello {world.rank}", own)
    offer: list[str] = []
    while time.monotonic() < deadline:
        if world.is_main:
            hellos = [_read(store, f"hello {rank}") for rank in range(world.world_size)]
            if hellos != offer[1:]:
                offer = [uuid.uuid4().hex, *hellos]
                store.set("offer", " ".join(offer))
        else:
            offer = _read(store, "offer").split(" ")
        session = offer[0]
        if own in offer[1:]:
            store.set(f"accepted {world.rank}", session)
        if world.is_main and all(_read(store, f"accepted {r}") == session for r in range(world.world_size)):
            store.set(f"begun {session}", "")
        if own in offer[1:] and store.check([f"begun {session}"]):
            return PrefixStore(session, store)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise dist.DistStoreError("not all ranks came")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _is_answered(url: str, seconds: float) -> bool:
    """Wait until something listens; torch would write its stack for each address that it tries in vain."""
    address, deadline = urlsplit(url), time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address.hostname, address.port), timeout=seconds):
                return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_SECONDS_BETWEEN_TRIES)


def _explain(text: str, count: int, about: dict[str, str]) -> str:
    """Return what an error of torch means to the user."""
    for pattern, meaning in _MEANINGS.items():
        match = re.search(pattern, text)
        if match is not None:
            joined = match[1] if match.lastindex else ""
            return meaning.format(match=joined, count=count, **about)
    raise AssertionError("the last pattern matches everything")


def _give_up(line: str) -> None:
    print_error(line)
    os._exit(2)
