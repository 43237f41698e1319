"""The dataset folder: tar shards with a manifest and, beside each shard, an index.

    manifest.jsonl            one line per shard: {"shard": "shard_000000", "num_sequences": 512, "num_bytes": ..., ...}
    shard_000000.tar          an uncompressed WebDataset tar
    shard_000000.index.json   where each sample's bytes lie in the tar (see ShardIndex)
    provenance.json           what made the dataset

`shard` is the path of the tar relative to the manifest's folder, without ".tar". Foreign datasets may lack
num_bytes, sha256 and the index.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, pairwise
from typing import Any, BinaryIO, Literal

from vla_foundry.parsing import MAX_RECORD_BYTES, parse_object
from vla_foundry.tars import Bytes, find_files, refuse_pipe

MANIFEST_NAME = "manifest.jsonl"
PROVENANCE_NAME = "provenance.json"
_SHARD = "shard_"
INDEX_VERSION = 1
# most samples or bytes of a shard
MAX_COUNT = 1 << 48
# members that WebDataset skips, and how it splits the names of the others
_META_NAME = re.compile(r"__[^/]*__($|/)")
_SAMPLE_NAME = re.compile(r"((?:.*/)?[^./]+)[.]([^/]*)", re.DOTALL)
# member suffixes of a shard of tokenized records; its one sample key is the shard's name
TOKENS_SUFFIX = {"uint16": "tokens.u16", "uint32": "tokens.u32"}
DOCUMENT_ENDS_SUFFIX = "document_ends.u32"
DOCUMENT_OFFSETS_SUFFIX = "document_offsets.u64"
RECORDS_INFO_SUFFIX = "records.json"
# the JSON member of a whole episode (robotics/episode_blocks.py); an index needs only its header
EPISODE_SUFFIX = "episode.json"
EPISODE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """One line of a manifest."""

    # path of the tar relative to the manifest's folder, without ".tar"
    shard: str
    # samples (or tokenized records) in the shard
    num_sequences: int
    # size of the tar, bytes; None in foreign manifests
    num_bytes: int | None = None
    # SHA-256 of the tar, hexadecimal; None in foreign manifests
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class MemberSpan:
    """Where the bytes of one tar member lie."""

    # first byte of the member's content within the tar
    offset: int
    # bytes
    size: int


@dataclass(frozen=True, kw_only=True)
class TokenRecords:
    """A shard of tokenized records: N records of `record_length` little-endian tokens, and their document boundaries.

    With o = document_offsets, the documents of record n end (exclusively) at its tokens document_ends[o[n]:o[n + 1]].
    The last of these is the number of valid tokens; the rest of the record is padding. A document may continue in the
    next record. There is a boundary after each end-of-sequence token.
    """

    # "uint16" or "uint32", little-endian
    dtype: Literal["uint16", "uint32"]
    # tokens in a record (seq_len + 1)
    record_length: int
    # (N, record_length) tokens
    tokens: MemberSpan
    # (number of documents,) uint32
    document_ends: MemberSpan
    # (N + 1,) uint64
    document_offsets: MemberSpan


@dataclass(frozen=True, kw_only=True)
class EpisodeHeader:
    """The part of an episode's JSON member that describes its other members."""

    # frames (L)
    num_frames: int
    # frames that are samples, ascending
    anchors: tuple[int, ...]
    # {camera: extension of its frames, "jpg" or "png"}
    extensions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class EpisodeSpans:
    """Where an episode lies in a shard of whole episodes (episode_blocks.py); each of its anchors is a sample."""

    # episode id: the common prefix of its member names
    key: str
    # frames that are samples, ascending
    anchors: tuple[int, ...]
    # {lower-case suffix: span} of the members that are not frames: episode.json, lowdim.npz
    members: dict[str, MemberSpan]
    # {camera, as spelled in episode.json: span of each frame}
    frames: dict[str, tuple[MemberSpan, ...]]


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where each sample of a shard lies; one of these is set.

    `samples` (WebDataset groups of members), `records` (tokenized text) or `episodes` (whole episodes).
    """

    # samples or records in the shard
    num_sequences: int
    # size of the tar when it was indexed, bytes
    num_bytes: int
    # one per sample: (sample key, {member suffix in lower case: span}), in the order of the tar
    samples: tuple[tuple[str, dict[str, MemberSpan]], ...] = ()
    records: TokenRecords | None = None
    # in the order of the tar
    episodes: tuple[EpisodeSpans, ...] = ()
    # False: the tar that was indexed lacks the empty block at its end, so it may be cut off; not stored
    ends_properly: bool = field(default=True, compare=False)


def parse_manifest(text: str, origin: str, has_file: Callable[[str], bool] | None = None) -> list[ManifestEntry]:
    """Parse the text of a manifest.

    Args:
        text: JSON lines; empty lines are skipped, unknown keys ignored.
        origin: where the text comes from, for messages.
        has_file: says whether there is a file, by its path relative to the manifest's folder. With it, shards get the
            names of their tars, if the manifest calls shard_00000000.tar `00000000`, or the other way round.

    Raises:
        ValueError: a line is malformed (the message gives its number), or the manifest is empty.
    """
    entries = [
        _parse_manifest_line(line, f"{origin} line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not entries:
        raise ValueError(f"{origin} lists no shards. Write it with `vla-foundry manifest build`.")
    names = [entry.shard for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{origin} lists shard '{twice}' more than once. Remove all but one line.")
    if has_file is not None and not has_file(f"{names[0]}.tar") and has_file(f"{_other_name(names[0])}.tar"):
        entries = [replace(entry, shard=_other_name(entry.shard)) for entry in entries]
    return entries


def _other_name(shard: str) -> str:
    folder, slash, name = shard.rpartition("/")
    return f"{folder}{slash}{name[len(_SHARD) :] if name.startswith(_SHARD) else _SHARD + name}"


def _parse_manifest_line(line: str, where: str) -> ManifestEntry:
    values = parse_object(line, where)
    if not isinstance(values.get("shard"), str) or not values["shard"]:
        raise ValueError(f"{where} needs a key 'shard' with the name of a tar.")
    if "num_sequences" not in values:
        raise ValueError(f"{where} needs a key 'num_sequences' with a whole number >= 0.")
    count, num_bytes, sha256 = values["num_sequences"], values.get("num_bytes"), values.get("sha256")
    _check_count(count, f"{where}: 'num_sequences'")
    if num_bytes is not None:
        _check_count(num_bytes, f"{where}: 'num_bytes'")
    if not (sha256 is None or isinstance(sha256, str)):
        raise ValueError(f"{where}: 'sha256' must be text, got {sha256!r}.")
    shard = values["shard"].removesuffix(".tar")
    refuse_pipe(shard, f"{where}: ")
    if shard.startswith("/") or ".." in shard.split("/"):
        raise ValueError(f"{where}: shard '{shard}' leaves the manifest's folder. Use a path inside it.")
    return ManifestEntry(shard=shard, num_sequences=count, num_bytes=num_bytes, sha256=sha256)


def _check_count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{name} must be a whole number from 0 to 2^48, got {value!r}")
    return value


def _check_key(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"the name of a sample or episode must be text, got {key!r}")
    return key


def format_manifest(entries: Iterable[ManifestEntry]) -> str:
    """Format a manifest, one JSON object per line, omitting unknown values."""
    rows = ({key: value for key, value in asdict(entry).items() if value is not None} for entry in entries)
    return "".join(json.dumps(row) + "\n" for row in rows)


def split_member_name(name: str) -> tuple[str, str] | None:
    """Split a member's name as WebDataset does: at the first dot after the last slash; the suffix in lower case.

    Returns:
        The sample's key and the suffix. None for members that belong to no sample: WebDataset's own (`__x__`), hidden
        files (`._x.png`, `.DS_Store`) and names without a suffix.
    """
    match = None if _META_NAME.match(name) else _SAMPLE_NAME.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def index_shard(file: BinaryIO) -> ShardIndex:
    """Read a whole tar's headers and return where its samples lie; members that belong to no sample are skipped.

    A member whose suffix its sample already has begins another sample with the same key; readers drop it.

    Args:
        file: the tar, seekable, at its beginning.

    Raises:
        ValueError: the file is not a readable tar, or a member of a sample cannot be read.
    """
    files, ends_properly = find_files(file)
    return replace(create_index(file, files), ends_properly=ends_properly)


def create_index(file: BinaryIO, files: Iterable[tuple[str, Bytes | str]]) -> ShardIndex:
    """Return the index of a tar whose files are known, see `find_files`; for its errors see `index_shard`."""
    samples: list[tuple[str, dict[str, MemberSpan]]] = []
    num_bytes = file.seek(0, 2)
    for name, content in files:
        key, suffix = split_member_name(name) or (None, "")
        if key is None:
            continue
        if isinstance(content, str):
            raise ValueError(f"member {name!r} {content}")
        span = MemberSpan(offset=content[0], size=content[1])
        if span.offset + span.size > num_bytes:
            raise ValueError(f"member {name!r} is cut off")
        if not samples or samples[-1][0] != key or suffix in samples[-1][1]:
            samples.append((key, {}))
        samples[-1][1][suffix] = span
    if len(samples) == 1 and RECORDS_INFO_SUFFIX in samples[0][1]:
        return _index_records(file, samples[0][1], num_bytes)
    if samples and EPISODE_SUFFIX in samples[0][1]:
        episodes = tuple(_index_episode(file, key, spans) for key, spans in samples)
        num_anchors = sum(len(episode.anchors) for episode in episodes)
        return ShardIndex(num_sequences=num_anchors, num_bytes=num_bytes, episodes=episodes)
    return ShardIndex(num_sequences=len(samples), num_bytes=num_bytes, samples=tuple(samples))


def format_records_info(*, dtype: str, record_length: int, num_sequences: int) -> str:
    """Format the JSON member of a shard of tokenized records."""
    return json.dumps({"dtype": dtype, "record_length": record_length, "num_sequences": num_sequences})


def _index_records(file: BinaryIO, members: dict[str, MemberSpan], num_bytes: int) -> ShardIndex:
    span = members[RECORDS_INFO_SUFFIX]
    file.seek(span.offset)
    try:
        info = parse_object(file.read(min(span.size, MAX_RECORD_BYTES)), f".{RECORDS_INFO_SUFFIX}")
        num_records = _check_count(info["num_sequences"], "'num_sequences'")
        record_length = _check_count(info["record_length"], "'record_length'")
        records = TokenRecords(
            dtype=info["dtype"],
            record_length=record_length,
            tokens=members[TOKENS_SUFFIX[info["dtype"]]],
            document_ends=members[DOCUMENT_ENDS_SUFFIX],
            document_offsets=members[DOCUMENT_OFFSETS_SUFFIX],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its token records are not whole ({type(error).__name__}: {error})") from None
    _check_sizes(records, num_records)
    return ShardIndex(num_sequences=num_records, num_bytes=num_bytes, records=records)


def _check_sizes(records: TokenRecords, count: int) -> None:
    token_size = {"uint16": 2, "uint32": 4}[records.dtype]
    if records.tokens.size != count * records.record_length * token_size:
        raise ValueError(f"it has {records.tokens.size} bytes of tokens for {count} records of {records.record_length}")
    if records.document_offsets.size != 8 * (count + 1):
        raise ValueError(f"it has {records.document_offsets.size} bytes of offsets for {count} records")


def _index_episode(file: BinaryIO, key: str, members: dict[str, MemberSpan]) -> EpisodeSpans:
    if EPISODE_SUFFIX not in members:
        raise ValueError(f"episode '{key}' has no member .{EPISODE_SUFFIX}")
    span = members[EPISODE_SUFFIX]
    file.seek(span.offset)
    header = parse_episode_header(file.read(min(span.size, MAX_RECORD_BYTES)), f"'{key}.{EPISODE_SUFFIX}'")
    rest, frames = dict(members), {}
    for camera, extension in header.extensions.items():
        suffixes = [frame_suffix(camera, frame, extension) for frame in range(header.num_frames)]
        missing = next((suffix for suffix in suffixes if suffix not in rest), None)
        if missing is not None:
            raise ValueError(f"episode '{key}' has no member .{missing}")
        frames[camera] = tuple(rest.pop(suffix) for suffix in suffixes)
    return EpisodeSpans(key=key, anchors=header.anchors, members=rest, frames=frames)


def frame_suffix(camera: str, frame: int, extension: str) -> str:
    """Return the suffix of the member that holds a camera's frame."""
    return f"{camera.lower()}.{frame:06d}.{extension}"


def parse_episode_header(text: str | bytes, origin: str) -> EpisodeHeader:
    """Parse the part of an episode's JSON member that an index needs.

    Args:
        origin: where the text comes from, for messages.

    Raises:
        ValueError: the text is not an episode of this version, or its anchors contradict its length.
    """
    try:
        values = parse_object(text, "it")
        if values["version"] != EPISODE_VERSION:
            raise ValueError(f"version {values['version']}, not {EPISODE_VERSION}")
        num_frames = _check_count(values["num_frames"], "'num_frames'")
        anchors = _parse_anchors(values["anchors"])
        extensions = {name: camera["extension"] for name, camera in values["cameras"].items()}
        unknown = [extension for extension in extensions.values() if extension not in ("jpg", "png")]
        if unknown:
            raise ValueError(f"a camera has the extension {unknown[0]!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{origin} is not an episode of version {EPISODE_VERSION} ({error}).") from None
    if anchors and anchors[-1] >= num_frames:
        raise ValueError(f"{origin}: its anchors do not ascend within its {num_frames} frames.")
    return EpisodeHeader(num_frames=num_frames, anchors=anchors, extensions=extensions)


def _parse_anchors(values: Iterable[Any]) -> tuple[int, ...]:
    anchors = tuple(_check_count(anchor, "each of 'anchors'") for anchor in values)
    if any(first >= second for first, second in pairwise(anchors)):
        raise ValueError("'anchors' do not ascend")
    return anchors


def format_index(index: ShardIndex) -> str:
    """Format an index as the JSON of `<shard>.index.json`."""
    values: dict[str, Any] = {
        "version": INDEX_VERSION,
        "num_sequences": index.num_sequences,
        "num_bytes": index.num_bytes,
    }
    if index.records is not None:
        values["records"] = asdict(index.records)
    elif index.episodes:
        values["episodes"] = [
            [
                episode.key,
                list(episode.anchors),
                {suffix: [span.offset, span.size] for suffix, span in episode.members.items()},
                {
                    camera: [n for span in spans for n in (span.offset, span.size)]
                    for camera, spans in episode.frames.items()
                },
            ]
            for episode in index.episodes
        ]
    else:
        values["samples"] = [
            [key, {suffix: [span.offset, span.size] for suffix, span in members.items()}]
            for key, members in index.samples
        ]
    text = json.dumps(values, separators=(",", ":"))
    return f"{text[:-1]}{_CHECKSUM_MARK}{zlib.crc32(text.encode())}}}"


def parse_index(text: str, origin: str) -> ShardIndex:
    """Parse the JSON of `<shard>.index.json`.

    Raises:
        ValueError: the text is not such an index, has another version, or was damaged.
    """
    try:
        values = parse_object(text, "it")
        # earlier indexes have no checksum
        checked, mark, checksum = text.rpartition(_CHECKSUM_MARK)
        if mark and zlib.crc32(f"{checked}}}".encode()) != int(checksum[:-1]):
            raise ValueError("its checksum differs")
        if values["version"] != INDEX_VERSION:
            raise ValueError(f"version {values['version']}, not {INDEX_VERSION}")
        count, num_bytes = (_check_count(values[name], f"'{name}'") for name in ("num_sequences", "num_bytes"))
        if "records" in values:
            _check_count(values["records"]["record_length"], "'record_length'")
            spans = {name: _parse_span(name, **values["records"][name]) for name in _RECORD_SPANS}
            fields: dict[str, Any] = {**values["records"], **spans}
            if fields["dtype"] not in TOKENS_SUFFIX:
                raise ValueError(f"its tokens are {fields['dtype']}")
            index = ShardIndex(num_sequences=count, num_bytes=num_bytes, records=TokenRecords(**fields))
        elif "episodes" in values:
            episodes = tuple(_parse_episode_spans(*entry) for entry in values["episodes"])
            index = ShardIndex(num_sequences=count, num_bytes=num_bytes, episodes=episodes)
        else:
            samples = tuple((_check_key(key), _parse_spans(members)) for key, members in values["samples"])
            index = ShardIndex(num_sequences=count, num_bytes=num_bytes, samples=samples)
        _check_index(index)
        return index
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{origin} is not a shard index ({error}). Delete it; it will be made again.") from None


def _check_index(index: ShardIndex) -> None:
    """Check that an index contradicts neither itself nor the size of its tar."""
    if index.records is not None:
        _check_sizes(index.records, index.num_sequences)
        spans: Iterable[MemberSpan] = [getattr(index.records, name) for name in _RECORD_SPANS]
    else:
        count = sum(len(episode.anchors) for episode in index.episodes) or len(index.samples)
        if count != index.num_sequences:
            raise ValueError(f"it lists {count} samples, and says {index.num_sequences}")
        members = [episode.members for episode in index.episodes] + [spans for _, spans in index.samples]
        frames = (spans for episode in index.episodes for spans in episode.frames.values())
        spans = chain(chain.from_iterable(spans.values() for spans in members), chain.from_iterable(frames))
    if any(span.offset + span.size > index.num_bytes for span in spans):
        raise ValueError("a member lies beyond its tar")


def _parse_spans(members: dict[str, Any]) -> dict[str, MemberSpan]:
    return {suffix: _parse_span(suffix, offset, size) for suffix, (offset, size) in members.items()}


def _parse_span(name: str, offset: Any, size: Any) -> MemberSpan:
    return MemberSpan(offset=_check_count(offset, f"offset of '{name}'"), size=_check_count(size, f"size of '{name}'"))


def _parse_episode_spans(key: str, anchors: list[Any], members: dict[str, Any], frames: dict[str, Any]) -> EpisodeSpans:
    spans = {
        camera: tuple(_parse_span(camera, offset, size) for offset, size in zip(flat[::2], flat[1::2], strict=True))
        for camera, flat in frames.items()
    }
    return EpisodeSpans(
        key=_check_key(key), anchors=_parse_anchors(anchors), members=_parse_spans(members), frames=spans
    )


_CHECKSUM_MARK = ',"crc32":'
_RECORD_SPANS = ("tokens", "document_ends", "document_offsets")


def sha256_of(file: BinaryIO, chunk_size: int = 1 << 22) -> str:
    """Return the hexadecimal SHA-256 of the rest of `file`."""
    digest = hashlib.sha256()
    while chunk := file.read(chunk_size):
        digest.update(chunk)
    return digest.hexdigest()
