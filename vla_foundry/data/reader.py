"""Read any sample or record by (dataset, shard, row), without reading the samples before it."""

import logging
import os
import resource
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from vla_foundry.data.cache import DamagedShardError, RemoteShard, ShardCache
from vla_foundry.data.indexing import fits, is_intact, load_index, open_local, read_remote_index
from vla_foundry.data.plan import Location
from vla_foundry.data.ranges import LocalBytes, RemoteBytes, ShardBytes, join_members
from vla_foundry.robotics.episode_blocks import EPISODE_SUFFIX, LOWDIM_SUFFIX, EpisodeInfo, parse_episode
from vla_foundry.shards import ManifestEntry, MemberSpan, ShardIndex, TokenRecords
from vla_foundry.storage.local import name_errors
from vla_foundry.storage.npz import NpzFile, ReadRange
from vla_foundry.storage.uri import is_remote, join_uri, parent_uri

_logger = logging.getLogger(__name__)
# most shards that a process keeps open; each costs a file descriptor, plus its index
_MAX_OPEN_SHARDS = 256
# episodes of a shard whose array directory is kept in memory
_MAX_OPEN_EPISODES = 64
# bytes of an episode's arrays that are fetched as a whole before a window of it is read
_MOST_AHEAD = 1 << 20
_OFFSET, _END = np.dtype("<u8"), np.dtype("<u4")  # types of document_offsets and document_ends; see TokenRecords


class Dropped(ValueError):
    """Raised for a sample that is dropped.

    Args:
        reason: a few words; dropped samples are counted by reason.
        detail: specifics of this sample.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset: its manifest, entries and modality."""

    # path or URI of the manifest; its folder holds the shards
    manifest: str
    # kind of samples: the name of a pipeline
    modality: str
    entries: tuple[ManifestEntry, ...]

    def shard_uri(self, shard: int) -> str:
        """Return a shard's path or URI."""
        return join_uri(parent_uri(self.manifest), self.entries[shard].shard + ".tar")

    def remote_shard(self, shard: int) -> RemoteShard:
        """Return a shard's remote tar, with its size and checksum if known."""
        entry = self.entries[shard]
        return RemoteShard(uri=self.shard_uri(shard), num_bytes=entry.num_bytes, sha256=entry.sha256)

    @property
    def is_remote(self) -> bool:
        """True if the shards must be downloaded."""
        return is_remote(self.manifest)


class TokenShard:
    """A shard of tokenized records, read record by record.

    It is not mapped into memory: a read error in mapped memory ends the process with SIGBUS, which names nothing.

    Args:
        uri: name of the shard, for messages.
        tar: its bytes.
        records: where the arrays lie in the tar.
        num_records: number of records (N).

    Raises:
        ValueError: the array sizes contradict each other.
    """

    def __init__(self, uri: str, tar: ShardBytes, records: TokenRecords, num_records: int) -> None:
        self._tar = tar
        self.uri = uri
        self.record_length = records.record_length
        self._num_records = num_records
        self._records = records
        self._token_type = np.dtype({"uint16": "<u2", "uint32": "<u4"}[records.dtype])
        self._boundaries = [(span.offset, span.size) for span in (records.document_offsets, records.document_ends)]
        tar.want(self._boundaries)
        for span, item_size in (
            (records.tokens, self._token_type.itemsize),
            (records.document_offsets, _OFFSET.itemsize),
            (records.document_ends, _END.itemsize),
        ):
            if span.size % item_size or span.offset + span.size > tar.num_bytes:
                raise ValueError(f"{uri}: its records are cut off. Make the dataset again.")
        if not self._is_consistent():
            raise ValueError(f"{uri}: its document boundaries do not fit its {num_records} records. Make it again.")

    def _is_consistent(self) -> bool:
        spans = self._records
        offsets, ends = (
            self._read(span, 0, span.size // dtype.itemsize, dtype).astype(np.int64)
            for span, dtype in ((spans.document_offsets, _OFFSET), (spans.document_ends, _END))
        )
        num_tokens = spans.tokens.size // self._token_type.itemsize
        if num_tokens < self._num_records * self.record_length or len(offsets) != self._num_records + 1:
            return False
        if offsets[0] != 0 or offsets[-1] != len(ends) or (np.diff(offsets) < 1).any():
            return False
        lengths = np.diff(ends, prepend=0)
        lengths[offsets[:-1]] = ends[offsets[:-1]]
        return len(ends) == 0 or bool(lengths.min() > 0 and ends.max() <= self.record_length)

    def __len__(self) -> int:
        return self._num_records

    def read(self, row: int, first_token: int = 0, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return a record: its tokens, uint16 or uint32 [T], and its documents' ends, uint32; see TokenRecords.

        Args:
            first_token: number of the record's first token to return.
            count: number of tokens to return; None: the whole record.

        Raises:
            OSError: the file cannot be read.
        """
        spans, length = self._records, self.record_length
        tokens = self._read(spans.tokens, row * length + first_token, count or length, self._token_type)
        first, end = self._read(spans.document_offsets, row, 2, _OFFSET).tolist()
        return tokens, self._read(spans.document_ends, first, end - first, _END)

    def _read(self, span: MemberSpan, first: int, count: int, dtype: np.dtype) -> np.ndarray:
        size = dtype.itemsize
        return np.frombuffer(self._tar.read(span.offset + first * size, count * size), dtype)

    def read_ahead(self, rows: Iterable[int], *images: Any) -> None:
        """Fetch the tokens of records before they are read, if they are remote."""
        size = self.record_length * self._token_type.itemsize
        tokens = [(self._records.tokens.offset + row * size, size) for row in rows]
        self._tar.want([*self._boundaries, *tokens])


class SampleShard:
    """A shard of WebDataset samples, read member by member.

    Member i has the suffix `suffixes[suffix_numbers[i]]`; sample n has the members starts[n] .. starts[n + 1] - 1.

    Args:
        uri: name of the shard, for messages.
        tar: its bytes.
        index: the shard's index.
    """

    def __init__(self, uri: str, tar: ShardBytes, index: ShardIndex) -> None:
        self._tar = tar
        self.uri = uri
        members = [(suffix, span) for _, spans in index.samples for suffix, span in spans.items()]
        self._keys = [key for key, _ in index.samples]
        firsts = {key: row for row, key in reversed(list(enumerate(self._keys)))}
        self._repeated = {row for row, key in enumerate(self._keys) if firsts[key] != row}
        self._starts = np.cumsum([0] + [len(spans) for _, spans in index.samples])
        self._suffixes = sorted({suffix for suffix, _ in members})
        numbers = {suffix: number for number, suffix in enumerate(self._suffixes)}
        self._suffix_numbers = np.asarray([numbers[suffix] for suffix, _ in members], dtype=np.int32)
        self._offsets = np.asarray([span.offset for _, span in members], dtype=np.int64)
        self._sizes = np.asarray([span.size for _, span in members], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, row: int) -> str:
        """Return a sample's key: the common prefix of its member names."""
        return self._keys[row]

    def read(self, row: int) -> dict[str, bytes]:
        """Return a sample's content: {member suffix: bytes}.

        Raises:
            Dropped: an earlier sample of the shard has the same key.
            OSError: the file cannot be read.
        """
        return dict(zip(self.members(row), self._tar.read_members(self._places(row)), strict=True))

    def _places(self, row: int) -> list[tuple[int, int]]:
        members = slice(self._starts[row], self._starts[row + 1])
        return list(zip(self._offsets[members].tolist(), self._sizes[members].tolist(), strict=True))

    def members(self, row: int) -> dict[str, int]:
        """Return a sample's members: {lower-case suffix: member number for `read_member`}.

        Raises:
            Dropped: an earlier sample of the shard has the same key.
        """
        if row in self._repeated:
            raise Dropped("repeated key", f"an earlier sample of the shard has the key '{self._keys[row]}' too")
        numbers = self._suffix_numbers[self._starts[row] : self._starts[row + 1]].tolist()
        return {self._suffixes[number]: member for member, number in enumerate(numbers, int(self._starts[row]))}

    def read_member(self, member: int) -> bytes:
        """Return the content of one member.

        Raises:
            OSError: the file cannot be read.
        """
        return self._tar.read_member(int(self._offsets[member]), int(self._sizes[member]))

    def read_ahead(self, rows: Iterable[int], *images: Any) -> None:
        """Fetch samples before they are read, each by one request, if they are remote."""
        self._tar.want([span for row in rows for span in join_members(self._places(row))])


@dataclass(frozen=True, eq=False)
class OpenEpisode:
    """An episode that windows are cut from."""

    info: EpisodeInfo
    # the fields (L, C), read by rows
    arrays: NpzFile


class EpisodeShard:
    """A shard of whole episodes. Each row is one anchor of an episode, in tar order.

    Args:
        uri: name of the shard, for messages.
        tar: its bytes.
        index: the shard's index.
        is_checked: the tar's checksum was compared; False: check each array of an episode before its first use.
    """

    def __init__(self, uri: str, tar: ShardBytes, index: ShardIndex, *, is_checked: bool) -> None:
        self._tar = tar
        self.uri = uri
        self._is_checked = is_checked
        self._keys = [episode.key for episode in index.episodes]
        self._members = [episode.members for episode in index.episodes]
        self._starts = np.cumsum([0] + [len(episode.anchors) for episode in index.episodes])
        self._anchors = np.asarray([anchor for episode in index.episodes for anchor in episode.anchors], np.int64)
        # {camera: int64 [L, 2], offset and size of each frame}
        self._frames = [
            {
                camera: np.asarray([(span.offset, span.size) for span in spans])
                for camera, spans in episode.frames.items()
            }
            for episode in index.episodes
        ]
        self._open: OrderedDict[int, OpenEpisode] = OrderedDict()

    def __len__(self) -> int:
        return len(self._anchors)

    def key(self, row: int) -> str:
        """Return a sample's key, the same as in the layout "samples"."""
        number, anchor = self.locate(row)
        return f"{self._keys[number]}_t{anchor:06d}"

    def locate(self, row: int) -> tuple[int, int]:
        """Return the number of a row's episode in this shard, and its anchor frame in that episode."""
        return int(np.searchsorted(self._starts, row, side="right")) - 1, int(self._anchors[row])

    def episode(self, number: int) -> OpenEpisode:
        """Return an episode; recent ones are cached.

        Raises:
            ValueError: the episode is malformed.
        """
        opened = self._open.get(number)
        if opened is None:
            key, members = self._keys[number], self._members[number]
            for suffix in (EPISODE_SUFFIX, LOWDIM_SUFFIX):
                if suffix not in members:
                    raise ValueError(f"episode '{key}' has no member '{suffix}'")
            span = members[EPISODE_SUFFIX]
            info = parse_episode(self._tar.read_member(span.offset, span.size), f"{self.uri}: {key}.{EPISODE_SUFFIX}")
            stored = members[LOWDIM_SUFFIX]
            origin = f"{self.uri}: {key}.{LOWDIM_SUFFIX}"
            arrays = NpzFile(self._range_reader(stored), stored.size, is_checked=self._is_checked, origin=origin)
            opened = OpenEpisode(info, arrays)
            self._open[number] = opened
            if len(self._open) > _MAX_OPEN_EPISODES:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return opened

    def read_frame(self, number: int, camera: str, frame: int) -> bytes | None:
        """Return the bytes of a camera's image file at a frame, or None if the episode lacks the camera.

        Raises:
            OSError: the file cannot be read.
        """
        spans = self._frames[number].get(camera)
        if spans is None:
            return None
        offset, size = spans[frame].tolist()
        return self._tar.read_member(offset, size)

    def read_ahead(self, rows: Iterable[int], cameras: Sequence[str], offsets: Sequence[int]) -> None:
        """Fetch what windows need before they are read, if remote: frames `offsets` from the anchor, and arrays."""
        places: set[tuple[int, int]] = set()
        for number, anchor in map(self.locate, rows):
            found = [self._members[number].get(suffix) for suffix in (EPISODE_SUFFIX, LOWDIM_SUFFIX)]
            places |= {(span.offset, span.size) for span in found if span is not None and span.size <= _MOST_AHEAD}
            for camera in self._frames[number].keys() & set(cameras):
                frames = self._frames[number][camera].tolist()
                places |= {tuple(frames[min(max(anchor + each, 0), len(frames) - 1)]) for each in offsets}
        self._tar.want(join_members(places))

    def _range_reader(self, span: MemberSpan) -> ReadRange:
        tar = self._tar
        return lambda offset, size: tar.read(span.offset + offset, max(0, min(size, span.size - offset)))


Shard: TypeAlias = TokenShard | SampleShard | EpisodeShard


class ShardReader:
    """Opens shards on demand and keeps the most recently used ones open.

    Args:
        datasets: the datasets to read.
        cache: cache for remote shards.
        by_ranges: read remote shards that have an index by ranges, and do not download them.
    """

    # broken replacements to try for one bad sample before the dataset counts as unreadable
    max_replacements = 8
    # passes over the data that were read, where they cannot be computed
    epochs = 0.0

    def __init__(self, datasets: Sequence[Dataset], cache: ShardCache, *, by_ranges: bool = False) -> None:
        self.datasets = tuple(datasets)
        self.cache = cache
        self.by_ranges = by_ranges
        self._open: OrderedDict[tuple[int, int], Shard] = OrderedDict()
        # (dataset, shard): whether its bytes are those of the manifest
        self._intact: dict[tuple[int, int], bool] = {}
        # (dataset, shard): the version of a remote tar that is read by ranges
        self._versions: dict[tuple[int, int], str] = {}

    def __getstate__(self) -> dict[str, object]:
        """Pickle without open files, so that loader processes open their own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def open(self, dataset: int, shard: int) -> Shard:
        """Return an open shard.

        Raises:
            FileNotFoundError: the tar does not exist.
            Dropped: the tar has another checksum than in its manifest, so none of its samples is used.
            OSError: it cannot be read; the error names it.
            ValueError: the tar contradicts its manifest.
        """
        opened = self._open.get((dataset, shard))
        if opened is None:
            while len(self._open) >= _max_open_shards():
                self._open.popitem(last=False)
            with name_errors(self.datasets[dataset].shard_uri(shard)):
                opened = self._open_shard(dataset, shard)
            self._open[dataset, shard] = opened
        else:
            self._open.move_to_end((dataset, shard))
        return opened

    def _open_shard(self, number: int, shard: int) -> Shard:
        dataset, uri = self.datasets[number], self.datasets[number].shard_uri(shard)
        if not self._intact.get((number, shard), True):
            raise Dropped("damaged shard", f"its bytes have another SHA-256 than in {dataset.manifest}")
        if dataset.is_remote and self.by_ranges:
            tar, index = RemoteBytes(uri), read_remote_index(uri)
            _check_size(dataset, shard, tar.num_bytes)
            if tar.version != self._versions.setdefault((number, shard), tar.version):
                raise ValueError(f"{uri} changed while it was being read. Run again.")
            if index is not None and fits(tar, index):
                _check_count(dataset, shard, index.num_sequences)
                return _create_shard(uri, tar, index, is_checked=False)
            _logger.warning("%s has no index that fits it: it is downloaded as a whole.", uri)
        if dataset.is_remote:
            try:
                file, path = self.cache.open(dataset.remote_shard(shard))
            except DamagedShardError as error:
                self._intact[number, shard] = False
                raise Dropped("damaged shard", str(error)) from None
        else:
            file, path = open_local(uri, dataset.manifest), uri
        with file:
            _check_size(dataset, shard, os.fstat(file.fileno()).st_size)
            sha256 = dataset.entries[shard].sha256
            if sha256 is not None and not dataset.is_remote and (number, shard) not in self._intact:
                self._intact[number, shard] = is_intact(file, path, sha256)
                if not self._intact[number, shard]:
                    return self._open_shard(number, shard)
            index = load_index(file, path)
            _check_count(dataset, shard, index.num_sequences)
            return _create_shard(uri, LocalBytes(file), index, is_checked=sha256 is not None)

    def read_ahead(self, location: Location, images: Sequence[tuple[Sequence[str], Sequence[int]]] = ()) -> None:
        """Fetch samples before they are read, if they are remote and read by ranges; see Pipeline.images_of_windows."""
        # a shard that is not needed now forgets what it has fetched
        rows: dict[tuple[int, int], list[int]] = {key: [] for key in self._open}
        for dataset, shard, row in zip(*(array.tolist() for array in location[:3]), strict=True):
            rows.setdefault((dataset, shard), []).append(row)
        for (dataset, shard), numbers in rows.items():
            with suppress(ValueError, OSError):  # raised when the sample is read
                self.open(dataset, shard).read_ahead(numbers, *(images[dataset] if images else ((), ())))


def _create_shard(uri: str, tar: ShardBytes, index: ShardIndex, *, is_checked: bool) -> Shard:
    if index.records is not None:
        return TokenShard(uri, tar, index.records, index.num_sequences)
    if index.episodes:
        return EpisodeShard(uri, tar, index, is_checked=is_checked)
    return SampleShard(uri, tar, index)


def _max_open_shards() -> int:
    """Return how many shards may be open, at most half of the files that this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN_SHARDS if limit < 0 else max(1, min(_MAX_OPEN_SHARDS, limit // 2))


def _check_size(dataset: Dataset, shard: int, num_bytes: int) -> None:
    expected = dataset.entries[shard].num_bytes
    if expected is not None and expected != num_bytes:
        raise ValueError(
            f"{dataset.shard_uri(shard)} has {num_bytes} bytes, but {dataset.manifest} says {expected}: it was cut off "
            f"or written again. Check all shards with `vla-foundry manifest verify {parent_uri(dataset.manifest)}`."
        )


def _check_count(dataset: Dataset, shard: int, num_sequences: int) -> None:
    expected = dataset.entries[shard].num_sequences
    if expected != num_sequences:
        raise ValueError(
            f"{dataset.shard_uri(shard)} holds {num_sequences} samples, but {dataset.manifest} says {expected}. "
            f"Write the manifest again with `vla-foundry manifest build {parent_uri(dataset.manifest)}`."
        )
