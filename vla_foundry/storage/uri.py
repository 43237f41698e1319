"""Read, write, list and copy files named by a local path, `s3://bucket/key` or `hf://[datasets/]owner/repo/path`; read
those named by `http://` or `https://`.

A missing file raises FileNotFoundError with its name. Anything else that the user can fix (an unknown scheme, no
credentials, a missing package, no network) raises a one-line ValueError. All writes are atomic: a reader sees the old
file or the whole new one.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol, runtime_checkable

from vla_foundry.parsing import MAX_BYTES, parse_json, parse_object, parse_yaml
from vla_foundry.storage.local import IncompleteDownload, Listed, LocalStorage, has_files, is_pattern, name_errors
from vla_foundry.tars import refuse_pipe

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_LOCAL = LocalStorage()
_CHUNK_SIZE = 16 << 20


@runtime_checkable
class Storage(Protocol):
    """Interface of a storage backend; `uri` is always the full name, scheme included."""

    def open_input(self, uri: str) -> BinaryIO: ...
    def read_range(self, uri: str, offset: int, size: int, version: str | None = None) -> bytes: ...
    def describe(self, uri: str) -> Listed: ...
    def list_entries(self, folder_or_glob: str) -> dict[str, Listed]: ...
    def write_bytes(self, uri: str, data: bytes) -> None: ...
    def download(self, uri: str, path: str) -> None: ...
    def upload(self, path: str, uri: str) -> None: ...
    def delete(self, uri: str) -> None: ...


def _scheme_of(uri: str) -> str:
    refuse_pipe(uri)
    match = _SCHEME.match(uri)
    return match.group(1).lower() if match else ""


def _storage_of(uri: str) -> Storage:
    scheme = _scheme_of(uri)
    if not scheme:
        if not uri:
            raise ValueError("A path is empty. Give a local path or an s3:// or hf:// name.")
        return _LOCAL
    if scheme == "s3":
        from vla_foundry.storage.s3 import S3Storage

        return S3Storage()
    if scheme == "hf":
        from vla_foundry.storage.hub import HubStorage

        return HubStorage()
    if scheme in ("http", "https"):
        from vla_foundry.storage.http import HttpStorage

        return HttpStorage()
    raise ValueError(f"'{uri}' has the unknown scheme '{scheme}'. Use a local path, s3://, hf:// or https://.")


def is_remote(uri: str) -> bool:
    """True if `uri` is not on this machine's file system."""
    return bool(_scheme_of(uri))


def absolute_uri(uri: str) -> str:
    """Return `uri` without a trailing slash; a local path is made absolute and `~` is expanded."""
    return uri.rstrip("/") if is_remote(uri) else os.path.abspath(os.path.expanduser(uri))


def join_uri(base: str, *parts: str) -> str:
    """Append relative parts to `base` with single slashes.

    Raises:
        ValueError: a part is absolute or has its own scheme.
    """
    joined = base
    for part in parts:
        if part.startswith("/") or is_remote(part):
            raise ValueError(f"'{part}' cannot be joined to '{base}': it is not a relative path.")
        if part and joined:
            joined += part if joined.endswith("/") else "/" + part
        else:
            joined = joined or part
    return joined


def parent_uri(uri: str) -> str:
    """Return the folder that holds `uri`; "." for a bare file name, and `uri` itself for the root of a store."""
    match = _SCHEME.match(uri)
    if match is None:
        return os.path.dirname(uri.rstrip("/") or "/") or "."
    root, path = match.group(0), uri[match.end() :].rstrip("/")
    folder, slash, _ = path.rpartition("/")
    return root + (folder if slash else path)


def name_of(uri: str) -> str:
    """Return the last part of `uri`."""
    return uri.rstrip("/").rpartition("/")[2]


def open_input(uri: str) -> BinaryIO:
    """Open a file for reading; seekable. Remote files are read a few MiB at a time."""
    return _storage_of(uri).open_input(uri)


def read_range(uri: str, offset: int, size: int, version: str | None = None) -> bytes:
    """Read `size` bytes from `offset`; fewer only at the end of the file.

    Args:
        version: see Listed; S3 refuses to send bytes of another version.
    """
    assert offset >= 0, "offset must not be negative"
    assert size >= 0, "size must not be negative"
    return _storage_of(uri).read_range(uri, offset, size, version) if size else b""


def read_bytes(uri: str) -> bytes:
    """Read a whole file."""
    with open_input(uri) as file:
        return file.read()


def read_text(uri: str) -> str:
    """Read a whole file as UTF-8.

    Raises:
        ValueError: it is not UTF-8, or too large for one that people or our commands write.
    """
    content = bytearray()
    try:
        with name_errors(uri), open_input(uri) as file:
            while chunk := file.read(_CHUNK_SIZE):
                content += chunk
                if len(content) > MAX_BYTES:
                    raise ValueError(f"{uri} has more than {MAX_BYTES:,} bytes of text. Is it the right file?")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri} is not UTF-8 text (byte {error.start}).") from None


def read_json(uri: str) -> Any:
    """Read a JSON file; see parse_json."""
    return parse_json(read_text(uri), uri)


def read_object(uri: str) -> dict[str, Any]:
    """Read a file with a JSON object; see parse_object."""
    return parse_object(read_text(uri), uri)


def read_yaml(uri: str) -> Any:
    """Read a YAML file into plain values; see parse_yaml."""
    return parse_yaml(read_text(uri), uri)


def size_of(uri: str) -> int:
    """Return the size of a file in bytes."""
    return describe(uri).size


def describe(uri: str) -> Listed:
    """Return the size of a file and its version."""
    return _storage_of(uri).describe(uri)


def file_test(folder: str) -> Callable[[str], bool]:
    """Return a function that says whether a folder holds a file, by its relative path."""
    return lambda name: exists(join_uri(folder, name))


def exists(uri: str) -> bool:
    """True if `uri` is a file, or a folder that holds at least one file."""
    try:
        size_of(uri)
        return True
    except FileNotFoundError:
        pass
    if not is_remote(uri) and not is_pattern(uri):
        return has_files(uri)
    try:
        return bool(list_sizes(uri))
    except FileNotFoundError:
        return False


def list_sizes(folder_or_glob: str) -> dict[str, int]:
    """List files with their sizes in bytes, sorted by name.

    Args:
        folder_or_glob: a folder (all files below it), a pattern (`*` within a folder level, `**` over levels, `?`,
            `[...]`), or one file. Without a match, FileNotFoundError.
    """
    return {uri: listed.size for uri, listed in _list(folder_or_glob)}


def _list(folder_or_glob: str) -> list[tuple[str, Listed]]:
    return sorted(_storage_of(folder_or_glob).list_entries(folder_or_glob).items())


def list_visible(folder_or_glob: str) -> dict[str, Listed]:
    """List files like list_sizes, without hidden ones (see is_hidden) below the folder; a file named itself counts."""
    base = folder_of_names(folder_or_glob)
    return {
        uri: listed
        for uri, listed in _list(folder_or_glob)
        if not (uri.startswith(base) and is_hidden(uri[len(base) :]))
    }


def folder_of_names(folder_or_glob: str) -> str:
    """Return the folder, with a slash, to which the names of the listed files are relative.

    A local path that exists is no pattern, whatever its characters.
    """
    text = folder_or_glob
    if not is_remote(text):
        text = os.path.expanduser(text)
        if os.path.exists(text):
            return text.rstrip("/") + "/"
    fixed = re.split(r"[*?\[]", text, maxsplit=1)[0]
    return (fixed.rstrip("/") if fixed == text else fixed.rpartition("/")[0]) + "/"


def is_hidden(path: str) -> bool:
    """True if a relative path holds no data: .DS_Store, ._x, all in .ipynb_checkpoints or another hidden folder."""
    return any((name.startswith(".") and name not in (".", "..")) or name == "__MACOSX" for name in path.split("/"))


def list_files(folder_or_glob: str) -> list[str]:
    """List files sorted by name; see list_sizes."""
    return list(list_sizes(folder_or_glob))


def list_relative(folder: str) -> dict[str, int]:
    """List the files below a folder: {path within the folder: bytes}, sorted."""
    folder = (folder if is_remote(folder) else os.path.expanduser(folder)).rstrip("/") or "/"
    base = folder if folder.endswith("/") else folder + "/"
    return {path[len(base) :]: size for path, size in list_sizes(folder).items() if path.startswith(base)}


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file atomically and flush it to the disk; create folders."""
    _storage_of(uri).write_bytes(uri, data)


def write_text(uri: str, text: str) -> None:
    """Write a whole file as UTF-8, like `write_bytes`."""
    write_bytes(uri, text.encode("utf-8"))


@contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """Open a file for writing (seekable); the whole file appears when the block ends without an error."""
    if not is_remote(uri):
        with _LOCAL.open_output(uri) as file:
            yield file
        return
    with tempfile.TemporaryDirectory(prefix="vla_foundry_") as folder:
        path = os.path.join(folder, "output")
        with open(path, "xb") as file:
            yield file
        upload(path, uri)


def download(uri: str, path: str) -> None:
    """Copy `uri` to a local path; create folders. A truncated copy is tried once more."""
    storage = _storage_of(uri)
    try:
        storage.download(uri, path)
    except IncompleteDownload:
        storage.download(uri, path)


def fetch(uri: str, folder: str) -> str:
    """Return a local copy of a remote file: in the hub's cache, where it stays, or else a new one in `folder`."""
    if _scheme_of(uri) == "hf":
        from vla_foundry.storage.hub import fetch_to_cache

        return fetch_to_cache(uri)
    path = os.path.join(folder, name_of(uri))
    download(uri, path)
    return path


def upload(path: str, uri: str) -> None:
    """Copy a local file to `uri`; create folders."""
    _storage_of(uri).upload(path, uri)


def delete(uri: str) -> None:
    """Delete a file, if it exists."""
    _storage_of(uri).delete(uri)
