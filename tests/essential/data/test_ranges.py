"""Remote shards behind a store that fails: the batches are those of local files, or one line says why."""

import gzip
import http.client
import itertools
import json
import math
import os
import random
import shutil
import socket
import struct
import tarfile
import threading
import time
import uuid
from collections import Counter
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
from vla_foundry.storage.uri import parent_uri

FAULTS = ("5xx", "reset", "truncated", "short", "trickle", "whole_file", "other_range")


class Proxy(ThreadingHTTPServer):
    """Stands before a store, and spoils answers with bytes of a shard."""

    daemon_threads = True

    def __init__(self, store: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = urlsplit(store).netloc
        self.spoil("")
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spoil(self, fault: str, every: int = 1, times: float = 1) -> None:
        """Spoil every n-th range the first times that it is asked for: no order of the requests matters."""
        self.fault, self.every, self.times = fault, every, times
        self.asked: Counter[tuple[str, str]] = Counter()
        # bytes of each answer from a shard
        self.answers: list[int] = []
        self.num_spoilt = 0

    def choose_fault(self, path: str, span: str) -> str:
        self.asked[path, span] += 1
        place = list(self.asked).index((path, span)) + 1
        is_spoilt = self.fault and place % self.every == 0 and self.asked[path, span] <= self.times
        self.num_spoilt += bool(is_spoilt)
        return self.fault if is_spoilt else ""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client hung up on a trickle."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("")

    do_PUT = do_HEAD

    def do_GET(self) -> None:
        proxy, is_shard = self.server, urlsplit(self.path).path.endswith(".tar")
        self.answer(proxy.choose_fault(self.path, self.headers["Range"]) if is_shard else "", is_shard=is_shard)

    def answer(self, fault: str, *, is_shard: bool = False) -> None:
        headers = dict(self.headers)
        if fault == "whole_file":
            del headers["Range"]
        if fault == "other_range":
            headers["Range"] = "bytes=1-7"
        with closing(http.client.HTTPConnection(self.server.store)) as connection:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection.request(self.command, self.path, body=sent or None, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        if is_shard:
            self.server.answers.append(len(body))
        status, size = answer.status, int(answer.headers.get("Content-Length", 0))
        if fault == "5xx":
            status, body = 503, b"<Error><Code>ServiceUnavailable</Code></Error>"
            size = len(body)
        if fault in ("short", "truncated", "reset"):
            body = body[: len(body) // 2]
        self.send_response_only(status)
        for name, value in answer.headers.items():
            # an answer of an overloaded store has no checksums of the object
            if name.lower() not in ("content-length", "connection", "transfer-encoding") and fault != "5xx":
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


@pytest.fixture(scope="module")
def proxy(s3_environment: dict[str, str]) -> Iterator[Proxy]:
    """One for all tests: botocore takes a second to create a client, of each address one."""
    server = Proxy(s3_environment["AWS_ENDPOINT_URL"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_environment, "AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "2"}.items():
            patch.setenv(name, value)
        patch.setattr(s3, "_FIRST_WAIT_SECONDS", 0.01)
        yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, write_samples: Callable) -> Path:
    """The folder of 200 samples in 2 shards, with their indexes."""
    draw = random.Random(3)
    rows = [[n, *(draw.randrange(50_000) for _ in range(300))] for n in range(200)]
    samples = [{"json.gz": gzip.compress(json.dumps(row).encode())} for row in rows]
    manifest = write_samples(tmp_path_factory.mktemp("data") / "local", [samples[:100], samples[100:]])
    read(str(manifest), 5, "shards", manifest.parent)
    return manifest.parent


@pytest.fixture
def dataset(local: Path, tmp_path: Path, proxy: Proxy, put_folder: Callable) -> str:
    """The manifest of the remote copy, of this test alone."""
    proxy.spoil("")
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    s3._client().create_bucket(Bucket=bucket)
    put_folder(local, f"s3://{bucket}/d")
    return f"s3://{bucket}/d/manifest.jsonl"


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
def test_a_store_that_sometimes_fails_changes_no_batch(
    dataset: str, local: Path, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    expected = read(str(local / "manifest.jsonl"), 5, "shards", tmp_path)
    for fault in FAULTS:
        folder = tmp_path / fault
        proxy.spoil(fault, every=1 if mode == "shards" else 7)
        with monkeypatch.context() as patch:
            if fault == "trickle":
                for name, value in (
                    ("_CONNECT_SECONDS", 0.0),
                    ("_READ_SECONDS", 2.0),
                    ("_SLOWEST_BYTES_PER_SECOND", 1e6),
                ):
                    patch.setattr(s3, name, value)
            assert read(dataset, 5, mode, folder) == expected, fault
        assert proxy.num_spoilt, fault
        cached = {path.suffix for path in (folder / "cache").glob("*.*")}
        assert cached == ({".json", ".tar"} if mode == "shards" else set())


@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_a_store_that_always_fails_ends_in_one_line_and_leaves_no_half_file(
    dataset: str, tmp_path: Path, proxy: Proxy, mode: str
) -> None:
    # a whole file in place of its only part is all of it
    for fault in ("5xx", "reset", "short", *(["whole_file"] if mode == "ranges" else [])):
        proxy.spoil(fault, times=math.inf)
        with pytest.raises((ValueError, OSError), match=r"s3://.*/shard_00000\d\.tar") as caught:
            read(dataset, 5, mode, tmp_path)
        assert "\n" not in str(caught.value)
        # threads that fetch other shards ahead may take longer to fail
        end = time.monotonic() + 60
        while (left := {path.name for path in (tmp_path / "cache").glob("*")} - {"locks"}) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left


def test_a_small_evaluation_by_ranges_asks_for_little(dataset: str, local: Path, tmp_path: Path, proxy: Proxy) -> None:
    options: dict[str, Any] = {"split": "validation", "total_samples": 4}
    found = read(dataset, 1, "ranges", tmp_path, **options)
    assert found == read(str(local / "manifest.jsonl"), 1, "shards", tmp_path, **options)
    # one request a sample, and the headers of the shard's first and last members
    assert len(proxy.answers) == 4 + 2
    whole = os.path.getsize(local / "shard_000000.tar")
    assert sum(proxy.answers) < 0.08 * whole


def test_a_shard_that_is_written_again_while_it_is_read_is_said(dataset: str, local: Path) -> None:
    params = TextDataParams(
        dataset_manifest=[dataset], seq_len=300, num_workers=0, dataset_cache=DatasetCacheParams(mode="ranges")
    )
    with closing(create_dataloader(params, global_batch_size=4, per_gpu_batch_size=4, seed=1)) as loader:
        batches = loader.microbatches(0)
        next(batches)
        for number in range(2):
            content = bytearray((local / f"shard_{number:06d}.tar").read_bytes())
            content[-1] ^= 1
            s3.S3Storage().write_bytes(parent_uri(dataset) + f"/shard_{number:06d}.tar", bytes(content))
        with pytest.raises((ValueError, OSError), match=r"shard_00000\d\.tar.*changed while it was being read"):
            list(itertools.islice(batches, 20))


def test_an_index_of_other_bytes_is_said_or_not_used(dataset: str, local: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for number in range(2):
        shard = (local / f"shard_{number:06d}.tar").read_bytes()
        with tarfile.open(local / f"shard_{number:06d}.tar") as tar:
            first, second, *_, last = (member.offset for member in tar.getmembers()[1:])
        # as long as before, with the first and last members where they were
        moved = shard[:first] + shard[second:last] + shard[first:second] + shard[last:]
        s3.S3Storage().write_bytes(parent_uri(dataset) + f"/shard_{number:06d}.tar", moved)
        (tmp_path / "moved" / f"shard_{number:06d}.tar").write_bytes(moved)
    with pytest.raises((ValueError, OSError), match=r"shard_00000\d\.tar.*written again after its index"):
        read(dataset, 20, "ranges", tmp_path)
    # a shard that is downloaded whole is indexed here
    manifest = shutil.copy(local / "manifest.jsonl", tmp_path / "moved")
    assert read(dataset, 20, "shards", tmp_path) == read(str(manifest), 20, "shards", tmp_path)
