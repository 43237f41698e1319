"""Write shards: WebDataset tars whose bytes depend only on their content, each with an index beside it.

webdataset's own TarWriter does not fit: it sorts the members of a sample, ignores its `format` argument, and opens the
tar as a stream, so that a failed episode could not be removed again.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

from vla_foundry.shards import ManifestEntry, format_index, index_shard, sha256_of
from vla_foundry.storage.uri import join_uri, open_output, write_text


class ShardWriter:
    """Adds samples to one open tar; see open_shard."""

    def __init__(self, tar: tarfile.TarFile, file: BinaryIO) -> None:
        self._tar, self._file = tar, file
        # known when open_shard's block has ended
        self.entry: ManifestEntry | None = None

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add one sample, or some members of it: a member `<key>.<suffix>` for each suffix.

        Args:
            key: unique in the dataset, without a dot; the members of a sample must follow each other.
            members: {suffix: content}; suffixes in lower case.
        """
        assert "." not in key.rpartition("/")[2], f"a sample key may have no dot: {key}"
        for suffix, content in members.items():
            assert suffix == suffix.lower(), f"a member's suffix must be in lower case: {suffix}"
            info = tarfile.TarInfo(f"{key}.{suffix}")  # time, owner and group are 0
            info.mode = 0o644
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Remove all that the block added if it raises."""
        start = self._tar.offset
        try:
            yield
        except BaseException:
            self._file.seek(start)
            self._file.truncate()
            self._tar.offset = start
            raise


@contextmanager
def open_shard(folder: str, shard: str) -> Iterator[ShardWriter]:
    """Open `<folder>/<shard>.tar` for writing; it and then its index appear when the block ends without an error.

    The writer's `entry`, the shard's line for the manifest, is set at the end.
    """
    with open_output(join_uri(folder, f"{shard}.tar")) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            writer = ShardWriter(tar, file)
            yield writer
        file.flush()
        with open(file.name, "rb") as written:
            index = index_shard(written)
            written.seek(0)
            digest = sha256_of(written)
    write_text(join_uri(folder, f"{shard}.index.json"), format_index(index))
    writer.entry = ManifestEntry(
        shard=shard, num_sequences=index.num_sequences, num_bytes=index.num_bytes, sha256=digest
    )


def write_shard(folder: str, shard: str, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ManifestEntry:
    """Write a whole shard of (key, {suffix: content}) and return its line for the manifest."""
    with open_shard(folder, shard) as writer:
        for key, members in samples:
            writer.add(key, members)
    assert writer.entry is not None, "open_shard sets the entry"
    return writer.entry
