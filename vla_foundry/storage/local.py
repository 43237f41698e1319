"""Files on this machine: atomic writes, listing, and the file name patterns that all kinds of storage share."""

import errno
import fnmatch
import glob
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

# suffix of unfinished files; they may be deleted when no writer is alive
TEMPORARY_SUFFIX = ".tmp"
# only writing can fail with these
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Listed(NamedTuple):
    """A file in a listing."""

    # bytes
    size: int
    # changes with the content: the time of the last change (ns), or what a store computes from the content
    version: int | str


class IncompleteDownload(ValueError):
    """A copy does not have the size of its source, so it is worth another try."""


class RemoteFile(io.RawIOBase):
    """A seekable raw file of a store; the store's class reads it at `_position`."""

    mode = "rb"

    def __init__(self, uri: str, size: int) -> None:
        super().__init__()
        # files have a name, and some readers ask for it
        self.name = self._uri = uri
        self._size, self._position = size, 0

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def tell(self) -> int:
        """See io.RawIOBase."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """See io.RawIOBase."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._uri}: seek before the beginning")
        self._position = base + offset
        return self._position


def _local(path: str) -> str:
    return os.path.expanduser(path)


def sync_folder(folder: str) -> None:
    """Make renames within `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def name_errors(path: str | Path, only: tuple[int, ...] = ()) -> Iterator[None]:
    """Add a file's name to an OSError without one, such as write() raises on a full disk.

    Args:
        path: the file.
        only: the error numbers to name; empty: all.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None and (not only or error.errno in only):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def replace_file(path: str) -> Iterator[str]:
    """Yield a temporary path beside `path`; fsync and rename it to `path` when the block ends without an error.

    After an error, delete it. Temporary names are `.<name>.<random>.tmp`, so that concurrent writers do not collide.
    """
    path = _local(path)
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    # the name of the file may be as long as the file system allows
    temporary = os.path.join(folder, f".{os.path.basename(path)[:40]}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
    try:
        with name_errors(path, FULL):
            yield temporary
        with name_errors(path):
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(folder)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, and rename it to `folder` when the block ends without an error.

    If `folder` exists, its files are replaced one by one, and those without a successor stay.
    """
    aside = folder.with_name(f".{folder.name}{TEMPORARY_SUFFIX}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with name_errors(folder, FULL):
        yield aside
    if not folder.exists() and any(aside.iterdir()):
        aside.rename(folder)
        return
    for source in [path for path in aside.rglob("*") if path.is_file()]:
        target = folder / source.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    shutil.rmtree(aside)


class LocalStorage:
    """See vla_foundry.storage.uri.Storage."""

    def open_input(self, uri: str) -> BinaryIO:
        path = _local(uri)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{uri} is not a file.")
        return open(path, "rb")

    def read_range(self, uri: str, offset: int, size: int, version: str | None = None) -> bytes:
        with self.open_input(uri) as file:
            file.seek(offset)
            return file.read(size)

    def describe(self, uri: str) -> Listed:
        path = _local(uri)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{uri} is not a file.")
        status = os.stat(path)
        return Listed(status.st_size, status.st_mtime_ns)

    def list_entries(self, folder_or_glob: str) -> dict[str, Listed]:
        path = _local(folder_or_glob)
        if os.path.isfile(path):
            names = [path]
        elif os.path.isdir(path):
            names = list(_files_below(path))
        elif is_pattern(path):
            names = [name for name in glob.glob(path, recursive=True, include_hidden=True) if os.path.isfile(name)]
            if not names:
                raise FileNotFoundError(f"No file matches {folder_or_glob}.")
        else:
            raise FileNotFoundError(f"{folder_or_glob} is neither a file nor a folder.")
        return {name: Listed(status.st_size, status.st_mtime_ns) for name in names for status in [os.stat(name)]}

    @contextmanager
    def open_output(self, uri: str) -> Iterator[BinaryIO]:
        with replace_file(uri) as temporary, open(temporary, "xb") as file:
            yield file

    def write_bytes(self, uri: str, data: bytes) -> None:
        with self.open_output(uri) as file, name_errors(uri):
            file.write(data)

    def download(self, uri: str, path: str) -> None:
        with self.open_input(uri) as source, self.open_output(path) as target:
            shutil.copyfileobj(source, target, 1 << 22)

    def upload(self, path: str, uri: str) -> None:
        self.download(path, uri)

    def delete(self, uri: str) -> None:
        path = _local(uri)
        if os.path.isfile(path):
            os.unlink(path)


def has_files(uri: str) -> bool:
    """True if a local folder holds a file, at any depth; it is not listed as a whole."""
    return any(_files_below(_local(uri)))


def _files_below(folder: str) -> Iterator[str]:
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        yield from (path for name in files if os.path.isfile(path := os.path.join(here, name)))


def is_pattern(name: str) -> bool:
    """True if `name` has one of the special characters of a pattern."""
    return any(character in name for character in "*?[")


def compile_pattern(pattern: str) -> tuple[str, Callable[[str], bool]]:
    """Return the fixed prefix of a pattern, and a function that is true for matching names.

    `*`, `?` and `[...]` match within one folder level; a level `**` matches any number of levels.
    """
    prefix = pattern[: min(pattern.index(character) for character in "*?[" if character in pattern)]
    levels = pattern.split("/")
    return prefix, lambda name: _match(name.split("/"), levels)


def _match(names: list[str], levels: list[str]) -> bool:
    if not levels or not names:
        return not levels and not names
    if levels[0] != "**":
        return fnmatch.fnmatchcase(names[0], levels[0]) and _match(names[1:], levels[1:])
    return len(levels) == 1 or any(_match(names[first:], levels[1:]) for first in range(len(names)))


def size_and_sha256(path: Path) -> tuple[int, str]:
    """Return a file's bytes and hexadecimal SHA-256, as COMPLETE and passport.json list them."""
    return path.stat().st_size, hash_file(path, "sha256")


def hash_file(path: Path, algorithm: str) -> str:
    """Return a file's hexadecimal hash: sha256, md5, or git (the SHA-1 of a blob)."""
    digest = hashlib.new("sha1" if algorithm == "git" else algorithm, usedforsecurity=False)
    if algorithm == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
