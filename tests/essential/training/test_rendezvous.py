"""Ranks meet, also where an earlier start of them left something, and say in one line why they do not."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store

from vla_foundry.params.distributed import DistributedParams
from vla_foundry.training import rendezvous
from vla_foundry.training.rendezvous import join_session, meeting_other_ranks
from vla_foundry.world import World


def join_all(store: Store, num_ranks: int) -> list[Store]:
    worlds = [World(rank=rank, world_size=num_ranks) for rank in range(num_ranks)]
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(lambda world: join_session(store, world, 20.0), worlds))


def test_ranks_that_start_again_find_nothing_of_their_earlier_starts() -> None:
    store = HashStore()
    for start in range(3):
        # this one died after it was heard
        store.set("hello 2", f"of the dead {start}")
        sessions = join_all(store, 3)
        assert not sessions[0].check(["address"])
        sessions[1].set("address", str(start))
        assert [session.get("address") for session in sessions] == [str(start).encode()] * 3


def test_a_rank_that_is_missing_ends_the_others_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(dist.DistStoreError):
        join_session(HashStore(), World(rank=0, world_size=2), 0.3)
    assert time.monotonic() - started < 5


@pytest.fixture
def silent_port() -> Iterator[int]:
    """The port of a program that listens and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (
            "The server socket has failed to listen. code: -98, name: EADDRINUSE",
            r"the port of 127\.0\.0\.1:\d+ is in use",
        ),
        ("Ping failed, invalid value returned from server. Expected: 8903", "is not a run"),
        ("Timed out after 7 seconds waiting for clients. 2/3 clients joined.", "only 2 of 3 ranks came"),
        ("wait timeout after 6000ms, keys: /default_pg/0//cpu//0/0", "not all 3 ranks came to .* within distributed"),
    ],
)
def test_what_torch_says_is_one_line_with_a_fix(said: str, meant: str, silent_port: int) -> None:
    params = DistributedParams(dist_url=f"tcp://127.0.0.1:{silent_port}", timeout_s=9.0)
    world = World(rank=1, world_size=3)
    message = rf"^rank 1 on \S+ did not reach the other ranks: .*{meant}"
    with pytest.raises(ValueError, match=message) as raised, meeting_other_ranks(params, world):
        raise dist.DistNetworkError(said)
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="of something else"), meeting_other_ranks(params, world):
        raise RuntimeError("of something else")


def test_an_address_where_nobody_answers_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    params = DistributedParams(dist_url=f"tcp://127.0.0.1:{port}", timeout_s=1.0)
    with (
        pytest.raises(
            ValueError, match=rf"nobody answers at 127\.0\.0\.1:{port} within distributed\.timeout_s \(1 s\)"
        ),
        meeting_other_ranks(params, World(rank=1, world_size=2)),
    ):
        pytest.fail("it waits for an answer first")


def test_a_stranger_that_says_nothing_is_not_waited_for(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    given_up = threading.Event()
    monkeypatch.setattr(rendezvous, "_MORE_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "_give_up", lambda line: (lines.append(line), given_up.set()))
    params = DistributedParams(dist_url=f"tcp://127.0.0.1:{silent_port}", timeout_s=1.0)
    with meeting_other_ranks(params, World(rank=1, world_size=2)):
        assert given_up.wait(20)
    assert "The port is another program's, or ranks are missing" in lines[0]
