"""Write shards: WebDataset tars whose bytes depend only on their content, each with an index beside it.

webdataset's own TarWriter does not fit: it sorts the members of a sample, ignores its `format` argument, and opens the
tar as a stream, so that a failed episode could not be removed again.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

from vla_foundry.shards import ManifestEntry, create_index, format_index, sha256_of
from vla_foundry.storage.uri import join_uri, open_output, write_text
from vla_foundry.tars import Bytes, format_end, format_member


class ShardWriter:
    """Adds samples to one open tar; see open_shard."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_bytes = 0
        # each member's name and place, in order
        self.members: list[tuple[str, Bytes]] = []
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
            name = f"{key}.{suffix}"
            before, after = format_member(name, content)
            for part in (before, content, after):
                self._file.write(part)
            self.members.append((name, (self.num_bytes + len(before), len(content))))
            self.num_bytes += len(before) + len(content) + len(after)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Remove all that the block added if it raises."""
        start, count = self.num_bytes, len(self.members)
        try:
            yield
        except BaseException:
            self._file.seek(start)
            self._file.truncate()
            self.num_bytes = start
            del self.members[count:]
            raise


@contextmanager
def open_shard(folder: str, shard: str) -> Iterator[ShardWriter]:
    """Open `<folder>/<shard>.tar` for writing; it and then its index appear when the block ends without an error.

    The writer's `entry`, the shard's line for the manifest, is set at the end.
    """
    with open_output(join_uri(folder, f"{shard}.tar")) as file:
        writer = ShardWriter(file)
        yield writer
        file.write(format_end(writer.num_bytes))
        file.flush()
        with open(file.name, "rb") as written:
            index = create_index(written, writer.members)
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
