"""`vla-foundry manifest build|verify DIR`: list and index the shards of a folder, or check them against their manifest.

`verify` prints one line for each fault of a shard: in its tar, the members of its samples, its token records, its
episodes.
"""

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.preprocessing import ManifestBuildParams, ManifestVerifyParams
from vla_foundry.preprocessing.output import PROGRESS_FOLDER, SETTINGS_NAME
from vla_foundry.progress import say, show_progress
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.episode_blocks import CALIBRATION_PREFIXES, EPISODE_SUFFIX, LOWDIM_SUFFIX, TIMESTAMP_FIELD
from vla_foundry.shards import (
    MANIFEST_NAME,
    PROVENANCE_NAME,
    EpisodeSpans,
    ManifestEntry,
    MemberSpan,
    ShardIndex,
    TokenRecords,
    format_index,
    format_manifest,
    index_shard,
    parse_index,
    parse_manifest,
    sha256_of,
)
from vla_foundry.storage.npz import NpzFile
from vla_foundry.storage.uri import (
    download,
    exists,
    is_hidden,
    is_remote,
    join_uri,
    list_relative,
    open_input,
    read_object,
    read_text,
    write_text,
)

_MAX_FAULTS = 5
# members that may replace each other
_IMAGE = re.compile(r"(?:(?:image_|video_)?\d+\.)?(?:jpg|jpeg|png|webp|gif|m4v|mkv|mov|mp4|webm)")
# a captioned image has at least one of them
_CAPTIONS = frozenset({"txt", "json"})


def main(argv: list[str]) -> None:
    """Run `vla-foundry manifest`.

    Args:
        argv: `build` or `verify`, the folder, flags.

    Raises:
        ValueError: what the user can fix; a dataset has faults, which are printed first.
        FileNotFoundError: the folder does not exist, or has no manifest.
    """
    what = argv[0] if argv else "--help"
    if what in ("--help", "-h"):
        sys.stdout.write(
            "usage: vla-foundry manifest build|verify DIR [FLAGS]\n\n"
            "  build     index the tars of a folder and write their manifest\n"
            "  verify    check every shard of a folder against its manifest and its index\n"
        )
    elif what == "build":
        build = parse_command(ManifestBuildParams, argv[1:], prog="vla-foundry manifest build", positional=("folder",))
        entries, is_new = build_manifest(build.folder, overwrite=build.overwrite, num_threads=build.num_threads)
        verb = "written" if is_new else "already right"
        say(f"{join_uri(build.folder, MANIFEST_NAME)}: {verb}, {_summary(entries)}")
    elif what == "verify":
        verify = parse_command(
            ManifestVerifyParams, argv[1:], prog="vla-foundry manifest verify", positional=("folder",)
        )
        faults = verify_dataset(verify.folder, num_threads=verify.num_threads)
        for fault in faults:
            say(fault)
        if faults:
            raise ValueError(f"{verify.folder} has {len(faults):,} faults.")
        say(f"{verify.folder}: no faults, {_summary(_read_manifest(verify.folder))}")
    else:
        raise ValueError(unknown_name_message("manifest", what, ["build", "verify"]))


def _summary(entries: Sequence[ManifestEntry]) -> str:
    size = sum(entry.num_bytes or 0 for entry in entries)
    return f"{sum(entry.num_sequences for entry in entries):,} samples in {len(entries):,} shards, {size / 1e6:,.1f} MB"


def _read_manifest(folder: str) -> list[ManifestEntry]:
    name = join_uri(folder, MANIFEST_NAME)
    try:
        return parse_manifest(read_text(name), name)
    except FileNotFoundError:
        _refuse_parts(folder)
        raise FileNotFoundError(
            f"{name} does not exist. Write it with `vla-foundry manifest build {folder}`."
        ) from None


def _refuse_parts(folder: str) -> None:
    """Refuse a folder without a manifest whose parts (train, validation) are datasets: they must not be mixed."""
    parts = [name for name in list_relative(folder) if name.endswith(f"/{MANIFEST_NAME}") and not is_hidden(name)]
    if parts:
        parts = [join_uri(folder, name.rpartition("/")[0]) for name in sorted(parts)]
        raise ValueError(f"{folder} is not one dataset; it holds {', '.join(parts[:5])}. Name one of them.")


def _list_tars(folder: str) -> dict[str, int]:
    """Return {name of a shard: bytes of its tar} of all tars below a folder, without hidden ones (._x.tar of macOS)."""
    return {
        name.removesuffix(".tar"): size
        for name, size in list_relative(folder).items()
        if name.endswith(".tar") and not is_hidden(name)
    }


@contextmanager
def _open_tar(folder: str, shard: str) -> Iterator[BinaryIO]:
    """Open a tar to read it whole; a remote one is copied first."""
    uri = join_uri(folder, f"{shard}.tar")
    if not is_remote(uri):
        with open_input(uri) as file:
            yield file
        return
    with tempfile.TemporaryDirectory(prefix="vla_foundry_") as temporary:
        path = f"{temporary}/shard.tar"
        download(uri, path)
        with open(path, "rb") as file:
            yield file


def _over_shards(
    function: Callable[[str], Any], weights: Mapping[str, int], *, title: str, num_threads: int
) -> list[Any]:
    """Call a function with every shard's name, in threads, and return the results in order."""

    def run(shard: str) -> Any:
        result = function(shard)
        advance(weights[shard])
        return result

    with (
        show_progress(title, sum(weights.values()), 0) as advance,
        ThreadPoolExecutor(num_threads, thread_name_prefix="shard") as pool,
    ):
        return list(pool.map(run, weights))


def build_manifest(folder: str, *, overwrite: bool = False, num_threads: int = 8) -> tuple[list[ManifestEntry], bool]:
    """Index every tar below a folder and write the indexes and the manifest.

    An existing manifest keeps its order, and missing values are added.

    Returns:
        The manifest, and whether it was written (False: nothing changed).

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder has no tars, a tar cannot be read, the existing manifest says something else, or a job
            that writes the folder has not finished.
    """
    tars = _list_tars(folder)
    if exists(join_uri(folder, PROGRESS_FOLDER, SETTINGS_NAME)):
        raise ValueError(
            f"{folder} holds a dataset that was not finished ({len(tars):,} shards so far). Finish it with the command "
            f"that began it, or delete {join_uri(folder, PROGRESS_FOLDER)} to keep what there is."
        )
    if not tars:
        raise ValueError(f"{folder} has no .tar files to list in a manifest.")
    name = join_uri(folder, MANIFEST_NAME)
    if not exists(name):
        _refuse_parts(folder)
    said = {} if overwrite or not exists(name) else {entry.shard: entry for entry in _read_manifest(folder)}

    def describe(shard: str) -> ManifestEntry:
        with _open_tar(folder, shard) as file:
            try:
                index = index_shard(file)
            except ValueError as error:
                raise ValueError(f"{shard}: {error}. Recreate or remove the shard.") from None
            if not index.ends_properly:
                raise ValueError(f"{shard}: the tar is cut off. Recreate or remove the shard.")
            file.seek(0)
            digest = sha256_of(file)
        entry = ManifestEntry(shard=shard, num_sequences=index.num_sequences, num_bytes=index.num_bytes, sha256=digest)
        if said:  # before its index is replaced
            _check_agrees(name, said.get(shard), entry)
        index_name, text = join_uri(folder, f"{shard}.index.json"), format_index(index)
        if not exists(index_name) or read_text(index_name) != text:
            write_text(index_name, text)
        return entry

    missing = sorted(set(said) - set(tars))
    if missing:
        raise ValueError(f"{name} lists shard '{missing[0]}', which does not exist. Replace it with --overwrite true.")
    found = {entry.shard: entry for entry in _over_shards(describe, tars, title="index", num_threads=num_threads)}
    entries = [found[shard] for shard in said or found]
    if entries == list(said.values()):
        return entries, False
    write_text(name, format_manifest(entries))
    return entries, True


def _check_agrees(name: str, said: ManifestEntry | None, found: ManifestEntry) -> None:
    """Refuse to change what a manifest says; missing values may be added."""
    if said is None:
        raise ValueError(f"{name} does not list shard '{found.shard}'. Replace it with --overwrite true.")
    for field, value in asdict(said).items():
        if value is not None and value != asdict(found)[field]:
            raise ValueError(
                f"{name} says {field} {value} of shard '{found.shard}', which has {asdict(found)[field]}. "
                "Replace it with --overwrite true."
            )


def verify_dataset(folder: str, *, num_threads: int = 8) -> list[str]:
    """Check every shard of a dataset; one line for each fault.

    It checks for missing and unlisted shards; size, SHA-256 and number of samples against the manifest; the index
    against the tar; truncated tars; samples with other members than the rest of the shard; token records.

    Raises:
        FileNotFoundError: the folder does not exist, or has no manifest.
        ValueError: the manifest cannot be read.
    """
    entries = _read_manifest(folder)
    tars = _list_tars(folder)
    vocab_size = _read_vocab_size(folder)
    listed = {entry.shard: entry for entry in entries}

    def check(shard: str) -> list[str]:
        index_name = join_uri(folder, f"{shard}.index.json")
        index, faults = None, []
        try:
            index = parse_index(read_text(index_name), index_name)
        except FileNotFoundError:
            pass  # foreign shards have none
        except ValueError as error:
            faults.append(str(error))
        with _open_tar(folder, shard) as file:
            faults += find_faults(file, listed[shard], said=index, vocab_size=vocab_size)
        return [f"{shard}: {fault}" for fault in faults]

    present = {shard: tars[shard] for shard in listed if shard in tars}
    found = _over_shards(check, present, title="verify", num_threads=num_threads)
    faults = [fault for shard_faults in found for fault in shard_faults]
    faults += [f"{shard}: listed in the manifest, but there is no {shard}.tar" for shard in listed if shard not in tars]
    return faults + [f"{shard}: {shard}.tar is not listed in the manifest" for shard in tars if shard not in listed]


def _read_vocab_size(folder: str) -> int | None:
    """The size of the vocabulary, if the dataset's provenance says it."""
    try:
        values = read_object(join_uri(folder, PROVENANCE_NAME))
        return int(values["dataset"]["vocab_size"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def find_faults(
    file: BinaryIO, entry: ManifestEntry, *, said: ShardIndex | None = None, vocab_size: int | None = None
) -> Iterator[str]:
    """Check an open tar against its manifest and its index, and for what is wrong within it.

    Args:
        file: the tar, seekable.
        entry: its line of the manifest.
        said: the index beside it, if any.
        vocab_size: tokens must be below this; None: unknown.
    """
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
    if said is not None and said != index:
        yield f"its index does not fit it{_first_difference(said, index)}"
    if not index.ends_properly:
        yield "it has no end marker: the tar is cut off"
    if index.records is not None:
        faults = list(_record_faults(file, index.records, index.num_sequences, vocab_size))
    else:
        faults = _episode_faults(file, index.episodes) if index.episodes else _member_faults(index)
    yield from faults[:_MAX_FAULTS]
    if len(faults) > _MAX_FAULTS:
        yield f"{len(faults) - _MAX_FAULTS:,} more faults of this kind"


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


def _episode_faults(file: BinaryIO, episodes: tuple[EpisodeSpans, ...]) -> list[str]:
    """Find episodes that appear twice, lack arrays, have empty or foreign members, or arrays of another length."""
    faults = []
    counts = Counter(episode.key for episode in episodes)
    faults += [f"episode '{key}' appears {count} times" for key, count in counts.items() if count > 1]
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
    return faults


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


def _member_faults(index: ShardIndex) -> list[str]:
    """Find samples with fewer or more members than most samples of the shard, repeated keys, and empty members."""
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
    faults += [f"sample key '{key}' appears {count} times" for key, count in counts.items() if count > 1]
    faults += [
        f"member '{key}.{suffix}' is empty"
        for key, members in index.samples
        for suffix, span in members.items()
        if not span.size
    ]
    return faults


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
