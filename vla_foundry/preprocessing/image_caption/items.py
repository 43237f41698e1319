"""Images with captions: find them in folders and lists, make the members of a sample, count failures by reason.

Every image and caption is checked here, so that training can use what is written.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vla_foundry.preprocessing.output import digest_of
from vla_foundry.storage.uri import is_remote, join_uri, list_visible, open_input, parent_uri, read_bytes, read_text

# begins the reasons that are not the user's to mend: links that are dead, or lead to something else
DOWNLOAD = "download: "
# names that are kept for each reason
_MAX_EXAMPLES = 10
# before this many are judged, a run is not stopped for its share of failures
_MIN_JUDGED = 1000
# characters in a cell of a .csv list
_LONGEST_CELL = 10_000_000
LIST_ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_TEXT_ENDINGS = ("txt", "json")
# scene.image_0.png, scene.image_1.png, ...: several images of one sample
_NUMBERED = re.compile(r"(.+)\.image_(\d+)")
_PARQUET_ROWS = 4096
_CONVERSATION_KEYS = ("conversations", "messages")


class Unusable(ValueError):
    """Raised for an image and caption that make no sample.

    Args:
        reason: a few words that failures are counted by.
        detail: what is particular about this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


class Failures:
    """Counts that can be sent as JSON and added up."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count failures of one reason, one of which is named."""
        self.counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(name)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "samples": self.num_samples,
            "failed": dict(sorted(self.counts.items())),
            "examples": dict(sorted(self.examples.items())),
        }

    def add_json(self, values: dict[str, Any]) -> None:
        """Add what another one gave as JSON values."""
        self.num_samples += values["samples"]
        self.counts.update(values["failed"])
        for reason, examples in values["examples"].items():
            mine = self.examples.setdefault(reason, [])
            mine += examples[: _MAX_EXAMPLES - len(mine)]

    def check(self, max_fraction: float, *, flag: str, downloads: bool, is_final: bool) -> None:
        """Stop when too much has failed.

        Args:
            max_fraction: share that may fail.
            flag: where the user sets that.
            downloads: judge the failed downloads; else all other failures.
            is_final: no more will come; few are enough to judge.

        Raises:
            ValueError: more has failed.
        """
        judged = {reason: n for reason, n in self.counts.items() if reason.startswith(DOWNLOAD) == downloads}
        num_failed = sum(judged.values())
        total = self.num_samples + num_failed
        if num_failed > max_fraction * total and (is_final or total >= _MIN_JUDGED):
            reasons = "; ".join(
                f"{count:,} {reason}, as {self.examples[reason][0]}" for reason, count in Counter(judged).most_common(3)
            )
            raise ValueError(
                f"{num_failed:,} of {total:,} images failed ({reasons}). Mend the source, or allow more than "
                f"{flag} {max_fraction:g}."
            )

    def describe(self) -> list[str]:
        """Lines that say what failed, and why."""
        return [
            f"failed: {count:,} {reason}: {', '.join(self.examples[reason][:3])}{', ...' if count > 3 else ''}"
            for reason, count in sorted(self.counts.items())
        ]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample to be made."""

    # what the user knows it as: path within its source, or list and row
    name: str
    # image files, in order
    images: tuple[str, ...]
    # files with the caption, or None
    txt: str | None = None
    json: str | None = None
    # the caption and further columns, where they come from a list
    caption: str | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a list."""

    # list and row, for messages
    name: str
    # URL or path
    url: str
    caption: Any
    # further columns
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a job reads."""

    # one per sample, in order of their names within each source
    pairs: list[Item]
    # lists of URLs or paths
    lists: list[str]
    # names and sizes of all files
    listing: list[tuple[str, int]]
    # files without a partner, and others
    ignored: dict[str, int]

    def describe(self) -> dict[str, Any]:
        """What tells these sources from others."""
        return {
            "num_files": len(self.listing),
            "num_bytes": sum(size for _, size in self.listing),
            "listing_sha256": digest_of(self.listing),
        }


def list_sources(places: Sequence[str]) -> Sources:
    """Find pairs in folders (and patterns), and lists.

    Raises:
        FileNotFoundError: a place does not exist.
        ValueError: a place has neither.
    """
    pairs: list[Item] = []
    lists: list[str] = []
    listing: list[tuple[str, int]] = []
    ignored: dict[str, int] = {}
    for number, place in enumerate(places):
        sizes = list_visible(place)
        base = _base_of(place)
        names = {_name_in(uri, base, number): uri for uri in sizes}
        listing += [(name, sizes[uri]) for name, uri in names.items()]
        found = [uri for uri in sizes if uri.lower().endswith(LIST_ENDINGS)]
        lists += found
        new = group_pairs({name: uri for name, uri in names.items() if uri not in found}, ignored)
        pairs += new
        if not new and not found:
            raise ValueError(
                f"--source {place} has no images ({', '.join(IMAGE_ENDINGS)}) with captions (txt, json), and no list "
                f"({', '.join(LIST_ENDINGS)})."
            )
    return Sources(pairs=pairs, lists=lists, listing=listing, ignored=ignored)


def _base_of(place: str) -> str:
    """The folder that names are relative to."""
    text = place if is_remote(place) else os.path.expanduser(place)
    fixed = re.split(r"[*?\[]", text, maxsplit=1)[0]
    return (fixed.rstrip("/") if fixed == text else fixed.rpartition("/")[0]) + "/"


def _name_in(uri: str, base: str, number: int) -> str:
    inner = uri[len(base) :] if uri.startswith(base) else uri.rpartition("/")[2]
    return f"{number}/{inner}"


def group_pairs(names: dict[str, str], ignored: dict[str, int]) -> list[Item]:
    """Group the files of a folder into samples by their names without ending.

    Args:
        names: {name within the sources: uri}.
        ignored: gets the number of files by ending that belong to no image.
    """
    images: dict[str, list[tuple[int, str]]] = {}
    texts: dict[str, dict[str, str]] = {}
    for name, uri in names.items():
        stem, dot, ending = name.rpartition(".")
        ending = ending.lower() if dot else "(none)"
        if ending in IMAGE_ENDINGS:
            numbered = _NUMBERED.fullmatch(stem)
            key, number = (numbered[1], int(numbered[2])) if numbered else (stem, -1)
            images.setdefault(key, []).append((number, uri))
        elif ending in _TEXT_ENDINGS:
            texts.setdefault(stem, {})[ending] = uri
        else:
            ignored[ending] = ignored.get(ending, 0) + 1
    for stem, files in texts.items():
        if stem not in images:
            for ending in files:
                ignored[ending] = ignored.get(ending, 0) + 1
    return [
        Item(
            name=key,
            images=tuple(uri for _, uri in sorted(found)),
            txt=texts.get(key, {}).get("txt"),
            json=texts.get(key, {}).get("json"),
        )
        for key, found in sorted(images.items())
    ]


def read_list(uri: str, *, url_key: str, caption_key: str, extra_keys: Sequence[str]) -> Iterator[Row | str]:
    """Read the rows of a list; a row without a URL is given as its name.

    Raises:
        ValueError: the list cannot be read, or lacks a column.
    """
    name = uri.rpartition("/")[2]
    wanted = (url_key, caption_key, *extra_keys)
    number = -1
    for number, values in enumerate(_read_rows(uri, wanted)):
        where = f"{name} row {number}"
        missing = [key for key in wanted if key not in values]
        if missing and number == 0:
            known = ", ".join(map(str, values)) or "none"
            raise ValueError(
                f"{uri} has no column '{missing[0]}', only {known}. Name it with --url_key, --caption_key."
            )
        url = values.get(url_key)
        if not isinstance(url, str) or not url.strip():
            yield where
            continue
        extra = {key: values[key] for key in extra_keys if values.get(key) is not None}
        yield Row(name=where, url=url.strip(), caption=values.get(caption_key), values=extra)
    if number < 0:
        raise ValueError(f"{uri} has no rows.")


def _read_rows(uri: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    ending = uri.lower().rpartition(".")[2]
    if ending == "parquet":
        yield from _read_parquet(uri, columns)
    elif ending == "csv":
        csv.field_size_limit(_LONGEST_CELL)
        reader = csv.DictReader(io.StringIO(read_text(uri).removeprefix("\ufeff"), newline=""))
        try:
            yield from reader
        except csv.Error as error:
            raise ValueError(f"{uri} is not CSV after line {reader.line_num} ({error}).") from None
    elif ending == "tsv":
        yield from _read_tsv(uri)
    else:
        with open_input(uri) as file:
            for number, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{uri} line {number + 1} is not JSON ({error}).") from None
                yield values if isinstance(values, dict) else {}


def _read_tsv(uri: str) -> Iterator[dict[str, Any]]:
    """Read tab-separated values, which have no quoting: a quotation mark is a character like any other."""
    names: list[str] = []
    for number, line in enumerate(read_text(uri).removeprefix("\ufeff").split("\n"), start=1):
        cells = line.removesuffix("\r").split("\t")
        if not names:
            names = cells
        elif len(cells) > len(names):
            raise ValueError(
                f"{uri} line {number} has {len(cells)} cells, more than its {len(names)} columns. "
                "A caption cannot hold a tab in a .tsv file: use .jsonl or .parquet."
            )
        elif cells != [""]:
            yield dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True))


def _read_parquet(uri: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            ".parquet needs pyarrow, which is not installed: uv pip install 'vla-foundry[preprocessing]'"
        ) from None
    with open_input(uri) as file:
        try:
            parquet = pq.ParquetFile(file)
            known = parquet.schema_arrow.names
            missing = next((column for column in columns if column not in known), None)
            if missing is not None:
                raise ValueError(
                    f"{uri} has no column '{missing}', only {', '.join(known)}. Name it with --url_key, --caption_key."
                )
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=list(columns), use_threads=False):
                yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"{uri} is not valid parquet: {' '.join(str(error).split())[:200]}") from None


def is_download(url: str) -> bool:
    """True if it has to be downloaded from a web server."""
    return url.lower().startswith(("http://", "https://"))


def item_of_row(row: Row, list_uri: str) -> Item:
    """Make an item of a row that names a file, by path (relative to the list), file:// or a storage's URI."""
    path = row.url.removeprefix("file://")
    if not is_remote(path):
        path = os.path.expanduser(path)
        if not os.path.isabs(path):
            path = join_uri(parent_uri(list_uri), path)
    caption = row.caption if isinstance(row.caption, str) else None
    return Item(name=row.name, images=(path,), caption=caption, values=row.values)


def read_item(item: Item, *, caption_key: str, max_side: int | None, jpeg_quality: int) -> dict[str, bytes]:
    """Read the files of an item and return the members of its sample.

    Raises:
        Unusable: a file cannot be read, an image cannot be decoded, or there is no caption.
    """
    images = [_read(uri) for uri in item.images]
    txt = _read(item.txt) if item.txt is not None else None
    values = _read(item.json) if item.json is not None else None
    if item.caption is not None:
        txt = item.caption.encode("utf-8", errors="replace")
    if item.values:
        values = json.dumps(item.values, ensure_ascii=False, default=str).encode("utf-8")
    texts = create_texts(txt, values, caption_key=caption_key)
    return {**create_images(images, max_side=max_side, jpeg_quality=jpeg_quality), **texts}


def _read(uri: str) -> bytes:
    try:
        return read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Unusable("missing file", f"{uri}: {type(error).__name__}") from None


def create_texts(txt: bytes | None, values: bytes | None, *, caption_key: str) -> dict[str, bytes]:
    """Return the text members: txt, stripped, and json, as it is.

    Raises:
        Unusable: they say nothing about the image, or are no text.
    """
    members: dict[str, bytes] = {}
    caption = ""
    if txt is not None:
        caption = _decode(txt).strip()
        if caption:
            members["txt"] = caption.encode("utf-8")
    if values is not None:
        facts = _parse_object(_decode(values))
        members["json"] = values
        caption = caption or _find_text(facts, caption_key)
    if not caption:
        raise Unusable("no caption")
    return members


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("caption is not UTF-8", f"byte {error.start}") from None


def _parse_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise Unusable("bad JSON")
    return values


def _find_text(values: Mapping[str, Any], caption_key: str) -> str:
    if any(isinstance(values.get(key), list) and values[key] for key in _CONVERSATION_KEYS):
        return "conversation"
    caption = values.get(caption_key)
    return caption.strip() if isinstance(caption, str) else ""


def create_images(images: Sequence[bytes], *, max_side: int | None, jpeg_quality: int) -> dict[str, bytes]:
    """Return the image members: one named by its format, or several with `image_<number>.` before.

    Raises:
        Unusable: an image cannot be decoded.
    """
    files = [_check_image(data, max_side=max_side, jpeg_quality=jpeg_quality) for data in images]
    if len(files) == 1:
        return dict(files)
    return {f"image_{number}.{suffix}": data for number, (suffix, data) in enumerate(files)}


def _check_image(data: bytes, *, max_side: int | None, jpeg_quality: int) -> tuple[str, bytes]:
    """Decode an image, and scale it down if it is too large."""
    from vla_foundry.images.codec import decode_image, encode_jpeg
    from vla_foundry.images.geometry import resize_image

    try:
        image = decode_image(data)
    except ValueError as error:
        raise Unusable("bad image", str(error)) from None
    height, width = image.shape[1:]
    if max_side is None or max(height, width) <= max_side:
        return _suffix_of(data), data
    scale = max_side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small, _ = resize_image(image, size, method="resize_no_crop", interpolation="bicubic")
    return "jpg", encode_jpeg(small, quality=jpeg_quality)


def _suffix_of(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "png"
    return "jpg" if data.startswith(b"\xff\xd8") else "webp"
