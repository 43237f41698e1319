"""Read the stored episodes of a robot dataset whole: every frame of every camera, and every field."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from vla_foundry.data.cache import ShardCache
from vla_foundry.data.indexing import user_cache_folder
from vla_foundry.data.reader import Dataset, EpisodeShard, ShardReader
from vla_foundry.robotics.episode_blocks import EpisodeInfo
from vla_foundry.robotics.spec import DatasetSpec, read_spec
from vla_foundry.shards import MANIFEST_NAME, ManifestEntry, parse_manifest
from vla_foundry.storage.uri import absolute_uri, exists, file_test, join_uri, parent_uri, read_text

_CACHE_BYTES = 10_000_000_000


def find_manifest(dataset: str) -> str:
    """Return the manifest of a dataset that is given by its folder or by its manifest.

    Raises:
        FileNotFoundError: it does not exist.
    """
    manifest = absolute_uri(dataset if dataset.endswith(".jsonl") else join_uri(dataset, MANIFEST_NAME))
    if not exists(manifest):
        raise FileNotFoundError(f"{manifest} does not exist. Name a folder that `vla-foundry preprocess` made.")
    return manifest


def open_shards(manifest: str) -> tuple[ShardReader, tuple[ManifestEntry, ...]]:
    """Return a reader of a dataset's shards, and their entries."""
    entries = tuple(parse_manifest(read_text(manifest), manifest, file_test(parent_uri(manifest))))
    cache = ShardCache(os.path.join(user_cache_folder(), "shards"), _CACHE_BYTES)
    return ShardReader([Dataset(manifest=manifest, modality="", entries=entries)], cache), entries


@dataclass(frozen=True, eq=False)
class StoredEpisode:
    """An episode in a shard."""

    info: EpisodeInfo
    _shard: EpisodeShard
    # its number in the shard
    _number: int

    def read_frame(self, camera: str, frame: int) -> bytes | None:
        """Return an image file; None: the episode lacks the camera."""
        return self._shard.read_frame(self._number, camera, frame)

    def read_fields(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return fields by name, each (L, C)."""
        arrays = self._shard.episode(self._number).arrays
        return {name: arrays.read(name) for name in names if name in arrays.names}

    @property
    def instruction(self) -> str:
        """The first instruction; "" without one."""
        texts = self.info.instructions_at(0)
        return next((text for kind in texts.values() for text in kind), "")


class StoredEpisodes:
    """The episodes of a dataset, in the order of its manifest.

    Args:
        folder: the dataset, or its manifest, local or remote.

    Raises:
        ValueError: it is not a robot dataset, or not one of layout "episodes".
        FileNotFoundError: it does not exist.
    """

    def __init__(self, folder: str) -> None:
        self.manifest = find_manifest(folder)
        try:
            self.spec: DatasetSpec = read_spec(self.manifest)
        except FileNotFoundError:
            raise ValueError(
                f"{folder} is no robot dataset: it has no robotics.json. See it with: vla-foundry data inspect {folder}"
            ) from None
        if self.spec.layout != "episodes":
            raise ValueError(
                f"{folder} stores windows, not episodes. See them with: vla-foundry data inspect {folder} --sample N"
            )
        self._reader, entries = open_shards(self.manifest)
        self._num_shards = len(entries)

    def __iter__(self) -> Iterator[StoredEpisode]:
        """Open one episode after another."""
        for place in range(self._num_shards):
            shard = self._reader.open(0, place)
            assert isinstance(shard, EpisodeShard)
            for number in range(shard.locate(len(shard) - 1)[0] + 1):
                yield StoredEpisode(shard.episode(number).info, shard, number)
