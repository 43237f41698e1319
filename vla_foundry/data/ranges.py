"""Read the bytes of a shard: a local file, or ranges of a remote one, fetched ahead of their use."""

import errno
import functools
import os
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, Protocol, runtime_checkable

from vla_foundry.storage.uri import describe, read_range

_NUM_THREADS = 8
# bytes between two members that are read together
_MOST_BETWEEN = 4096


@runtime_checkable
class ShardBytes(Protocol):
    """The bytes of a shard."""

    @property
    def num_bytes(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes: ...

    def read_member(self, offset: int, size: int) -> bytes: ...

    def read_members(self, spans: Sequence[tuple[int, int]]) -> list[bytes]: ...

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

    # an index that is older than its local tar is not used
    read_member = read

    def read_members(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read members, (offset, size), by one call if they are neighbours; see `read`."""
        if len(join_members(spans)) != 1:
            return [self.read(*span) for span in spans]
        first = min(offset for offset, _ in spans)
        content = self.read(first, max(map(sum, spans)) - first)
        return [content[offset - first : offset - first + size] for offset, size in spans]

    def want(self, spans: Iterable[tuple[int, int]]) -> None:
        """Do nothing: the system reads ahead itself."""


class RemoteBytes:
    """The bytes of a remote file, by one request a range, all of one version.

    Attributes:
        num_bytes: its size.
        version: the store's name of these bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the store cannot be reached.
    """

    def __init__(self, uri: str) -> None:
        found = describe(uri)
        self.num_bytes, self.version = found.size, str(found.version)
        self._uri = uri
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

    def read_member(self, offset: int, size: int) -> bytes:
        """Read a member, and compare its header with its place: an index may be of other bytes.

        Raises:
            OSError: the header has another size, or the store fails; see `read`.
        """
        first = max(offset - tarfile.BLOCKSIZE, 0)
        content = self.read(first, offset - first + size)
        if not is_header(content[: offset - first], size):
            detail = "it was written again after its index. Upload it together with its index"
            raise OSError(errno.ESTALE, detail, self._uri)
        return content[tarfile.BLOCKSIZE :]

    def read_members(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read members, (offset, size); see `read_member`."""
        return [self.read_member(*span) for span in spans]

    def want(self, spans: Iterable[tuple[int, int]]) -> None:
        """Fetch ranges, (offset, size), in the background, and forget those that were wanted before."""
        self._ahead = {
            span: self._ahead.get(span) or _pool(os.getpid()).submit(self._fetch, *span) for span in spans if span[1]
        }

    def _fetch(self, offset: int, size: int) -> bytes:
        try:
            content = read_range(self._uri, offset, size, self.version)
        except (ValueError, OSError) as error:
            raise OSError(errno.EIO, str(error).removeprefix(f"{self._uri}: "), self._uri) from error
        if len(content) != size:
            raise OSError(errno.EIO, "the file is cut off", self._uri)
        return content


def is_header(block: bytes, size: int) -> bool:
    """True if a block of a tar is the header of a member of this size."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size == size
    except tarfile.TarError:
        return False


def join_members(members: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges of members, (offset, size), with their headers: one, but for members that are far apart."""
    spans: list[tuple[int, int]] = []
    for offset, size in sorted(members):
        first, end = max(offset - tarfile.BLOCKSIZE, 0), offset + size
        if spans and first - sum(spans[-1]) <= _MOST_BETWEEN:
            spans[-1] = (spans[-1][0], max(sum(spans[-1]), end) - spans[-1][0])
        else:
            spans.append((first, end - first))
    return spans


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="read-ahead")
