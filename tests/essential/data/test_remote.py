"""Remote shards behind a store that fails: the batches are those of local files, or one line says why."""

import http.client
import itertools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from vla_foundry.data import create_dataloader
from vla_foundry.params.data.base import DatasetCacheParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.storage import s3

FAULTS = ("5xx", "reset", "truncated", "short", "trickle", "whole_file", "other_range")


class Proxy(ThreadingHTTPServer):
    """Stands before a store, and spoils every n-th answer with bytes of a shard; n is 0: none."""

    daemon_threads = True

    def __init__(self, store: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = urlsplit(store).netloc
        self.fault, self.every = "", 0
        self.count = itertools.count(1)
        # (path, bytes) of each answer with bytes of a shard
        self.answers: list[tuple[str, int]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client hung up on a trickle."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("")

    def do_GET(self) -> None:
        proxy = self.server
        is_shard = urlsplit(self.path).path.endswith(".tar")
        is_spoilt = is_shard and proxy.every and next(proxy.count) % proxy.every == 0
        self.answer(proxy.fault if is_spoilt else "", is_shard=is_shard)

    def answer(self, fault: str, *, is_shard: bool = False) -> None:
        headers = dict(self.headers)
        if fault == "whole_file":
            del headers["Range"]
        if fault == "other_range":
            headers["Range"] = "bytes=1-7"
        with closing(http.client.HTTPConnection(self.server.store)) as connection:
            connection.request(self.command, self.path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        if is_shard:
            self.server.answers.append((self.path, len(body)))
        status, size = answer.status, int(answer.headers.get("Content-Length", 0))
        if fault == "5xx":
            status, body = 503, b"<Error><Code>ServiceUnavailable</Code></Error>"
            size = len(body)
        if fault in ("short", "truncated", "reset"):
            body = body[: len(body) // 2]
        self.send_response_only(status)
        for name, value in answer.headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if fault == "short" else size))
        self.end_headers()
        if fault == "trickle":
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(0.2)
        self.wfile.write(body)
        if fault == "reset":
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("truncated", "reset", "trickle"):
            self.close_connection = True
            self.rfile.close()  # else the socket stays open
            self.connection.close()


@pytest.fixture
def proxy(s3_folder: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    server = Proxy(s3_environment["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setattr(s3, "_FIRST_WAIT_SECONDS", 0.01)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def dataset(
    tmp_path: Path, write_samples: Callable, json_tokens: Callable, put_folder: Callable, s3_folder: str, proxy: Proxy
) -> str:
    """The remote manifest of 200 samples in 2 shards, and of their local copy; their indexes are there."""
    draw = random.Random(3)
    samples = [json_tokens([n, *(draw.randrange(50_000) for _ in range(300))]) for n in range(200)]
    manifest = write_samples(tmp_path / "local", [samples[:100], samples[100:]])
    read(str(manifest), 20, "shards", tmp_path)
    put_folder(manifest.parent, s3_folder)
    return f"{s3_folder}/manifest.jsonl"


def read(manifest: str, num_batches: int, mode: Any, folder: Path, **changes: Any) -> list[list[int]]:
    """The tokens of each microbatch."""
    params = TextDataParams(
        dataset_manifest=[manifest],
        val_dataset_manifest=[manifest],
        seq_len=300,
        num_workers=0,
        dataset_cache=DatasetCacheParams(mode=mode, cache_dir=str(folder / "cache")),
    )
    with closing(create_dataloader(params, global_batch_size=4, per_gpu_batch_size=4, seed=1, **changes)) as loader:
        return [batch["input_ids"].tolist() for batch in itertools.islice(loader.microbatches(0), num_batches)]


@pytest.mark.parametrize("mode", ["shards", "ranges"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_sometimes_fails_changes_no_batch(
    dataset: str, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str, mode: str
) -> None:
    expected = read(str(tmp_path / "local" / "manifest.jsonl"), 5, "shards", tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.fault, proxy.every = fault, 2 if mode == "shards" else 7
    if fault == "trickle":
        monkeypatch.setattr(s3, "_CONNECT_SECONDS", 0.0)
        monkeypatch.setattr(s3, "_READ_SECONDS", 3.0)
    assert read(dataset, 5, mode, tmp_path) == expected
    assert next(proxy.count) > proxy.every
    cached = sorted(path.suffix for path in (tmp_path / "cache").glob("*.*"))
    assert cached == ([".json", ".json", ".tar", ".tar"] if mode == "shards" else [])


@pytest.mark.parametrize("mode", ["shards", "ranges"])
@pytest.mark.parametrize("fault", ["5xx", "reset", "short", "whole_file"])
def test_a_store_that_always_fails_ends_in_one_line_and_leaves_no_half_file(
    dataset: str, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str, mode: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.fault, proxy.every = fault, 1
    with pytest.raises((ValueError, OSError), match=r"s3://.*/shard_00000\d\.tar") as caught:
        read(dataset, 5, mode, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").glob("*")] in ([], ["locks"])


def test_a_small_evaluation_by_ranges_asks_for_little(
    dataset: str, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    options: dict[str, Any] = {"split": "validation", "total_samples": 4}
    found = read(dataset, 1, "ranges", tmp_path, **options)
    assert found == read(str(tmp_path / "local" / "manifest.jsonl"), 1, "shards", tmp_path, **options)
    # one request a sample, and the headers of the shard's first and last members
    assert len(proxy.answers) == 4 + 2
    whole = os.path.getsize(tmp_path / "local" / "shard_000000.tar")
    assert sum(size for _, size in proxy.answers) < 0.06 * whole


def test_a_shard_that_is_written_again_while_it_is_read_is_said(dataset: str, tmp_path: Path, s3_folder: str) -> None:
    params = TextDataParams(
        dataset_manifest=[dataset], seq_len=300, num_workers=0, dataset_cache=DatasetCacheParams(mode="ranges")
    )
    with closing(create_dataloader(params, global_batch_size=4, per_gpu_batch_size=4, seed=1)) as loader:
        batches = loader.microbatches(0)
        next(batches)
        for number in range(2):
            content = bytearray((tmp_path / "local" / f"shard_{number:06d}.tar").read_bytes())
            content[-1] ^= 1
            s3.S3Storage().write_bytes(f"{s3_folder}/shard_{number:06d}.tar", bytes(content))
        with pytest.raises((ValueError, OSError), match=r"shard_00000\d\.tar.*changed while it was being read"):
            list(itertools.islice(batches, 20))
