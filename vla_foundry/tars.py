"""Find the files in a tar and where their bytes lie, as GNU tar would extract them; read them in turn; write files."""

import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import BinaryIO

# (first byte of the content within the tar, size in bytes)
Bytes = tuple[int, int]
# what a name stands for: bytes, a symbolic link's target, or why it cannot be read; None: no file
_Content = Bytes | PurePosixPath | str | None

# first bytes of gzip, bzip2, xz and zstd
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")
_MAGIC = re.compile(rb"ustar[\0 ]")
# GNU types of members: the files of a folder, a label, the rest of a file that began in another volume
_FOLDER, _LABEL, _CONTINUED = b"D", b"V", b"M"
# WebDataset's form of a shell command in place of a path, also within braces and lists
_PIPE = re.compile(r"(?:^|::|[{,])[\s'\"]*pipe\s*:", re.IGNORECASE)
# largest file that is read in sequence: a small archive can be compressed from any size
_MAX_FILE_BYTES = 1 << 31
_BAD_HEADERS: tuple[type[Exception], ...] = (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError)  # pyright: ignore
# longest chain of symbolic links
_MAX_LINKS = 40
_CHUNK = 1 << 20


class DamagedTarError(ValueError):
    """Raised for a tar that cannot be read from some place on."""


class _Header(tarfile.TarInfo):
    """A member's header. Where POSIX puts the beginning of a long name, GNU tar may put times, which are no name."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if not buf.startswith(b"ustar\0", 257):
            prefix = bytes(buf[345:500]).partition(b"\0")[0].decode(encoding, errors)
            header.name = header.name.removeprefix(prefix + "/")
        return header


class _SureHeader(_Header):
    """A header after which a damaged one is an error; `tarfile` takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_SureHeader":
        try:
            return super().fromtarfile(tarfile)  # pyright: ignore[reportReturnType]
        except _BAD_HEADERS as error:
            raise DamagedTarError(f"the header at byte {tarfile.offset}: {error}") from None


def refuse_pipe(name: str, where: str = "") -> None:
    """Check that a path or URI is not WebDataset's `pipe:cat x.tar`.

    Raises:
        ValueError: it is; the message begins with `where`.
    """
    if _PIPE.search(name):
        raise ValueError(f"{where}{name[:80]!r} is a shell command, which is never run. Name a file instead.")


def find_files(file: BinaryIO) -> tuple[list[tuple[str, Bytes | str]], bool]:
    """Read all headers of a tar, and of the archives that were appended to it with `cat`.

    A link stands for the file it links to.

    Args:
        file: the tar, seekable.

    Returns:
        Each file's name and where its bytes lie, or why they cannot be read ("is ..."), in the order of the tar; and
        whether the tar ends with an empty block.

    Raises:
        ValueError: the file is not a readable tar.
    """
    contents: dict[str, _Content] = {}
    found: list[tuple[str, _Content]] = []
    start, block = 0, b""
    while start is not None:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8") as tar:
                for member in tar:
                    content = contents[_place(member.name)] = _content_of(member, contents)
                    found.append((member.name, content))
                end = tar.offset
            file.seek(end)
        except (tarfile.TarError, OverflowError, ValueError) as error:
            file.seek(0)
            packed = ", but compressed: unpack it" if file.read(4).startswith(_COMPRESSED) else ""
            raise ValueError(f"not a readable tar ({error}){packed}") from None
        block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            raise ValueError(f"not a readable tar (the header at byte {end} is damaged or cut off)")
        start = _find_next_archive(file)
    followed = [(name, _follow(name, content, contents)) for name, content in found]
    return [(name, content) for name, content in followed if content is not None], len(block) == tarfile.BLOCKSIZE


def read_files(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Read the names and contents of a tar's files from front to back; it may be compressed. Links are left out.

    Args:
        file: the tar; it need not be seekable.

    Raises:
        DamagedTarError: the tar is damaged, or cut off; what comes before is read first.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_SureHeader, encoding="utf-8", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore (it would keep all headers)
                if member.size > _MAX_FILE_BYTES:
                    raise DamagedTarError(f"{member.name} has {member.size:,} bytes")
                content = tar.extractfile(member) if member.isreg() else None
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, OverflowError, EOFError) as error:
        raise DamagedTarError(str(error)) from error


def _place(name: str) -> str:
    """Return where tar extracts a member to."""
    return posixpath.normpath(name.lstrip("/"))


def _content_of(member: tarfile.TarInfo, before: Mapping[str, _Content]) -> _Content:
    if member.isdir() or member.type in (_FOLDER, _LABEL):
        return None
    if member.issparse():
        return "is stored as a sparse file: pack it without --sparse"
    if member.type == _CONTINUED or "GNU.volume.filename" in member.pax_headers:
        return "continues a file of another volume: pack it without --multi-volume"
    if member.islnk():
        return before.get(_place(member.linkname)) or f"links to {member.linkname!r}, which is not before it"
    if member.issym():
        return PurePosixPath(member.linkname)
    if member.isdev():
        return "is a device or a pipe"
    return member.offset_data, member.size


def _follow(name: str, content: _Content, contents: Mapping[str, _Content]) -> Bytes | str | None:
    """Follow symbolic links within the tar."""
    for _ in range(_MAX_LINKS):
        if not isinstance(content, PurePosixPath):
            return content
        name = posixpath.join(posixpath.dirname(_place(name)), content)
        content = contents.get(posixpath.normpath(name), f"links to '{content}', which is not in the tar")
    return "is a symbolic link to itself"


def _find_next_archive(file: BinaryIO) -> int | None:
    """Return where the next archive begins after zeros; None at the end of the file, or before other bytes.

    Raises:
        ValueError: an archive is among those bytes.
    """
    rest = b""
    while not rest and (chunk := file.read(_CHUNK)):
        rest = chunk.lstrip(b"\0")
    start = file.tell() - len(rest)
    file.seek(start)
    rest = file.read(_CHUNK)
    try:
        tarfile.TarInfo.frombuf(rest[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        return start
    except tarfile.TarError:
        is_archive = rest.startswith(_COMPRESSED)
    while rest and not is_archive:
        is_archive = _MAGIC.search(rest) is not None
        chunk = file.read(_CHUNK)
        rest = rest[-5:] + chunk if chunk else b""
    if is_archive:
        raise ValueError(
            f"not a readable tar (another archive follows at byte {start}: it is damaged, cut off or compressed)"
        )
    return None


_PLAIN = tarfile.TarInfo()
_PLAIN.mode = 0o644
# the header of an empty file without a name; time, owner and group are 0
_EMPTY = _PLAIN.tobuf(tarfile.GNU_FORMAT)
_EMPTY_SUM = sum(_EMPTY) - sum(_EMPTY[148:156]) + 8 * ord(" ")
# bytes of a name in one header, and the first size that does not fit there
_NAME_SIZE, _LARGE = 100, 8**11


def format_member(name: str, content: bytes) -> tuple[bytes, bytes]:
    """Return what comes before and after a file's content in a tar: the bytes that `tarfile` writes, in less time."""
    encoded, size = name.encode("utf-8", "surrogateescape"), b"%011o" % len(content)
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    if len(encoded) > _NAME_SIZE or len(content) >= _LARGE:
        info = tarfile.TarInfo(name)
        info.mode, info.size = _PLAIN.mode, len(content)
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"), padding
    checksum = _EMPTY_SUM + sum(encoded) + sum(size) - 11 * ord("0")
    start = encoded.ljust(_NAME_SIZE, b"\0") + _EMPTY[_NAME_SIZE:124] + size + _EMPTY[135:148]
    return start + b"%06o\0 " % checksum + _EMPTY[156:], padding


def format_end(num_bytes: int) -> bytes:
    """Return the end of a tar whose members take `num_bytes`."""
    return bytes(2 * tarfile.BLOCKSIZE + -(num_bytes + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
