"""Text files -> documents: find the files, divide them into units, read the documents, count skipped rows by reason."""

import codecs
import gzip
import json
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from vla_foundry.preprocessing.output import digest_of
from vla_foundry.storage.uri import join_uri, list_visible, name_of, open_input

FileKind = Literal["txt", "jsonl", "parquet"]
KINDS: dict[str, FileKind] = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# bytes of text in a byte of file, about: for dividing the work, not for the result
_EXPANSION = {"plain": 1, "gzip": 3, "parquet": 2}
_BLOCK_BYTES = 8 << 20
_PARQUET_ROWS = 256
# rows that are named for each reason
_MAX_EXAMPLES = 3
# an empty row is no fault; any other skipped row is
_HARMLESS = "empty"
# before this many rows are read, a run is not stopped for its share of bad ones
_MIN_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that holds documents."""

    uri: str
    # path within its source, the same on every machine
    name: str
    # bytes
    size: int
    kind: FileKind
    is_gzip: bool

    @property
    def weight(self) -> int:
        """About how many bytes of text it holds."""
        form = "gzip" if self.is_gzip else "parquet" if self.kind == "parquet" else "plain"
        return self.size * _EXPANSION[form]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a file: the lines that begin in, or the row groups that belong to, the part-th of num_parts."""

    file: SourceFile
    part: int
    num_parts: int

    @property
    def weight(self) -> int:
        """About how many bytes of text it holds."""
        return self.file.weight * (self.part + 1) // self.num_parts - self.file.weight * self.part // self.num_parts


class Piece(NamedTuple):
    """A document, or a part of one that is too long to be handled at once; pieces in order give back the document."""

    # name of the document: file and byte offset or row
    document: str
    # index of the piece within its document
    part: int
    text: str
    is_last: bool


class Skipped(NamedTuple):
    """A row, or a file, that yields no document."""

    reason: str
    # file and byte offset or row
    where: str
    # about how many bytes of text are lost with it, where a whole file (or what is left of it) is unreadable
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files that a job reads."""

    files: list[SourceFile]
    # {ending: number of files} of files in the folders that hold no text
    ignored: dict[str, int]

    @property
    def weight(self) -> int:
        """About how many bytes of text they hold."""
        return sum(file.weight for file in self.files)

    def describe(self) -> dict[str, Any]:
        """What tells these files from others: names and sizes."""
        return {
            "num_files": len(self.files),
            "num_bytes": sum(file.size for file in self.files),
            "listing_sha256": digest_of([[file.name, file.size] for file in self.files]),
        }


def list_sources(places: Iterable[str]) -> Sources:
    """Find the text files of folders, patterns and single files, in order of name within each place.

    Raises:
        FileNotFoundError: a place does not exist.
        ValueError: a place has no text file, or two places name the same file.
    """
    files: dict[str, SourceFile] = {}
    ignored: dict[str, int] = {}
    for number, place in enumerate(places):
        found = 0
        for uri, size in list_visible(place).items():
            name = _relative_name(uri, place, number)
            kind, is_gzip, ending = _kind_of(uri)
            if kind is None:
                ignored[ending] = ignored.get(ending, 0) + 1
                continue
            if uri in files:
                raise ValueError(f"--source names {uri} twice. Name each file once.")
            files[uri] = SourceFile(uri=uri, name=name, size=size, kind=kind, is_gzip=is_gzip)
            found += 1
        if not found:
            raise ValueError(f"--source {place} has no text: it needs files {', '.join(KINDS)}, or these with .gz.")
    return Sources(files=list(files.values()), ignored=ignored)


def _relative_name(uri: str, place: str, number: int) -> str:
    base = place.rstrip("/") + "/"
    inner = uri[len(base) :] if uri.startswith(base) else name_of(uri)
    return join_uri(str(number), inner)


def _kind_of(uri: str) -> tuple[FileKind | None, bool, str]:
    name = name_of(uri).lower()
    is_gzip = name.endswith(".gz")
    stem = name.removesuffix(".gz")
    ending = "." + stem.rpartition(".")[2] if "." in stem else ""
    return KINDS.get(ending), is_gzip, ending + (".gz" if is_gzip else "") or "(none)"


def split_files(files: Iterable[SourceFile], unit_bytes: int) -> list[Unit]:
    """Divide files into units of about `unit_bytes` bytes of text; .txt and .gz files stay whole."""
    units = []
    for file in files:
        is_divisible = file.kind != "txt" and not file.is_gzip
        num_parts = max(1, -(-file.weight // unit_bytes)) if is_divisible else 1
        units += [Unit(file=file, part=part, num_parts=num_parts) for part in range(num_parts)]
    return units


def read_unit(unit: Unit, *, text_key: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    """Read the documents of a unit, in order, in pieces of at most `max_bytes` bytes of UTF-8.

    A file that cannot be decoded yields a Skipped when that is found; what was read before stands.

    Raises:
        ValueError: the file has changed since it was listed, or its storage fails.
    """
    reader = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet}[unit.file.kind]
    try:
        yield from reader(unit, text_key, max_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield Skipped("unreadable", f"{unit.file.name}: not valid gzip ({error})", unit.weight)


@contextmanager
def _open(file: SourceFile) -> Iterator[BinaryIO]:
    with open_input(file.uri) as raw:
        if raw.seek(0, 2) != file.size:
            raise ValueError(f"{file.uri} has changed since it was listed. Run again when nothing writes to it.")
        raw.seek(0)
        if not file.is_gzip:
            yield raw
            return
        with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
            yield cast(BinaryIO, unpacked)


def _read_txt(unit: Unit, text_key: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    name = unit.file.name
    with _open(unit.file) as file:
        head = file.read(_BLOCK_BYTES)
        rest = file.read(1)
    if rest:
        yield from _read_long_txt(unit, max_bytes)
        return
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Skipped("not_utf8", f"{name} byte {error.start}", unit.weight)
        return
    yield from _pieces_of(text, name, max_bytes)


def _read_long_txt(unit: Unit, max_bytes: int) -> Iterator[Piece | Skipped]:
    """Read a document that is not held in memory: once to see that it is UTF-8, and once for its pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(unit.file) as file:
        try:
            while block := file.read(_BLOCK_BYTES):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            yield Skipped("not_utf8", unit.file.name, unit.weight)
            return
    part = 0
    with _open(unit.file) as file:
        data = file.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        while data:
            block = file.read(_BLOCK_BYTES)
            pieces = list(split_bytes(data, max_bytes))
            held = pieces.pop() if block else b""  # the last piece goes on in the next block
            for number, piece in enumerate(pieces):
                is_last = not block and number == len(pieces) - 1
                yield Piece(unit.file.name, part, piece.decode(), is_last)
                part += 1
            data = held + block


def _read_jsonl(unit: Unit, text_key: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    size = unit.file.size
    start, stop = (size * unit.part // unit.num_parts, size * (unit.part + 1) // unit.num_parts)
    with _open(unit.file) as file:
        position = start
        if start:  # a line belongs to the part its first byte lies in
            file.seek(start - 1)
            position += len(file.readline()) - 1
        for line in file:
            if position >= stop and not unit.file.is_gzip:
                return
            where = f"{unit.file.name} byte {position}"
            position += len(line)
            if line.strip():
                yield from _read_line(line, where, text_key, max_bytes)


def _read_line(line: bytes, where: str, text_key: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        yield Skipped("not_utf8", where)
    except (json.JSONDecodeError, RecursionError):
        yield Skipped("bad_json", where)
    else:
        if not isinstance(row, dict) or text_key not in row:
            yield Skipped("missing_key", where)
        else:
            yield from _pieces_of(row[text_key], where, max_bytes)


def _read_parquet(unit: Unit, text_key: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    try:
        import pyarrow as pa
    except ImportError:
        raise ValueError(
            ".parquet needs pyarrow, which is not installed: uv pip install 'vla-foundry[preprocessing]'"
        ) from None
    with _open(unit.file) as file, tempfile.TemporaryFile() as unpacked:
        if unit.file.is_gzip:
            shutil.copyfileobj(file, unpacked, _BLOCK_BYTES)
        source = cast(BinaryIO, unpacked) if unit.file.is_gzip else file
        try:
            yield from _read_row_groups(source, unit, text_key, max_bytes)
        except (pa.ArrowException, OSError) as error:  # Arrow raises OSError, too, for what it cannot decode
            reason = " ".join(str(error).split())[:200]
            yield Skipped("unreadable", f"{unit.file.name}: not valid parquet ({reason})", unit.weight)


def _read_row_groups(file: BinaryIO, unit: Unit, text_key: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    metadata = parquet.metadata
    first, stop = (metadata.num_row_groups * part // unit.num_parts for part in (unit.part, unit.part + 1))
    num_rows = [metadata.row_group(number).num_rows for number in range(stop)]
    row = sum(num_rows[:first])
    if text_key not in parquet.schema_arrow.names:
        for number in range(row, sum(num_rows)):
            yield Skipped("missing_key", f"{unit.file.name} row {number}")
        return
    for batch in parquet.iter_batches(
        _PARQUET_ROWS, row_groups=list(range(first, stop)), columns=[text_key], use_threads=False
    ):
        for value in batch.column(0).to_pylist():
            yield from _pieces_of(value, f"{unit.file.name} row {row}", max_bytes)
            row += 1


def _pieces_of(text: Any, where: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    if text is None:
        yield Skipped("null", where)
    elif not isinstance(text, str):
        yield Skipped("not_a_string", where)
    elif not text.strip():
        yield Skipped("empty", where)
    elif text.isascii() and len(text) <= max_bytes:
        yield Piece(where, 0, text, True)
    else:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair
            yield Skipped("not_unicode", where)
            return
        pieces = list(split_bytes(data, max_bytes))
        for part, piece in enumerate(pieces):
            yield Piece(where, part, piece.decode(), part == len(pieces) - 1)


def split_bytes(data: bytes, max_bytes: int) -> Iterator[bytes]:
    """Split UTF-8 into pieces of at most `max_bytes`, without loss.

    A piece ends after a line where that leaves it at least half full, else before a space, else between characters.
    """
    assert max_bytes >= 8, "a piece must have room for a character"
    start = 0
    while len(data) - start > max_bytes:
        middle, stop = start + max_bytes // 2, start + max_bytes
        cut = data.rfind(b"\n", middle, stop) + 1 or data.rfind(b" ", middle, stop)
        if cut <= start:
            cut = stop
            while data[cut] & 0xC0 == 0x80:
                cut -= 1
        yield data[start:cut]
        start = cut
    if start < len(data):
        yield data[start:]


class Tally:
    """Counts that can be sent as JSON and added up."""

    def __init__(self) -> None:
        self.num_documents = 0
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        # about how many bytes of text are in files that cannot be read
        self.num_lost_bytes = 0

    def skip(self, row: Skipped) -> None:
        """Count a row that yields no document."""
        self.skipped[row.reason] += 1
        self.num_lost_bytes += row.num_bytes
        examples = self.examples.setdefault(row.reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(row.where)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "documents": self.num_documents,
            "skipped": dict(sorted(self.skipped.items())),
            "examples": dict(sorted(self.examples.items())),
            "lost_bytes": self.num_lost_bytes,
        }

    def add_json(self, values: dict[str, Any]) -> None:
        """Add the counts that another tally gave as JSON values."""
        self.num_documents += values["documents"]
        self.skipped.update(values["skipped"])
        self.num_lost_bytes += values["lost_bytes"]
        for reason, examples in values["examples"].items():
            mine = self.examples.setdefault(reason, [])
            mine += examples[: _MAX_EXAMPLES - len(mine)]

    def check(self, max_bad_fraction: float, num_bytes: int, *, is_final: bool) -> None:
        """Stop when too much of the source is bad.

        Args:
            max_bad_fraction: share of the rows, and of the bytes, that may be bad.
            num_bytes: about how many bytes of text the whole source has.
            is_final: no rows follow; a decision can be made on few rows.

        Raises:
            ValueError: more is bad than that.
        """
        num_bad = sum(count for reason, count in self.skipped.items() if reason != _HARMLESS)
        num_rows = self.num_documents + num_bad
        if num_bad > max_bad_fraction * num_rows and (is_final or num_rows >= _MIN_ROWS):
            raise ValueError(
                f"{num_bad:,} of {num_rows:,} rows are bad ({self._reasons()}). {_advice(max_bad_fraction)}"
            )
        if self.num_lost_bytes > max_bad_fraction * num_bytes:
            share = 100 * self.num_lost_bytes / max(num_bytes, 1)
            raise ValueError(
                f"{share:.0f}% of the text can not be read ({self._reasons()}). {_advice(max_bad_fraction)}"
            )

    def _reasons(self) -> str:
        return "; ".join(
            f"{count:,} {reason}, as {self.examples[reason][0]}"
            for reason, count in sorted(self.skipped.items())
            if reason != _HARMLESS
        )

    def describe(self) -> Iterable[str]:
        """Lines that say which rows were skipped, and why."""
        for reason, count in sorted(self.skipped.items()):
            yield f"skipped {count:,} {reason}: {', '.join(self.examples[reason])}{', ...' if count > 3 else ''}"


def _advice(max_bad_fraction: float) -> str:
    return f"Mend the source, or allow more than --max_bad_fraction {max_bad_fraction:g}."
