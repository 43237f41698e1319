"""Cache remote shards on the node: whole files, shared by all its processes, bounded in size, safe to kill.

    <folder>/<key>.tar          a whole, checked shard
    <folder>/<key>.index.json   its index
    <folder>/<key>.part/        a download in progress; stale if no process holds its lock
    <folder>/locks/<00 .. ff>   flock files, one for all keys that start with these two digits; locks/all: eviction

A key is a hash of a shard's name, size and checksum (else its version in the store), so a rewritten dataset never gets
stale bytes. When space runs out, the least recently opened shards are deleted. A reader that still has one open can
keep reading: the disk space is freed when the reader closes it.
"""

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vla_foundry.data.indexing import index_name
from vla_foundry.run_folder import hold_lock
from vla_foundry.shards import sha256_of
from vla_foundry.storage.local import Listed
from vla_foundry.storage.uri import describe, download

_logger = logging.getLogger(__name__)
_NUM_LOOK_AHEAD_THREADS = 2
_MAX_OPEN_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class RemoteShard:
    """A remote tar, with its size and checksum if known."""

    uri: str
    # size in bytes; None if unknown
    num_bytes: int | None = None
    # hexadecimal SHA-256; None if unknown
    sha256: str | None = None


class DamagedShardError(ValueError):
    """The bytes of a remote shard have another checksum than in its manifest."""


class ShardCache:
    """Downloads and keeps remote shards.

    Args:
        folder: cache folder on a local disk, the same for all processes of a node.
        max_bytes: limit on the total size of the cached files.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._described: dict[str, Listed] = {}

    def open(self, shard: RemoteShard) -> tuple[BinaryIO, str]:
        """Return a shard, open for reading, and its path in the cache; download it if it is not cached.

        Raises:
            FileNotFoundError: the remote file does not exist.
            DamagedShardError: two downloads had another checksum than in the manifest.
            ValueError: two downloads failed, or the shard is larger than the cache.
        """
        for _ in range(_MAX_OPEN_ATTEMPTS):
            self.fetch(shard)
            path = self._path(shard)
            try:
                os.utime(path)
                with suppress(FileNotFoundError):
                    os.utime(index_name(path))  # it stays the newer one
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
        """Download a shard into the cache unless it is already there.

        Args:
            shard: the shard.
            wait: if another process is downloading it, wait; if False, leave it to that process.

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
        shutil.rmtree(part_folder, ignore_errors=True)  # left by a killed process
        part = os.path.join(part_folder, "shard")
        try:
            with self._locked("all"):
                self._evict(num_bytes)
                os.makedirs(part_folder)
                with open(os.path.join(part_folder, "room"), "wb") as room:
                    room.truncate(num_bytes)  # takes no disk space, but other processes count it
            for is_last in (False, True):
                try:
                    download(shard.uri, part)
                    _check_download(part, shard, num_bytes)
                    break
                except FileNotFoundError:
                    raise
                except (OSError, ValueError) as error:
                    if is_last:
                        raise
                    _logger.warning("%s It is downloaded once more.", error)
            os.replace(part, path)
        finally:
            shutil.rmtree(part_folder, ignore_errors=True)

    def _evict(self, num_bytes: int) -> None:
        """Delete stale files, and least recently used shards until `num_bytes` fit. The caller holds the lock "all"."""
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
        """Return the bytes that a download in progress has reserved; delete the download if no process owns it."""
        with self._locked(entry.name[:2], wait=False) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(entry.path, ignore_errors=True)
                return 0
        status = _status(os.path.join(entry.path, "room"))
        return status.st_size if status else 0

    def size(self, shard: RemoteShard) -> int:
        """Return a shard's size in bytes, from the manifest or, failing that, the store."""
        if shard.num_bytes is not None:
            return shard.num_bytes
        return self._describe(shard).size

    def _describe(self, shard: RemoteShard) -> Listed:
        """Return a shard's size and version in the store, asked once."""
        if shard.uri not in self._described:
            self._described[shard.uri] = describe(shard.uri)
        return self._described[shard.uri]

    def _path(self, shard: RemoteShard) -> str:
        identity = f"{shard.uri}\n{self.size(shard)}\n{shard.sha256 or self._describe(shard).version}"
        return os.path.join(self.folder, hashlib.sha256(identity.encode()).hexdigest()[:40] + ".tar")

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a cache lock. Yield False, without the lock, if `wait` is False and another process holds it."""
        os.makedirs(os.path.join(self.folder, "locks"), exist_ok=True)
        with hold_lock(Path(self.folder, "locks", name), wait=wait) as file:
            yield file is not None


class LookAhead:
    """Threads that download shards into the cache before they are read.

    Several processes may look ahead over the same shards; a shard that another process is downloading is skipped.
    Errors are only logged here, because reading the shard raises them again.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: list[RemoteShard] = []
        self._room = 0
        self._changed = threading.Condition()
        # held while a shard is taken
        self._order = threading.Lock()
        self._is_closed = False
        for _ in range(_NUM_LOOK_AHEAD_THREADS):
            threading.Thread(target=self._work, daemon=True, name="look-ahead").start()

    def want(self, shards: Sequence[RemoteShard]) -> None:
        """Replace the list of shards to fetch, most urgent first. Prefetching fills at most half the cache."""
        with self._changed:
            self._wanted = list(shards)
            self._room = self._cache.max_bytes // 2
            self._changed.notify_all()

    def close(self) -> None:
        """Finish the downloads in progress, then stop."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while not self._is_closed:
            try:
                shard = self._take()
                if shard is not None:
                    self._cache.fetch(shard, wait=False)
            except (OSError, ValueError) as error:
                _logger.info("Look-ahead: %s", error)
                time.sleep(1)

    def _take(self) -> RemoteShard | None:
        """Wait for the next shard that has room; None if the room is used up. Room goes to the most urgent first."""
        with self._order:
            with self._changed:
                while not self._wanted and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return None
                shard = self._wanted.pop(0)
            num_bytes = self._cache.size(shard)
            with self._changed:
                self._room -= num_bytes
                if self._room < 0:
                    self._wanted.clear()
                    return None
            return shard


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _check_download(path: str, shard: RemoteShard, num_bytes: int) -> None:
    fix = "Upload it again, or write its manifest with `vla-foundry manifest build`."
    size = os.path.getsize(path)
    if size != num_bytes:
        raise ValueError(f"{shard.uri} has {size} bytes, not {num_bytes}. {fix}")
    if shard.sha256 is not None:
        with open(path, "rb") as file:
            found = sha256_of(file)
        if found != shard.sha256:
            raise DamagedShardError(f"{shard.uri} has SHA-256 {found[:12]}..., not {shard.sha256[:12]}.... {fix}")
