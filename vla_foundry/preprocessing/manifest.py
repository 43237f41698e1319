"""`vla-foundry manifest build|verify DIR`: describe shards that others wrote, check a dataset against its manifest."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, BinaryIO

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.preprocessing import ManifestBuildParams, ManifestVerifyParams
from vla_foundry.preprocessing.shard_checks import ShardExpectation, ends_properly, find_faults
from vla_foundry.progress import say, show_progress
from vla_foundry.registry import unknown_name_message
from vla_foundry.shards import (
    MANIFEST_NAME,
    PROVENANCE_NAME,
    ManifestEntry,
    format_index,
    format_manifest,
    index_shard,
    parse_index,
    parse_manifest,
    sha256_of,
)
from vla_foundry.storage.uri import (
    download,
    exists,
    is_remote,
    join_uri,
    list_relative,
    open_input,
    read_text,
    write_text,
)


def main(argv: list[str]) -> None:
    """Run `vla-foundry manifest`.

    Args:
        argv: `build` or `verify`, the folder, flags.

    Raises:
        ValueError: what the user can fix; faults of a dataset, which are printed before.
        FileNotFoundError: there is no such folder, or it has no manifest.
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
        raise FileNotFoundError(
            f"{name} does not exist. Write it with `vla-foundry manifest build {folder}`."
        ) from None


def _list_tars(folder: str) -> dict[str, int]:
    """{name of a shard: bytes of its tar} of all tars below a folder."""
    return {name.removesuffix(".tar"): size for name, size in list_relative(folder).items() if name.endswith(".tar")}


@contextmanager
def _open_tar(folder: str, shard: str) -> Iterator[BinaryIO]:
    """Open a tar for reading all of it; a remote one is copied first."""
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

    A manifest that is there already keeps its order, and gains what it lacks.

    Returns:
        The manifest, and whether it was written (False: it said all this already).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no tars, a tar can not be read, or a manifest is there that says something else.
    """
    tars = _list_tars(folder)
    if not tars:
        raise ValueError(f"{folder} has no .tar files to list in a manifest.")
    name = join_uri(folder, MANIFEST_NAME)
    said = {} if overwrite or not exists(name) else {entry.shard: entry for entry in _read_manifest(folder)}

    def describe(shard: str) -> ManifestEntry:
        with _open_tar(folder, shard) as file:
            try:
                index = index_shard(file)
            except ValueError as error:
                raise ValueError(f"{shard}: {error}. Make the shard again, or take it away.") from None
            if not ends_properly(file, index):
                raise ValueError(f"{shard}: the tar is cut off. Make the shard again, or take it away.")
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
        raise ValueError(f"{name} lists shard '{missing[0]}', which is not there. Replace it with --overwrite true.")
    found = {entry.shard: entry for entry in _over_shards(describe, tars, title="index", num_threads=num_threads)}
    entries = [found[shard] for shard in said or found]
    if entries == list(said.values()):
        return entries, False
    write_text(name, format_manifest(entries))
    return entries, True


def _check_agrees(name: str, said: ManifestEntry | None, found: ManifestEntry) -> None:
    """Refuse to change what a manifest says; what it leaves open may be filled in."""
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

    Checked are: shards that are missing, or not listed; size, SHA-256 and number of samples against the manifest; the
    index against the tar; tars that are cut off; samples with other members than the rest of the shard; token records.

    Raises:
        FileNotFoundError: there is no such folder, or it has no manifest.
        ValueError: the manifest can not be read.
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
        expected = ShardExpectation(entry=listed[shard], index=index, vocab_size=vocab_size)
        with _open_tar(folder, shard) as file:
            faults += find_faults(file, expected)
        return [f"{shard}: {fault}" for fault in faults]

    present = {shard: tars[shard] for shard in listed if shard in tars}
    found = _over_shards(check, present, title="verify", num_threads=num_threads)
    faults = [fault for shard_faults in found for fault in shard_faults]
    faults += [f"{shard}: listed in the manifest, but there is no {shard}.tar" for shard in listed if shard not in tars]
    return faults + [f"{shard}: {shard}.tar is not listed in the manifest" for shard in tars if shard not in listed]


def _read_vocab_size(folder: str) -> int | None:
    """The size of the vocabulary, if the dataset's provenance says it."""
    try:
        values = json.loads(read_text(join_uri(folder, PROVENANCE_NAME)))
        return int(values["dataset"]["vocab_size"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
