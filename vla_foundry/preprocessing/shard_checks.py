"""Find what is wrong with one shard: its tar, its samples' members, its token records, its episodes: a line a fault."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from vla_foundry.robotics.episode_blocks import CALIBRATION_PREFIXES, EPISODE_SUFFIX, LOWDIM_SUFFIX, TIMESTAMP_FIELD
from vla_foundry.shards import (
    EpisodeSpans,
    ManifestEntry,
    MemberSpan,
    ShardIndex,
    TokenRecords,
    index_shard,
    sha256_of,
)
from vla_foundry.storage.npz import NpzFile

# two empty blocks end a tar
_END_BYTES = 1024
_BLOCK = 512
_MAX_FAULTS = 5
# members that may stand in for each other
_IMAGE = re.compile(r"(?:(?:image_)?\d+\.)?(?:jpg|jpeg|png|webp)")
# a captioned image has at least one of them
_CAPTIONS = frozenset({"txt", "json"})


@dataclass(frozen=True, kw_only=True)
class ShardExpectation:
    """What is said about a shard elsewhere."""

    entry: ManifestEntry
    # the index beside it; None: there is none
    index: ShardIndex | None
    # tokens must be below this; None: not known
    vocab_size: int | None


def find_faults(file: BinaryIO, expected: ShardExpectation) -> Iterator[str]:
    """Compare an open tar with what is said about it, and with itself.

    Args:
        file: the tar, seekable.
        expected: what its manifest and its index say.
    """
    entry = expected.entry
    num_bytes = file.seek(0, 2)
    if entry.num_bytes is not None and num_bytes != entry.num_bytes:
        yield f"it has {num_bytes:,} bytes, and {entry.num_bytes:,} in the manifest"
    elif entry.sha256 is not None:
        file.seek(0)
        if sha256_of(file) != entry.sha256:
            yield "its bytes have another SHA-256 than in the manifest"
    file.seek(0)
    try:
        index = index_shard(file)
    except ValueError as error:
        yield str(error)
        return
    if index.num_sequences != entry.num_sequences:
        yield f"it has {index.num_sequences:,} samples, and {entry.num_sequences:,} in the manifest"
    if expected.index is not None and expected.index != index:
        yield f"its index does not fit it{_first_difference(expected.index, index)}"
    if not ends_properly(file, index):
        yield "it has no end marker: the tar is cut off"
    if index.records is not None:
        yield from _record_faults(file, index.records, index.num_sequences, expected.vocab_size)
    elif index.episodes:
        yield from _episode_faults(file, index.episodes)
    else:
        yield from _member_faults(index)


def ends_properly(file: BinaryIO, index: ShardIndex) -> bool:
    """True if the last member is followed by the two empty blocks that end a tar."""
    end = max((span.offset + span.size for span in _spans(index)), default=0)
    file.seek(-(-end // _BLOCK) * _BLOCK)
    return file.read(_END_BYTES) == bytes(_END_BYTES)


def _spans(index: ShardIndex) -> Iterator[MemberSpan]:
    if index.records is not None:
        yield from (index.records.tokens, index.records.document_ends, index.records.document_offsets)
    for _, members in index.samples:
        yield from members.values()
    for episode in index.episodes:
        yield from episode.members.values()
        for frames in episode.frames.values():
            yield from frames


def _first_difference(said: ShardIndex, found: ShardIndex) -> str:
    for (said_key, said_members), (key, members) in zip(said.samples, found.samples, strict=False):
        if said_key != key:
            return f": it says sample '{said_key}' where '{key}' is"
        if said_members != members:
            suffixes = sorted(name for name in said_members | members if said_members.get(name) != members.get(name))
            return f" at member '{key}.{suffixes[0]}'"
    for said_episode, episode in zip(said.episodes, found.episodes, strict=False):
        if said_episode != episode:
            return f" at episode '{episode.key}'"
    if said.num_sequences != found.num_sequences:
        return f": it says {said.num_sequences:,} samples"
    return ""


def _episode_faults(file: BinaryIO, episodes: tuple[EpisodeSpans, ...]) -> Iterator[str]:
    """Episodes that stand twice, lack their arrays, have empty or foreign members, or arrays of another length."""
    faults = []
    counts = Counter(episode.key for episode in episodes)
    faults += [f"episode '{key}' stands {count} times" for key, count in counts.items() if count > 1]
    for episode in episodes:
        spans = [*episode.members.values(), *(span for frames in episode.frames.values() for span in frames)]
        num_empty = sum(1 for span in spans if not span.size)
        if num_empty:
            faults.append(f"{num_empty:,} members of episode '{episode.key}' are empty")
        for suffix in sorted(episode.members.keys() - {EPISODE_SUFFIX, LOWDIM_SUFFIX}):
            faults.append(f"member '{episode.key}.{suffix}' is of no camera or frame of its episode")
        if LOWDIM_SUFFIX not in episode.members:
            faults.append(f"episode '{episode.key}' has no member .{LOWDIM_SUFFIX}")
        elif not num_empty:
            faults += _array_faults(file, episode)
    yield from faults[:_MAX_FAULTS]
    if len(faults) > _MAX_FAULTS:
        yield f"{len(faults) - _MAX_FAULTS:,} more faults of this kind"


def _array_faults(file: BinaryIO, episode: EpisodeSpans) -> Iterator[str]:
    span = episode.members[LOWDIM_SUFFIX]
    file.seek(span.offset)
    try:
        arrays = NpzFile.from_bytes(file.read(span.size))
        shapes = {name: arrays.read(name).shape for name in arrays.names}
    except ValueError as error:
        yield f"member '{episode.key}.{LOWDIM_SUFFIX}': {error}"
        return
    lengths = {len(frames) for frames in episode.frames.values()}
    lengths |= {
        shape[0] if shape else 0
        for name, shape in shapes.items()
        if not (name.startswith(CALIBRATION_PREFIXES) and len(shape) == 2)
    }
    if TIMESTAMP_FIELD not in shapes:
        yield f"episode '{episode.key}' has no array '{TIMESTAMP_FIELD}'"
    if len(lengths) > 1:
        yield f"the arrays and cameras of episode '{episode.key}' have different lengths: {sorted(lengths)}"


def _member_faults(index: ShardIndex) -> Iterator[str]:
    """Samples that lack, or add, a member beside most samples of the shard; keys that stand twice; empty members."""
    kinds = [frozenset("image" if _IMAGE.fullmatch(name) else name for name in members) for _, members in index.samples]
    faults = []
    if kinds:
        usual = Counter(kinds).most_common(1)[0][0]
        for (key, _), kind in zip(index.samples, kinds, strict=True):
            either = _CAPTIONS if "image" in kind and kind & _CAPTIONS else frozenset[str]()
            faults += [f"sample '{key}' has no member .{name}" for name in sorted(usual - kind - either)]
            faults += [
                f"sample '{key}' has a member .{name} that others lack" for name in sorted(kind - usual - either)
            ]
    counts = Counter(key for key, _ in index.samples)
    faults += [f"sample key '{key}' stands {count} times" for key, count in counts.items() if count > 1]
    faults += [
        f"member '{key}.{suffix}' is empty"
        for key, members in index.samples
        for suffix, span in members.items()
        if not span.size
    ]
    yield from faults[:_MAX_FAULTS]
    if len(faults) > _MAX_FAULTS:
        yield f"{len(faults) - _MAX_FAULTS:,} more faults of this kind"


def _record_faults(file: BinaryIO, records: TokenRecords, num_records: int, vocab_size: int | None) -> Iterator[str]:
    offsets = _read_array(file, records.document_offsets, "<u8").astype(np.int64)
    ends = _read_array(file, records.document_ends, "<u4").astype(np.int64)
    per_record = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(ends) or (per_record < 1).any():
        yield "its document offsets do not divide its document ends"
        return
    record = np.repeat(np.arange(num_records), per_record)
    is_first = np.ones(len(ends), np.bool_)
    is_first[1:] = record[1:] != record[:-1]
    steps = np.where(is_first, ends, np.diff(ends, prepend=0))
    bad = (steps <= 0) | (ends > records.record_length)
    if bad.any():
        yield f"the document ends of record {record[int(np.argmax(bad))]} are not in order within the record"
    if vocab_size is not None and num_records:
        tokens = _read_array(file, records.tokens, {"uint16": "<u2", "uint32": "<u4"}[records.dtype])
        if int(tokens.max()) >= vocab_size:
            where = int(np.argmax(tokens >= vocab_size)) // records.record_length
            yield f"record {where} holds token {int(tokens.max())}, but the vocabulary has {vocab_size:,}"


def _read_array(file: BinaryIO, span: MemberSpan, dtype: str) -> np.ndarray:
    file.seek(span.offset)
    return np.frombuffer(file.read(span.size), dtype)
