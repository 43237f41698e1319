"""Text files -> documents: find the files, divide them into units, read the documents, count skipped rows by reason."""

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vla_foundry.preprocessing.sources import (
    PACKINGS,
    SourceFile,
    Tally,
    Unreadable,
    check_unique,
    list_columns,
    list_source_files,
    look_up,
    open_parquet,
    open_source,
    read_batches,
    read_json_rows,
    rows_of,
)

KINDS = ("txt", "jsonl", "ndjson", "json", "parquet")
_BLOCK_BYTES = 8 << 20
_PARQUET_ROWS = 256
# an empty row is no fault; any other skipped row is
_HARMLESS = "empty"
_MISSING = object()


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


class DocumentTally(Tally):
    """Counts documents, and rows that are skipped."""

    good, bad = "documents", "skipped"

    def check_source(self, max_bad_fraction: float, num_bytes: int, *, is_final: bool) -> None:
        """Stop when too much of the source is bad.

        Args:
            max_bad_fraction: share of the rows, and of the bytes, that may be bad.
            num_bytes: about how many bytes of text the whole source has.
            is_final: no rows follow.

        Raises:
            ValueError: more is bad than that.
        """
        flag = "--max_bad_fraction"
        self.check(max_bad_fraction, flag=flag, what="rows are bad", is_judged=_is_fault, is_final=is_final)
        if self.num_lost_bytes > max_bad_fraction * num_bytes:
            share = 100 * self.num_lost_bytes / max(num_bytes, 1)
            raise self.too_much(f"{share:.0f}% of the text cannot be read", _is_fault, f"{flag} {max_bad_fraction:g}")


def _is_fault(reason: str) -> bool:
    return reason != _HARMLESS


def list_sources(places: Sequence[str]) -> tuple[list[SourceFile], Counter[str]]:
    """Find the text files of folders, patterns and single files, in order of name within each place.

    Returns:
        The files, and how many others there are of each ending.

    Raises:
        FileNotFoundError: a place does not exist.
        ValueError: a place has no text file, or two places name the same file.
    """
    files: list[SourceFile] = []
    ignored: Counter[str] = Counter()
    for place, found in zip(places, list_source_files(places), strict=True):
        texts = [file for file in found if file.kind in KINDS]
        if not texts:
            raise ValueError(
                f"--source {place} has no text: it needs files {', '.join(f'.{kind}' for kind in KINDS)}, or these "
                f"packed as {', '.join(f'.{packing}' for packing in PACKINGS)}."
            )
        files += texts
        ignored.update(file.ending for file in found if file.kind not in KINDS)
    return files, ignored


def split_files(files: Iterable[SourceFile], unit_bytes: int) -> list[Unit]:
    """Divide files into units of about `unit_bytes` bytes of text; .txt and packed files stay whole."""
    units = []
    for file in files:
        is_divisible = file.kind != "txt" and not file.packing
        num_parts = max(1, -(-file.weight // unit_bytes)) if is_divisible else 1
        units += [Unit(file=file, part=part, num_parts=num_parts) for part in range(num_parts)]
    return units


def read_unit(unit: Unit, *, text_key: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    """Read the documents of a unit, in order, in pieces of at most `max_bytes` bytes of UTF-8.

    A file that cannot be decoded yields a Skipped when that is found; what was read before stands.

    Args:
        unit: the unit.
        text_key: key (JSON) or column (parquet) that holds the text, or a path of keys: `meta.text`.
        max_bytes: longest piece.

    Raises:
        ValueError: the file has changed since it was listed, or its storage fails.
    """
    try:
        if unit.file.kind == "txt":
            yield from _read_txt(unit, max_bytes)
        else:
            is_parquet = unit.file.kind == "parquet"
            rows = _read_parquet(unit, text_key) if is_parquet else read_json_rows(unit.file, unit.part, unit.num_parts)
            for place, row in rows:
                yield from _pieces_of_row(row, f"{unit.file.name} {place}", text_key, max_bytes)
    except Unreadable as error:
        yield Skipped("unreadable", f"{unit.file.name}: {error}", unit.weight)


def _read_txt(unit: Unit, max_bytes: int) -> Iterator[Piece | Skipped]:
    name = unit.file.name
    with open_source(unit.file) as file:
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
    with open_source(unit.file) as file:
        try:
            while block := file.read(_BLOCK_BYTES):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            yield Skipped("not_utf8", unit.file.name, unit.weight)
            return
    part = 0
    with open_source(unit.file) as file:
        data = file.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        while data:
            block = file.read(_BLOCK_BYTES)
            pieces = list(split_bytes(data, max_bytes))
            held = pieces.pop() if block else b""  # the last piece continues in the next block
            for number, piece in enumerate(pieces):
                is_last = not block and number == len(pieces) - 1
                yield Piece(unit.file.name, part, piece.decode(), is_last)
                part += 1
            data = held + block


def _read_parquet(unit: Unit, text_key: str) -> Iterator[tuple[str, Any]]:
    with open_parquet(unit.file) as parquet:
        check_unique(unit.file.uri, list_columns(parquet), [text_key])
        metadata = parquet.metadata
        first, stop = (metadata.num_row_groups * part // unit.num_parts for part in (unit.part, unit.part + 1))
        row = sum(metadata.row_group(number).num_rows for number in range(first))
        groups = list(range(first, stop))
        for batch in read_batches(parquet, [text_key], _PARQUET_ROWS, groups):
            for values in rows_of(batch):
                yield f"row {row}", values
                row += 1


def _pieces_of_row(row: Any, where: str, text_key: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    if isinstance(row, UnicodeDecodeError):
        yield Skipped("not_utf8", where)
    elif isinstance(row, Exception):
        yield Skipped("bad_json", where)
    elif (text := look_up(row, text_key, _MISSING)) is _MISSING:
        yield Skipped("missing_key", where)
    else:
        yield from _pieces_of(text, where, max_bytes)


def _pieces_of(text: Any, where: str, max_bytes: int) -> Iterator[Piece | Skipped]:
    if text is None:
        yield Skipped("null", where)
    elif not isinstance(text, str):
        yield Skipped("not_a_string", where)
    elif not text.strip().strip("\0"):  # NUL characters alone are what is left of a damaged file
        yield Skipped(_HARMLESS, where)
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
