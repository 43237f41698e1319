"""The node's cache of remote shards: whole files, shared by all processes of the node, bounded, safe to kill.

    <folder>/<key>.tar          a whole, checked shard
    <folder>/<key>.index.json   its index
    <folder>/<key>.part/        a download in progress; without a process that holds its lock it is rubbish
    <folder>/locks/<00 .. ff>   locks (flock), shared by all keys with these first two digits; locks/all: for eviction

A key is a hash of a shard's name, size and checksum, so a dataset that is written anew never meets old bytes. The
least recently opened shards are deleted when room is needed. A reader that still has one open goes on reading it: its
bytes are freed when it is closed.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from vla_foundry.data.indexing import index_name
from vla_foundry.shards import sha256_of
from vla_foundry.storage.uri import download, size_of

_logger = logging.getLogger(__name__)
_NUM_LOOK_AHEAD_THREADS = 2
_MAX_OPEN_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class RemoteShard:
    """A remote tar and what is known of it."""

    uri: str
    # size in bytes, or None
    num_bytes: int | None = None
    # SHA-256, hexadecimal, or None
    sha256: str | None = None


class ShardCache:
    """Downloads and keeps remote shards.

    Args:
        folder: folder of the cache, on a local disk; all processes of a node name the same.
        max_bytes: the files of the cache together stay below this.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._sizes: dict[str, int] = {}

    def open(self, shard: RemoteShard) -> tuple[BinaryIO, str]:
        """Return a shard, open for reading, and its path in the cache; download it if it is not there.

        Raises:
            FileNotFoundError: there is no such remote file.
            ValueError: its bytes are not those that the manifest names, twice; or it is larger than the cache.
        """
        for _ in range(_MAX_OPEN_ATTEMPTS):
            self.fetch(shard)
            path = self._path(shard)
            try:
                os.utime(path)
                return open(path, "rb"), path
            except FileNotFoundError:  # another process has just evicted it
                continue
        raise ValueError(
            f"{shard.uri} was evicted from {self.folder} while it was opened, {_MAX_OPEN_ATTEMPTS} times. "
            f"Raise data.dataset_cache.cache_size_gb ({self.max_bytes / 1e9:g})."
        )

    def holds(self, shard: RemoteShard) -> bool:
        """True if the shard is in the cache."""
        return os.path.exists(self._path(shard))

    def fetch(self, shard: RemoteShard, *, wait: bool = True) -> bool:
        """Bring a shard into the cache.

        Args:
            shard: which.
            wait: wait for another process that is downloading it; if False, leave it to that one.

        Returns:
            True if the shard is in the cache.
        """
        path = self._path(shard)
        if os.path.exists(path):
            return True
        with self._locked(os.path.basename(path)[:2], wait=wait) as is_mine:
            if is_mine and not os.path.exists(path):
                self._download(shard, path)
            return is_mine

    def _download(self, shard: RemoteShard, path: str) -> None:
        part_folder = path.removesuffix(".tar") + ".part"
        num_bytes = self.size(shard)
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"{shard.uri} ({num_bytes} bytes) is larger than the cache. "
                f"Raise data.dataset_cache.cache_size_gb ({self.max_bytes / 1e9:g})."
            )
        shutil.rmtree(part_folder, ignore_errors=True)  # what a killed process left
        part = os.path.join(part_folder, "shard")
        try:
            with self._locked("all"):
                self._evict(num_bytes)
                os.makedirs(part_folder)
                with open(os.path.join(part_folder, "room"), "wb") as room:
                    room.truncate(num_bytes)  # takes no disk space, but is counted by others
            download(shard.uri, part)
            fault = _find_fault(part, num_bytes, shard.sha256)
            if fault:
                _logger.warning("%s %s; it is downloaded once more.", shard.uri, fault)
                download(shard.uri, part)
                fault = _find_fault(part, num_bytes, shard.sha256)
            if fault:
                raise ValueError(
                    f"{shard.uri} {fault}. Upload it again, or write its manifest with `vla-foundry manifest build`."
                )
            os.replace(part, path)
        finally:
            shutil.rmtree(part_folder, ignore_errors=True)

    def _evict(self, num_bytes: int) -> None:
        """Delete the least recently used shards until `num_bytes` fit, and rubbish. The caller holds the lock "all"."""
        used, shards = 0, []
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            if entry.name.endswith(".part"):
                used += self._measure_part(entry)
            elif entry.name.endswith((".tar", ".index.json")):
                status = _status(entry.path)
                used += status.st_size if status else 0
                if status and entry.name.endswith(".tar"):
                    shards.append((status.st_mtime, status.st_size, entry.path))
        for _, size, path in sorted(shards):
            if used + num_bytes <= self.max_bytes:
                break
            for name in (path, index_name(path)):
                if os.path.exists(name):
                    os.unlink(name)
            used -= size

    def _measure_part(self, entry: os.DirEntry[str]) -> int:
        """Return the room that a download in progress has reserved; remove it if nobody works on it any more."""
        with self._locked(entry.name[:2], wait=False) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(entry.path, ignore_errors=True)
                return 0
        status = _status(os.path.join(entry.path, "room"))
        return status.st_size if status else 0

    def size(self, shard: RemoteShard) -> int:
        """Return a shard's size in bytes, from the manifest or else from the store."""
        if shard.num_bytes is not None:
            return shard.num_bytes
        if shard.uri not in self._sizes:
            self._sizes[shard.uri] = size_of(shard.uri)
        return self._sizes[shard.uri]

    def _path(self, shard: RemoteShard) -> str:
        identity = f"{shard.uri}\n{self.size(shard)}\n{shard.sha256}"
        return os.path.join(self.folder, hashlib.sha256(identity.encode()).hexdigest()[:40] + ".tar")

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a lock of the cache. Yields False, without it, if `wait` is False and another process holds it."""
        os.makedirs(os.path.join(self.folder, "locks"), exist_ok=True)
        with open(os.path.join(self.folder, "locks", name), "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_mine = True
            except BlockingIOError:
                is_mine = False
            yield is_mine  # closing the file gives the lock back


class LookAhead:
    """Threads that bring shards into the cache before they are read.

    Several processes may look ahead over the same shards: one that is being downloaded is left to whoever does it. An
    error here is only logged: whoever reads the shard meets it again.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: list[RemoteShard] = []
        self._room = 0
        self._changed = threading.Condition()
        self._is_closed = False
        for _ in range(_NUM_LOOK_AHEAD_THREADS):
            threading.Thread(target=self._work, daemon=True, name="look-ahead").start()

    def want(self, shards: Sequence[RemoteShard]) -> None:
        """Replace the list of shards to fetch, the most urgent first. At most half the cache is filled ahead."""
        with self._changed:
            self._wanted = list(shards)
            self._room = self._cache.max_bytes // 2
            self._changed.notify_all()

    def close(self) -> None:
        """Stop after the downloads in progress."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                shard = self._wanted.pop(0)
            try:
                num_bytes = self._cache.size(shard)
                with self._changed:
                    self._room -= num_bytes
                    if self._room < 0:
                        self._wanted.clear()
                        continue
                self._cache.fetch(shard, wait=False)
            except (OSError, ValueError) as error:
                _logger.info("Look-ahead: %s", error)
                time.sleep(1)


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _find_fault(path: str, num_bytes: int, sha256: str | None) -> str | None:
    size = os.path.getsize(path)
    if size != num_bytes:
        return f"has {size} bytes, not {num_bytes}"
    if sha256 is not None:
        with open(path, "rb") as file:
            found = sha256_of(file)
        if found != sha256:
            return f"has SHA-256 {found[:12]}..., not {sha256[:12]}..."
    return None
