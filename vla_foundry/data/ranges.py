"""Read the bytes of a shard: a local file, or ranges of a remote one, fetched ahead of their use."""

import errno
import functools
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, Protocol, runtime_checkable

from vla_foundry.storage.uri import describe, read_range

_NUM_THREADS = 8


@runtime_checkable
class ShardBytes(Protocol):
    """The bytes of a shard."""

    @property
    def num_bytes(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes: ...

    def want(self, spans: Iterable[tuple[int, int]]) -> None: ...


class LocalBytes:
    """The bytes of a file, which is closed once nothing uses them: a batch may use more shards than are kept open."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        os.close(self._descriptor)

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Read a range.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        content = os.pread(self._descriptor, size, offset)
        while len(content) < size:  # one read returns at most 2 GiB
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                raise OSError(errno.EIO, "the file is cut off")
            content += more
        return content

    def want(self, spans: Iterable[tuple[int, int]]) -> None:
        """Do nothing: the system reads ahead itself."""


class RemoteBytes:
    """The bytes of a remote file, by one request a range, all of the version that the file has now.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the store cannot be reached.
    """

    def __init__(self, uri: str) -> None:
        found = describe(uri)
        self.num_bytes = found.size
        self._uri, self._version = uri, str(found.version)
        # {(offset, size): the bytes, once they are there}
        self._ahead: dict[tuple[int, int], Future[bytes]] = {}

    def read(self, offset: int, size: int) -> bytes:
        """Read a range; what was wanted before is there already, or on its way.

        Raises:
            OSError: the store fails, or the file has changed. It is no fault of a sample.
        """
        for (first, length), content in self._ahead.items():
            if first <= offset and offset + size <= first + length:
                return content.result()[offset - first : offset - first + size]
        return self._fetch(offset, size)

    def want(self, spans: Iterable[tuple[int, int]]) -> None:
        """Fetch ranges, (offset, size), in the background, and forget those that were wanted before."""
        self._ahead = {
            span: self._ahead.get(span) or _pool(os.getpid()).submit(self._fetch, *span) for span in spans if span[1]
        }

    def _fetch(self, offset: int, size: int) -> bytes:
        try:
            content = read_range(self._uri, offset, size, self._version)
        except (ValueError, OSError) as error:
            raise OSError(errno.EIO, str(error).removeprefix(f"{self._uri}: "), self._uri) from error
        if len(content) != size:
            raise OSError(errno.EIO, "the file is cut off", self._uri)
        return content


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="read-ahead")
