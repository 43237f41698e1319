"""Load a shard's index and check its bytes on first use; remember both in files."""

import hashlib
import logging
import os
import stat
import tarfile
from functools import lru_cache
from typing import BinaryIO

from vla_foundry.data.ranges import LocalBytes, ShardBytes, is_header
from vla_foundry.shards import ShardIndex, format_index, index_shard, parse_index, sha256_of
from vla_foundry.storage.uri import read_text, write_text

_logger = logging.getLogger(__name__)


def user_cache_folder() -> str:
    """Return this user's cache folder; it may not exist, or be impossible to write."""
    home = os.path.expanduser("~")
    # a user without a home: writing there fails, as it does in a home that is read-only
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join("/nonexistent" if home == "~" else home, ".cache")
    return os.path.join(root, "vla_foundry")


def _cache_file(path: str, folder: str, suffix: str) -> str:
    """Return the file of the user's cache about a local file."""
    digest = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]
    return os.path.join(user_cache_folder(), folder, digest + suffix)


def _write_to_cache(place: str, text: str) -> None:
    try:
        write_text(place, text)
    except OSError as error:
        _say_once(
            f"{user_cache_folder()} cannot be written ({error.strerror}): what was found out about shards is kept in "
            "memory only. Set XDG_CACHE_HOME to a folder that can be written."
        )


@lru_cache
def _say_once(line: str) -> None:
    _logger.warning("%s", line)


def is_intact(file: BinaryIO, path: str, sha256: str) -> bool:
    """Check a local shard's SHA-256. The result is kept in the user's cache until the file changes."""
    status = os.fstat(file.fileno())
    state = f"{sha256} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    place = _cache_file(path, "checksums", ".txt")
    try:
        known = read_text(place).partition("\n")
        if known[0] == state:
            return known[2] == "intact"
    except (OSError, ValueError):
        pass  # not known yet
    file.seek(0)
    found = sha256_of(file) == sha256
    _write_to_cache(place, f"{state}\n{'intact' if found else 'damaged'}")
    return found


def index_name(tar_name: str) -> str:
    """Return the name of a tar's index file."""
    return tar_name.removesuffix(".tar") + ".index.json"


def read_remote_index(uri: str) -> ShardIndex | None:
    """Return the index beside a remote shard; None: there is none."""
    try:
        return parse_index(read_text(index_name(uri)), index_name(uri))
    except FileNotFoundError:
        return None


def load_index(file: BinaryIO, path: str) -> ShardIndex:
    """Return the index of a local shard.

    The index beside the shard is used if it is newer than the tar and matches it (see `fits`), else one from this
    user's cache. Otherwise the tar is read once, and its index is written beside it or, if the folder is read-only, to
    the cache.

    Args:
        file: the open tar.
        path: its path.

    Raises:
        ValueError: the file is not a readable tar.
    """
    beside, cached = index_name(path), _cache_file(path, "indexes", ".index.json")
    for candidate in (beside, cached):
        index = _read_fitting(file, candidate)
        if index is not None:
            return index
    file.seek(0)
    try:
        index = index_shard(file)
    except ValueError as error:
        raise ValueError(
            f"{path}: {str(error).rstrip('.')}. Make the shard again, or take it out of the manifest."
        ) from None
    text = format_index(index)
    try:
        write_text(beside, text)
    except OSError:  # a read-only folder
        _write_to_cache(cached, text)
    return index


def _read_fitting(file: BinaryIO, candidate: str) -> ShardIndex | None:
    try:
        # the clock of the file system, which no copy sets back: an older index may be of other bytes
        is_newer = os.stat(candidate).st_ctime_ns >= os.fstat(file.fileno()).st_ctime_ns
    except FileNotFoundError:
        return None
    try:
        index = parse_index(read_text(candidate), candidate)
        if is_newer and fits(LocalBytes(file), index):
            return index
        _logger.info("%s belongs to an earlier state of its shard; it is made again.", candidate)
    except ValueError as error:
        _logger.info("%s", error)
    return None


def fits(tar: ShardBytes, index: ShardIndex) -> bool:
    """Compare the tar's size, and the headers of its first and last members, with the index."""
    if tar.num_bytes != index.num_bytes:
        return False
    if index.records is not None:
        spans = [index.records.tokens, index.records.document_offsets]
    elif index.episodes:
        ends = (index.episodes[0], index.episodes[-1])
        spans = [span for episode in ends for span in episode.members.values()]
    else:
        spans = [span for _, members in (*index.samples[:1], *index.samples[-1:]) for span in members.values()]
    block = tarfile.BLOCKSIZE
    return all(is_header(tar.read(max(span.offset - block, 0), block), span.size) for span in spans)


def open_local(path: str, manifest: str) -> BinaryIO:
    """Open a shard on this machine.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is a folder, a named pipe, or another special file.
    """
    try:
        # opening a named pipe would wait for its writer
        if stat.S_ISREG(os.stat(path).st_mode):
            return open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"Shard {path}, which {manifest} lists, is missing.") from None
    raise ValueError(f"Shard {path}, which {manifest} lists, is not a regular file.")
