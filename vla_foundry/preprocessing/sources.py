"""Source files of text and images: find them, unpack them, read their rows, and count what gives no sample."""

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, BinaryIO, ClassVar, cast

from vla_foundry.parsing import MAX_BYTES, MAX_RECORD_BYTES, parse_record
from vla_foundry.preprocessing.output import digest_of
from vla_foundry.progress import say
from vla_foundry.storage.uri import folder_of_names, list_visible, name_of, open_input

_BLOCK_BYTES = 8 << 20
# names that are kept for each reason, and how many of them are printed
_MAX_EXAMPLES, _NUM_SHOWN = 10, 3
# before this many are judged, a run is not stopped for its share of failures
_MIN_JUDGED = 1000


def _open_zstd(raw: BinaryIO) -> io.BufferedReader:
    return io.BufferedReader(import_pyarrow(".zst").CompressedInputStream(raw, "zstd"), 1 << 20)


_UNPACKERS: dict[str, Callable[[BinaryIO], Any]] = {
    "gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zst": _open_zstd,
    "zstd": _open_zstd,
}
PACKINGS = tuple(_UNPACKERS)


class Unreadable(ValueError):
    """Raised for a file whose bytes cannot be decoded; the message says what they should be."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that holds samples, or rows that name them."""

    uri: str
    # path within its source, the same on every machine
    name: str
    # bytes
    size: int
    # see storage.local.Listed
    version: int | str = 0

    @property
    def ending(self) -> str:
        """Its kind and packing as endings: `.jsonl.gz`, `.txt`; "(none)" without any."""
        return "".join(f".{part}" for part in (self.kind, self.packing) if part) or "(none)"

    @property
    def packing(self) -> str:
        """One of PACKINGS; "" if it is not packed."""
        last = name_of(self.uri).lower().rpartition(".")[2]
        return last if last in PACKINGS else ""

    @property
    def kind(self) -> str:
        """Its ending in lower case, before the one of the packing: `jsonl` for a.JSONL.gz; "" without one."""
        stem = name_of(self.uri).lower().removesuffix(f".{self.packing}")
        return stem.rpartition(".")[2] if "." in stem else ""

    @property
    def weight(self) -> int:
        """Roughly how many bytes of text it holds; it divides the work and does not affect the result."""
        return self.size * (3 if self.packing else 2 if self.kind == "parquet" else 1)


def list_source_files(places: Sequence[str]) -> list[list[SourceFile]]:
    """Find the files of folders, patterns and single files: for each place in order of name, without hidden ones.

    Raises:
        FileNotFoundError: a place does not exist.
        ValueError: two places name the same file.
    """
    found: list[list[SourceFile]] = []
    seen = set[str]()
    for number, place in enumerate(places):
        base = folder_of_names(place)
        files = []
        for uri, listed in list_visible(place).items():
            if uri in seen:
                raise ValueError(f"--source names {uri} twice. Name each file once.")
            inner = uri[len(base) :] if uri.startswith(base) else name_of(uri)
            # escape the bytes of a file name that are not UTF-8
            inner = inner.encode("utf-8", "backslashreplace").decode()
            files.append(SourceFile(uri=uri, name=f"{number}/{inner}", size=listed.size, version=listed.version))
        seen.update(file.uri for file in files)
        found.append(files)
    return found


def describe_files(files: Sequence[SourceFile], digests: Iterable[str] = ()) -> dict[str, Any]:
    """Return a fingerprint of files: their names and sizes, and digests of contents."""
    listing: list[Any] = [[file.name, file.size] for file in files]
    return {
        "num_files": len(files),
        "num_bytes": sum(file.size for file in files),
        "listing_sha256": digest_of([*listing, *digests]),
    }


def digest_of_versions(files: Iterable[SourceFile]) -> str:
    """Return a fingerprint of the files' versions: an edited file may keep its size."""
    return digest_of([file.version for file in files])


def say_ignored(ignored: Counter[str], why: str) -> None:
    """Print how many files of each ending a job leaves out."""
    if ignored:
        endings = ", ".join(f"{count:,} {ending}" for ending, count in sorted(ignored.items()))
        say(f"files that {why} are left out: {endings}")


@contextmanager
def open_source(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacked; only a file that is not packed is seekable.

    Raises:
        Unreadable: what the block reads cannot be unpacked.
        ValueError: the file has changed since it was listed, or its storage fails.
    """
    with open_input(file.uri) as raw:
        if raw.seek(0, 2) != file.size:
            raise ValueError(f"{file.uri} has changed since it was listed. Run again when nothing writes to it.")
        raw.seek(0)
        if not file.packing:
            yield raw
            return
        with _unreadable(file.packing, EOFError, zlib.error, lzma.LZMAError), _UNPACKERS[file.packing](raw) as unpacked:
            yield unpacked


@contextmanager
def open_parquet(file: SourceFile) -> Iterator[Any]:
    """Open a parquet file as a pyarrow.parquet.ParquetFile.

    Raises:
        Unreadable: what the block reads is not parquet.
        ValueError: pyarrow is not installed.
    """
    pa = import_pyarrow(".parquet")
    import pyarrow.parquet as pq

    with open_source(file) as source, tempfile.TemporaryFile() as unpacked:
        if file.packing:
            shutil.copyfileobj(source, unpacked, _BLOCK_BYTES)
        with _unreadable("parquet", pa.ArrowException):
            yield pq.ParquetFile(cast(BinaryIO, unpacked) if file.packing else source)


def read_batches(parquet: Any, columns: Sequence[str], max_rows: int, groups: Sequence[int] | None = None) -> Any:
    """Return batches of rows: fewer rows where one value could be large, because a dictionary repeats it at no cost."""
    metadata = parquet.metadata
    chunks = (
        metadata.row_group(group).column(column)
        for group in (range(metadata.num_row_groups) if groups is None else groups)
        for column in range(metadata.num_columns)
    )
    wanted = (chunk for chunk in chunks if any(f"{chunk.path_in_schema}.".startswith(f"{key}.") for key in columns))
    largest = max((chunk.total_uncompressed_size for chunk in wanted), default=1)
    rows = max(1, min(max_rows, 4 * MAX_RECORD_BYTES // max(1, largest)))
    return parquet.iter_batches(rows, row_groups=groups, columns=list(columns), use_threads=False)


def rows_of(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yield the rows of a batch of parquet; an exception for a row with a text that is not UTF-8."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = (_row_of(batch.slice(row, 1)) for row in range(batch.num_rows))
    yield from rows


def _row_of(batch: Any) -> dict[str, Any] | UnicodeDecodeError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


def list_columns(parquet: Any) -> list[str]:
    """Return the columns of a parquet file, and the paths of keys (`meta.text`) below those that hold objects."""
    names = list(parquet.schema_arrow.names)
    paths = [parquet.schema.column(number).path for number in range(len(parquet.schema))]
    return names + [path for path in paths if path not in names]


def check_unique(uri: str, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a table in which a wanted column, or a part of a path of keys, is there twice.

    Raises:
        ValueError: it is.
    """
    for key in wanted:
        for column in accumulate(key.split("."), "{}.{}".format):
            if columns.count(column) > 1:
                raise ValueError(f"{uri} has {columns.count(column)} columns named '{column}'. Rename all but one.")


@contextmanager
def _unreadable(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise a decoder's errors as Unreadable. Some decoders raise OSError, but without an errno."""
    try:
        yield
    except (OSError, *errors) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Unreadable(f"not valid {what} ({' '.join(str(error).split())[:200]})") from None


def import_pyarrow(what: str) -> Any:
    """Import pyarrow.

    Raises:
        ValueError: it is not installed; the message says `what` needs it.
    """
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            f"{what} needs pyarrow, which is not installed: uv pip install 'vla-foundry[preprocessing]'"
        ) from None
    return pyarrow


def read_json_rows(file: SourceFile, part: int = 0, num_parts: int = 1) -> Iterator[tuple[str, Any]]:
    """Read JSON lines, or the items of one JSON array, of which a file `.json` may consist.

    Args:
        file: the file.
        part: read the lines that begin in this part of the file.
        num_parts: 1 for packed files.

    Yields:
        Where it is ("byte 120"), and the value of each line that is not blank. For a line that is not JSON, the
        exception: UnicodeDecodeError or another one.
    """
    if file.kind == "json":
        with open_source(file) as opened:
            head = opened.read(4096)
            if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                limit = MAX_BYTES if file.packing else file.size
                items = _parse(head + opened.read(limit), limit) if part == 0 else []
                yield from [(f"item {n}", item) for n, item in enumerate(items if isinstance(items, list) else [items])]
                return
    start, stop = (file.size * number // num_parts for number in (part, part + 1))
    with open_source(file) as lines:
        position = start
        if start:  # a line belongs to the part its first byte lies in
            lines.seek(start - 1)
            position += _skip_line(lines.readline) - 1
        while line := lines.readline(MAX_RECORD_BYTES + 1):
            if position >= stop and not file.packing:
                return
            if line.strip():
                yield f"byte {position}", _parse(line)
            position += len(line)
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                position += _skip_line(lines.readline)


def _skip_line(read_line: Callable[[int], bytes]) -> int:
    """Read to the end of a line, without holding it; return how many bytes that was."""
    size = 0
    while part := read_line(_BLOCK_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _parse(data: bytes, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    try:
        return parse_record(data.decode("utf-8-sig"), "it", max_bytes=max_bytes)
    except ValueError as error:
        return error


def look_up(row: Any, key: str, default: Any = None) -> Any:
    """Return the value of a row at a key, or at a path of keys (`meta.text`); `default` if it has none."""
    if not isinstance(row, dict):
        return default
    if key in row:
        return row[key]
    first, _, rest = key.partition(".")
    return look_up(row.get(first), rest, default) if rest else default


class Tally:
    """Counts samples, and failures by reason with the first names of each. Tallies travel and add up as JSON."""

    # names of the two in JSON
    good: ClassVar[str] = "samples"
    bad: ClassVar[str] = "failed"

    def __init__(self) -> None:
        self.num_good = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        # about how many bytes of text are in files that cannot be read
        self.num_lost_bytes = 0

    def add(self, reason: str, name: str, *, count: int = 1, num_lost_bytes: int = 0) -> None:
        """Count failures of one reason, and name one of them."""
        self.counts[reason] += count
        self.num_lost_bytes += num_lost_bytes
        self._name(reason, [name])

    def _name(self, reason: str, names: Sequence[str]) -> None:
        known = self.examples.setdefault(reason, [])
        known += names[: _MAX_EXAMPLES - len(known)]

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            self.good: self.num_good,
            self.bad: dict(sorted(self.counts.items())),
            "examples": dict(sorted(self.examples.items())),
        } | ({"lost_bytes": self.num_lost_bytes} if self.num_lost_bytes else {})

    def add_json(self, values: dict[str, Any]) -> None:
        """Add the counts that another tally gave as JSON values."""
        self.num_good += values[self.good]
        self.counts.update(values[self.bad])
        self.num_lost_bytes += values.get("lost_bytes", 0)
        for reason, names in values["examples"].items():
            self._name(reason, names)

    def check(
        self, max_fraction: float, *, flag: str, what: str, is_judged: Callable[[str], bool], is_final: bool
    ) -> None:
        """Stop when too much is bad.

        Args:
            max_fraction: share that may be bad.
            flag: where the user sets that.
            what: subject and verb of the message, such as "rows are bad".
            is_judged: whether failures of a reason count.
            is_final: no more samples will come, so that a few are enough to judge.

        Raises:
            ValueError: more is bad.
        """
        num_bad = sum(count for reason, count in self.counts.items() if is_judged(reason))
        total = self.num_good + num_bad
        if num_bad > max_fraction * total and (is_final or total >= _MIN_JUDGED):
            raise self.too_much(f"{num_bad:,} of {total:,} {what}", is_judged, f"{flag} {max_fraction:g}")

    def too_much(self, what: str, is_judged: Callable[[str], bool], limit: str) -> ValueError:
        """Return the error that stops a job; it names the most common reasons."""
        judged = Counter({reason: count for reason, count in self.counts.items() if is_judged(reason)})
        reasons = "; ".join(
            f"{count:,} {reason}, as {self.examples[reason][0]}"
            for reason, count in sorted(judged.most_common(_NUM_SHOWN))
        )
        return ValueError(f"{what} ({reasons}). Fix the source, or allow more than {limit}.")

    def describe(self) -> list[str]:
        """Return one line for each reason."""
        return [
            f"{self.bad} {count:,} {reason}: {', '.join(self.examples[reason][:_NUM_SHOWN])}"
            + (", ..." if count > _NUM_SHOWN else "")
            for reason, count in sorted(self.counts.items())
        ]
