"""Windows of the samples of a finished shard, of either layout, without their images: for statistics."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np

from vla_foundry.preprocessing.robotics.windows import relative_values
from vla_foundry.robotics.episode_blocks import EPISODE_SUFFIX, LOWDIM_SUFFIX, parse_episode
from vla_foundry.robotics.fields import Window, is_relative_field
from vla_foundry.robotics.spec import DatasetSpec
from vla_foundry.robotics.windows import PaddingStrategy, create_windows
from vla_foundry.shards import EpisodeSpans, MemberSpan, ShardIndex, index_shard, parse_index
from vla_foundry.storage.npz import NpzFile
from vla_foundry.storage.uri import join_uri, open_input, read_text

# windows that are held at a time
_CHUNK = 256

# ({field: (n, T, C)}, (n, T) True where a step lies within the episode)
WindowBatch = tuple[dict[str, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class WindowSource:
    """A dataset, and the window that is made around its anchors."""

    # dataset, local or s3://
    folder: str
    spec: DatasetSpec
    # of layout samples, no larger than the stored one
    window: Window


def read_windows(source: WindowSource, shard: str) -> Iterator[WindowBatch]:
    """Yield the windows of a shard's samples, some at a time, in the order of the tar.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it is broken, or a sample lacks a field; the sample is named.
    """
    with contextlib.closing(open_input(join_uri(source.folder, f"{shard}.tar"))) as file:
        index = _load_index(source.folder, shard, file)
        if index.episodes:
            for episode in index.episodes:
                yield from _read_episode(source, episode, lambda span: _read(file, span))
        else:
            for first in range(0, len(index.samples), _CHUNK):
                yield _read_samples(source, index.samples[first : first + _CHUNK], lambda span: _read(file, span))


def _load_index(folder: str, shard: str, file: BinaryIO) -> ShardIndex:
    name = join_uri(folder, f"{shard}.index.json")
    try:
        return parse_index(read_text(name), name)
    except FileNotFoundError:  # foreign shards have none
        return index_shard(file)


def _read(file: BinaryIO, span: MemberSpan) -> bytes:
    file.seek(span.offset)
    content = file.read(span.size)
    if len(content) < span.size:
        raise ValueError("the tar is cut off")
    return content


def _read_episode(
    source: WindowSource, episode: EpisodeSpans, read: Callable[[MemberSpan], bytes]
) -> Iterator[WindowBatch]:
    spec = source.spec
    info = parse_episode(read(_find(episode.members, EPISODE_SUFFIX, episode.key)), f"{episode.key}.{EPISODE_SUFFIX}")
    arrays = NpzFile.from_bytes(read(_find(episode.members, LOWDIM_SUFFIX, episode.key)))
    names = [name for name in spec.fields if not is_relative_field(name)]
    fields = {name: _read_field(arrays, name, info.num_frames, episode.key) for name in names}
    padding = cast(PaddingStrategy, spec.padding_strategy)
    anchors = np.array(info.anchors, dtype=np.int64)
    for first in range(0, len(anchors), _CHUNK):
        windows = create_windows(anchors[first : first + _CHUNK], info.num_frames, source.window, padding=padding)
        values = {name: windows.gather(array) for name, array in fields.items()}
        yield values | relative_values(values, windows, spec.pose_groups), ~windows.is_padding


def _read_samples(
    source: WindowSource,
    samples: Sequence[tuple[str, dict[str, MemberSpan]]],
    read: Callable[[MemberSpan], bytes],
) -> WindowBatch:
    spec = source.spec
    stored = Window(spec.past_lowdim_steps, spec.future_lowdim_steps)
    steps = stored.crop(source.window)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in spec.fields}
    valid = []
    for key, members in samples:
        arrays = NpzFile.from_bytes(read(_find(members, LOWDIM_SUFFIX, key)))
        for name, values in rows.items():
            values.append(_read_field(arrays, name, stored.num_steps, key)[steps])
        masks = [_read_array(arrays, name, key) for name in ("past_mask", "future_mask")]
        valid.append((masks[0] | masks[1])[steps])
    try:
        return {name: np.stack(values) for name, values in rows.items()}, np.stack(valid)
    except ValueError:
        raise ValueError(f"samples '{samples[0][0]}' to '{samples[-1][0]}' hold fields of different widths") from None


def _find(members: Mapping[str, MemberSpan], suffix: str, key: str) -> MemberSpan:
    if suffix not in members:
        raise ValueError(f"'{key}' has no member '{suffix}'")
    return members[suffix]


def _read_array(arrays: NpzFile, name: str, key: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"'{key}' has no array '{name}'")
    return arrays.read(name)


def _read_field(arrays: NpzFile, name: str, num_steps: int, key: str) -> np.ndarray:
    values = _read_array(arrays, name, key)
    if values.ndim != 2 or len(values) != num_steps:
        raise ValueError(f"'{key}': array '{name}' of shape {values.shape} is no field of {num_steps} steps")
    return values
