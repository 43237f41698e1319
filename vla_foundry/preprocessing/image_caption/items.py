"""Images and videos with captions: find them in folders and lists, check them, make the members of a sample.

Every image and caption is checked here, so that training can use what is written.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vla_foundry.preprocessing.sources import (
    PACKINGS,
    SourceFile,
    Unreadable,
    check_unique,
    describe_files,
    list_columns,
    list_source_files,
    look_up,
    open_parquet,
    open_source,
    read_batches,
    read_json_rows,
    rows_of,
)
from vla_foundry.shards import sha256_of
from vla_foundry.storage.uri import is_remote, join_uri, name_of, open_input, parent_uri, read_bytes
from vla_foundry.text.captions import Unusable, find_captions, read_texts

# reasons that are not the user's to mend: links that are missing, dead (the first part), or lead to something else
NO_URL, DOWNLOAD = "no URL", "download: "
# characters in a cell of a .csv list
_LONGEST_CELL = 10_000_000
LIST_KINDS = ("parquet", "csv", "tsv", "jsonl", "ndjson")
# images of these kinds, and videos, are stored as they are, other images as PNG
STORED_ENDINGS = ("jpg", "jpeg", "png", "webp")
VIDEO_ENDINGS = ("mp4", "m4v", "mov", "webm", "mkv")
IMAGE_ENDINGS = (*STORED_ENDINGS, "jpe", "jfif", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", *VIDEO_ENDINGS)
_TEXT_ENDINGS = ("txt", "json")
# scene.image_0.png, scene.image_1.png, ...: several images of one sample
_NUMBERED = re.compile(r"(.+)\.image_(\d+)")
_PARQUET_ROWS = 4096
# MP4 files that hold pictures, which nothing here reads: AVIF and HEIF
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# evenly spaced frames of each video that are decoded as a check
_NUM_CHECKED = 8


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

    def read(self, options: Mapping[str, Any]) -> list[dict[str, bytes]]:
        """Read its files; see `read_item`."""
        return read_item(self, **options)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a list."""

    # list and row, for messages
    name: str
    # URL or path
    url: str
    # None: it has none
    caption: str | None
    # further columns
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row of a list that gives no sample."""

    # list and row
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a job reads."""

    # one per sample, in order of their names within each source
    pairs: list[Item]
    # lists of URLs or paths
    lists: list[SourceFile]
    files: list[SourceFile]
    # {ending: number of files} of those without a partner, and others
    ignored: Counter[str]

    def describe(self) -> dict[str, Any]:
        """Return what tells these sources from others: names and sizes of all files, and the content of lists."""
        digests = []
        for file in self.lists:
            with open_input(file.uri) as opened:
                digests.append(sha256_of(opened))
        return describe_files(self.files, digests)


def list_sources(places: Sequence[str]) -> Sources:
    """Find pairs in folders (and patterns), and lists.

    Raises:
        FileNotFoundError: a place does not exist.
        ValueError: a place has neither, or two places name the same file.
    """
    pairs: list[Item] = []
    lists: list[SourceFile] = []
    ignored: Counter[str] = Counter()
    found = list_source_files(places)
    for place, files in zip(places, found, strict=True):
        new_lists = [file for file in files if file.kind in LIST_KINDS]
        new_pairs = group_pairs((file for file in files if file.kind not in LIST_KINDS), ignored)
        if not new_pairs and not new_lists:
            raise ValueError(
                f"--source {place} has no images or videos ({', '.join(IMAGE_ENDINGS)}) with captions (txt, json), "
                f"and no list ({', '.join(LIST_KINDS)}, or these packed as {', '.join(PACKINGS)})."
            )
        pairs += new_pairs
        lists += new_lists
    return Sources(pairs=pairs, lists=lists, files=[file for files in found for file in files], ignored=ignored)


def group_pairs(files: Iterable[SourceFile], ignored: Counter[str]) -> list[Item]:
    """Group the files of a folder into samples by their names without ending.

    Args:
        files: the files.
        ignored: gets the number of files by ending that belong to no image.
    """
    images: dict[str, list[tuple[int, str]]] = {}
    texts: dict[str, dict[str, str]] = {}
    for file in files:
        stem = file.name.rpartition(".")[0]
        if file.packing or file.kind not in (*IMAGE_ENDINGS, *_TEXT_ENDINGS):
            ignored[file.ending] += 1
        elif file.kind in _TEXT_ENDINGS:
            texts.setdefault(stem, {})[file.kind] = file.uri
        else:
            numbered = _NUMBERED.fullmatch(stem)
            key, number = (numbered[1], int(numbered[2])) if numbered else (stem, -1)
            images.setdefault(key, []).append((number, file.uri))
    ignored.update(f".{ending}" for stem, files in texts.items() if stem not in images for ending in files)
    return [
        Item(
            name=key,
            images=tuple(uri for _, uri in sorted(found)),
            txt=texts.get(key, {}).get("txt"),
            json=texts.get(key, {}).get("json"),
        )
        for key, found in sorted(images.items())
    ]


def read_list(file: SourceFile, url_key: str, caption_key: str, extra_keys: Sequence[str]) -> Iterator[Row | BadRow]:
    """Read the rows of a list.

    Args:
        file: the list.
        url_key: column or key that holds the URL or path; or a path of keys, `image.url`.
        caption_key: the same of the caption.
        extra_keys: the same of further values.

    Raises:
        ValueError: the list cannot be read, or lacks a column.
    """
    wanted = (url_key, caption_key, *extra_keys)
    number = -1
    try:
        for number, values in enumerate(_read_rows(file, wanted)):
            if number == 0 and not isinstance(values, Exception):
                _check_columns(file, wanted, values)
            yield _row_of(f"{name_of(file.uri)} row {number}", values, url_key, caption_key, extra_keys)
    except Unreadable as error:
        raise ValueError(f"{file.uri}: {error}.") from None
    if number < 0:
        raise ValueError(f"{file.uri} has no rows.")


def _check_columns(file: SourceFile, wanted: Sequence[str], row: Any) -> None:
    missing = [key for key in wanted if look_up(row, key, _check_columns) is _check_columns]
    if missing:
        known = ", ".join(map(str, row)) if isinstance(row, dict) and row else "none"
        raise ValueError(
            f"{file.uri} has no column '{missing[0]}', only {known}. Name it with --url_key, --caption_key."
        )


def _row_of(name: str, values: Any, url_key: str, caption_key: str, extra_keys: Sequence[str]) -> Row | BadRow:
    if isinstance(values, Exception):
        return BadRow(name=name, reason="not Unicode" if isinstance(values, UnicodeDecodeError) else "bad JSON")
    url, caption = look_up(values, url_key), look_up(values, caption_key)
    if not isinstance(url, str) or not url.strip():
        return BadRow(name=name, reason=NO_URL)
    extra = {key: value for key in extra_keys if (value := look_up(values, key)) is not None}
    if isinstance(caption, list) and find_captions(caption):  # training draws one of them
        extra["caption"] = find_captions(caption)
    caption = caption if isinstance(caption, str) else None
    if not _is_unicode([url, caption, extra]):
        return BadRow(name=name, reason="not Unicode")
    return Row(name=name, url=url.strip(), caption=caption, values=extra)


def _is_unicode(values: Any) -> bool:
    """False if a text holds half of a surrogate pair: no encoding can store it."""
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_rows(file: SourceFile, columns: Sequence[str]) -> Iterator[Any]:
    """Read the rows of a list: each a dict, or the exception of a line that is not JSON."""
    if file.kind == "parquet":
        yield from _read_parquet(file, columns)
    elif file.kind in ("csv", "tsv"):
        newline = "" if file.kind == "csv" else "\n"
        with open_source(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as lines:
            try:
                yield from (_read_csv if file.kind == "csv" else _read_tsv)(file.uri, lines, columns)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file.uri} is not UTF-8 text ({error.reason}).") from None
    else:
        yield from (row for _, row in read_json_rows(file))


def _read_csv(uri: str, lines: Iterable[str], wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(lines)
    try:
        check_unique(uri, list(reader.fieldnames or ()), wanted)
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{uri} is not CSV after line {reader.line_num} ({error}).") from None


def _read_tsv(uri: str, lines: Iterable[str], wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Read tab-separated values, which have no quoting: a quotation mark is a character like any other."""
    names: list[str] = []
    for number, line in enumerate(lines, start=1):
        cells = line.removesuffix("\n").removesuffix("\r").split("\t")
        if not names:
            names = cells
            check_unique(uri, names, wanted)
        elif len(cells) > len(names):
            raise ValueError(
                f"{uri} line {number} has {len(cells)} cells, more than its {len(names)} columns. "
                "A caption cannot hold a tab in a .tsv file: use .jsonl or .parquet."
            )
        elif cells != [""]:
            yield dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True))


def _read_parquet(file: SourceFile, columns: Sequence[str]) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    with open_parquet(file) as parquet:
        paths = list_columns(parquet)
        check_unique(file.uri, paths, columns)
        if not all(any(path == key or path.startswith(f"{key}.") for path in paths) for key in columns):
            yield dict.fromkeys(parquet.schema_arrow.names)
            return
        for batch in read_batches(parquet, columns, _PARQUET_ROWS):
            yield from rows_of(batch)


def is_download(url: str) -> bool:
    """True if it has to be downloaded from a web server."""
    return url.lower().startswith(("http://", "https://"))


def item_of_row(row: Row, list_uri: str) -> Item:
    """Make an item of a row that names a file, by path (relative to the list), file:// or a storage's URI."""
    return Item(name=row.name, images=(locate(row.url, list_uri),), caption=row.caption, values=row.values)


def locate(path: str, origin: str) -> str:
    """Return where a file is that is named by a path relative to the file `origin`, file:// or a storage's URI."""
    path = path.removeprefix("file://")
    if is_remote(path):
        return path
    path = os.path.expanduser(path)
    return path if os.path.isabs(path) else join_uri(parent_uri(origin), path)


def read_item(
    item: Item, *, caption_key: str, max_side: int | None, jpeg_quality: int, all_captions: bool = False
) -> list[dict[str, bytes]]:
    """Read the files of an item and return the members of its sample; with `all_captions`, of one for each caption.

    Raises:
        Unusable: a file cannot be read, an image cannot be decoded, there is no caption, or several images have one
            name.
    """
    numbers = [_NUMBERED.fullmatch(name_of(uri).rpartition(".")[0]) for uri in item.images]
    if len(numbers) > 1 and len({number[2] if number else "" for number in numbers} - {""}) < len(numbers):
        raise Unusable("several images of one name", ", ".join(name_of(uri) for uri in item.images))
    images = [read_file(uri) for uri in item.images]
    txt = read_file(item.txt) if item.txt is not None else None
    values = read_file(item.json) if item.json is not None else None
    if item.caption is not None:
        txt = item.caption.encode("utf-8")
    if item.values:
        values = json.dumps(item.values, ensure_ascii=False, default=str).encode("utf-8")
    in_list = item.txt is None and item.json is None
    key = "caption" if in_list and "caption" in item.values else caption_key
    texts = create_texts(txt, values, caption_key=key, all_captions=all_captions)
    members = create_images(images, max_side=max_side, jpeg_quality=jpeg_quality)
    return [{**members, **each} for each in texts]


def read_file(uri: str) -> bytes:
    """Return a file's content.

    Raises:
        Unusable: there is no such file.
    """
    try:
        return read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Unusable("missing file", f"{uri}: {type(error).__name__}") from None


def create_texts(
    txt: bytes | None, values: bytes | None, *, caption_key: str, all_captions: bool = False
) -> list[dict[str, bytes]]:
    """Return the text members: txt, stripped, and json, as it is; see `read_texts` for what is left out.

    With `all_captions`, return them once for each caption of a list in the JSON, with that caption as txt.

    Raises:
        Unusable: they say nothing about the image, or are not text.
    """
    texts = read_texts(txt, values, key=caption_key)
    members = {} if texts.values is None or values is None else {"json": values}
    has_list = isinstance((texts.values or {}).get(caption_key), list)
    if texts.is_txt:
        return [{"txt": texts.captions[0].encode("utf-8"), **members}]
    if all_captions and has_list and not texts.conversation:
        return [{**members, "txt": caption.encode("utf-8")} for caption in texts.captions]
    return [members]


def create_images(images: Sequence[bytes], *, max_side: int | None, jpeg_quality: int) -> dict[str, bytes]:
    """Return the image members: one named by its format, or several with `image_<number>.` (or `video_`) before.

    Raises:
        Unusable: an image cannot be decoded.
    """
    files = [_check_image(data, max_side=max_side, jpeg_quality=jpeg_quality) for data in images]
    if len(files) == 1:
        return dict(files)
    return {name_member(number, suffix): data for number, (suffix, data) in enumerate(files)}


def name_member(number: int, suffix: str) -> str:
    """Return the name of one of several images or videos of a sample."""
    return f"{'video' if suffix in VIDEO_ENDINGS else 'image'}_{number}.{suffix}"


def _check_image(data: bytes, *, max_side: int | None, jpeg_quality: int) -> tuple[str, bytes]:
    """Check an image or a video; scale a too large image down, and store kinds that training does not read as PNG."""
    from vla_foundry.images.codec import decode_image, encode_jpeg, encode_png
    from vla_foundry.images.geometry import resize_image
    from vla_foundry.images.video import read_frames

    suffix = _suffix_of(data)
    if suffix in VIDEO_ENDINGS:
        try:
            read_frames(data, _NUM_CHECKED)
        except ValueError as error:
            raise Unusable("bad video", str(error)) from None
        return suffix, data
    try:
        image = decode_image(data)
    except ValueError as error:
        raise Unusable("bad image", str(error)) from None
    height, width = image.shape[1:]
    if max_side is None or max(height, width) <= max_side:
        return (suffix, data) if suffix else ("png", encode_png(image))
    scale = max_side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small, _ = resize_image(image, size, method="resize_no_crop", interpolation="bicubic")
    return "jpg", encode_jpeg(small, quality=jpeg_quality)


def _suffix_of(data: bytes) -> str:
    """Return the ending of an image or a video that is stored as it is; "" for other kinds."""
    if data.startswith(b"\x89PNG"):
        return "png"
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "webm"
    if data[4:8] == b"ftyp" and data[8:12] not in _PICTURE_BRANDS:
        return "mp4"
    return "webp" if data.startswith(b"RIFF") else ""
