"""`vla-foundry data download`: copy published data to this machine, resumable, several files at a time, each checked.

A source is listed first: a repository or folder of the Hugging Face hub at one commit, an s3:// prefix, a directory
listing of a web server, a manifest with its shards, a list of URLs, or a single file. A file arrives as `.<name>.part`,
where the next attempt goes on if the source has not changed. `<output>/.download.jsonl` records complete files.
"""

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.preprocessing import DownloadParams
from vla_foundry.parsing import parse_record
from vla_foundry.progress import say, show_progress
from vla_foundry.run_folder import lock_folder
from vla_foundry.shards import MANIFEST_NAME, parse_manifest
from vla_foundry.storage.http import list_links
from vla_foundry.storage.hub import list_pinned
from vla_foundry.storage.local import hash_file, name_errors
from vla_foundry.storage.uri import (
    describe,
    exists,
    folder_of_names,
    is_remote,
    join_uri,
    list_visible,
    name_of,
    open_input,
    parent_uri,
    read_text,
)

RECORD_NAME = ".download.jsonl"
# beside a manifest
_COMPANIONS = ("stats.json", "robotics.json", "preprocessing_config.yaml", "processing_metadata.json")
_CHUNK_SIZE = 4 << 20
# what a web server sends is written this often; a store is asked for whole chunks
_WEB_CHUNK_SIZE = 256 << 10
_LBM = "https://vla-foundry.s3.amazonaws.com/datasets/lbm_sim/preprocessed"
_LBM_RAW = "https://tri-ml-public.s3.amazonaws.com/datasets/lbm-eval-v1.1-sim-training-data"
PRESETS = {"dclm": "hf://datasets/mlfoundations/dclm-baseline-1.0", "datacompdr": "hf://datasets/apple/DataCompDR-1B"}
# the tasks that the paper evaluates
LBM_TASKS = (
    *("BimanualPlaceAppleFromBowlIntoBin", "BimanualPlaceFruitFromBowlIntoBin", "BimanualPutRedBellPepperInBin"),
    *("BimanualPutSpatulaOnPlateFromDryingRack", "BimanualPutSpatulaOnPlateFromTable"),
    *("BimanualStackPlatesOnTableFromDryingRack", "BimanualStoreCerealBoxUnderShelf", "PlaceCupByCoaster"),
    *("PushCoasterToCenterOfTable", "PushCoasterToMug", "PutBananaOnSaucer", "PutKiwiInCenterOfTable"),
    *("PutMugOnSaucer", "PutSpatulaInUtensilCrock", "TurnCupUpsideDown", "TurnMugRightsideUp"),
    *("BimanualPlaceAvocadoFromBowlIntoBin", "BimanualPutSpatulaOnPlateFromUtensilCrock", "PutMugInCenterOfTable"),
)
_HEX = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Remote:
    """A file to download."""

    uri: str
    # relative path below the output
    path: str
    # bytes; None: not asked for yet
    size: int | None = None
    # changes with the content; None: not asked for yet
    version: str | None = None
    # name of the algorithm and hexadecimal digest: sha256, md5, or git (SHA-1 of a blob); None: unknown
    digest: tuple[str, str] | None = None


def list_sources(params: DownloadParams) -> list[Remote]:
    """Return the files of all sources that match the patterns, sorted by path.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a name leads out of the output, or two files have one path.
    """
    found = [file for source, folder in _name_sources(params) for file in _list_source(source, folder)]
    if params.url_list is not None:
        found += _read_url_list(params.url_list)
    if params.pattern:
        found = [file for file in found if any(fnmatchcase(file.path, pattern) for pattern in params.pattern)]
    if not found:
        raise FileNotFoundError("Nothing to download: no file of the sources matches.")
    by_path: dict[str, Remote] = {}
    for file in found:
        _check_path(file)
        other = by_path.setdefault(file.path, file)
        if other.uri != file.uri:
            raise ValueError(f"{other.uri} and {file.uri} would both become {file.path}. Download one elsewhere.")
    folder = next((path for path in by_path for parent in Path(path).parents if str(parent) in by_path), None)
    if folder is not None:
        raise ValueError(f"{by_path[folder].uri} lies below another file, {Path(folder).parent}.")
    return [by_path[path] for path in sorted(by_path)]


def _name_sources(params: DownloadParams) -> Iterator[tuple[str, str]]:
    """Yield each source and the folder below the output that it goes to."""
    yield from ((source, "") for source in params.source)
    if params.s3_path is not None:
        yield params.s3_path, ""
    if params.preset in PRESETS:
        yield PRESETS[params.preset], ""
    tasks = LBM_TASKS if params.all else params.task
    for task in tasks:
        if params.raw:
            yield f"{_LBM_RAW}/{task}.tar", ""
        else:
            layout = "episodes" if params.episodes else "shards"
            yield f"{_LBM}/{params.version}/{task}/{layout}/{MANIFEST_NAME}", f"{task}/{layout}"


def _list_source(source: str, folder: str) -> Iterator[Remote]:
    inside = f"{folder}/" if folder else ""
    is_web = source.startswith(("http://", "https://"))
    if name_of(source) == MANIFEST_NAME:
        yield from _list_manifest(source, inside)
    elif source.startswith("hf://"):
        base, files = list_pinned(source)
        yield from (
            Remote(uri, inside + path, size, digest[1] if digest else "", digest)
            for uri, (path, size, digest) in files.items()
        )
        say(f"{source} is {base}")
    elif is_web and source.endswith("/"):
        yield from (Remote(uri, inside + _path_below(uri, source)) for uri in list_links(source))
    elif is_web:
        yield Remote(source, inside + _file_name(source))
    else:
        links = [] if is_remote(source) else Path(source).rglob("*")
        broken = next((path for path in links if path.is_symlink() and not os.path.exists(path)), None)
        if broken is not None:
            raise FileNotFoundError(f"{broken} is a link to nothing. Repair it, or take it away.")
        base = folder_of_names(source)
        for uri, listed in list_visible(source).items():
            etag = str(listed.version).strip('"')
            digest = ("md5", etag) if source.startswith("s3://") and re.fullmatch(r"[0-9a-f]{32}", etag) else None
            path = uri[len(base) :] if uri.startswith(base) else name_of(uri)
            yield Remote(uri, inside + path, listed.size, str(listed.version), digest)


def _list_manifest(uri: str, inside: str) -> Iterator[Remote]:
    folder = parent_uri(uri)
    yield Remote(uri, inside + MANIFEST_NAME)
    yield from (Remote(place, inside + name) for name in _COMPANIONS if exists(place := join_uri(folder, name)))
    for entry in parse_manifest(read_text(uri), uri):
        name = f"{entry.shard}.tar"
        digest = None if entry.sha256 is None else ("sha256", entry.sha256)
        yield Remote(join_uri(folder, name), inside + name, digest=digest)


def _read_url_list(path: str) -> Iterator[Remote]:
    """Yield the files of a list: a URL on each line, and after it a SHA-256, if known."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2 or (len(words) == 2 and not _HEX.fullmatch(words[1])):
            raise ValueError(f"{path} line {number}: write a URL, and after it nothing or a SHA-256.")
        yield Remote(words[0], _file_name(words[0]), digest=("sha256", words[1].lower()) if words[1:] else None)


def _path_below(uri: str, folder: str) -> str:
    return unquote(urlsplit(uri).path)[len(unquote(urlsplit(folder).path)) :]


def _file_name(uri: str) -> str:
    return unquote(urlsplit(uri).path).rpartition("/")[2]


def _check_path(file: Remote) -> None:
    parts = file.path.split("/")
    if any(part in ("", ".", "..") or part.startswith(".download") for part in parts) or re.search(
        r"[\\\x00-\x1f\x7f]", file.path
    ):
        raise ValueError(f"{file.uri}: '{file.path}' is not a path below the output.")


class _Failed(Exception):
    """Another file failed, so this one stops."""


class Downloader:
    """Downloads files to a folder."""

    def __init__(self, output: Path, *, verify: bool, advance: Callable[[int], None]) -> None:
        self._output, self._verify, self._advance = output, verify, advance
        self._lock, self._stop = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """Make downloads end soon."""
        self._stop.set()

    def download(self, file: Remote) -> None:
        """Download a file, from where its last attempt ended.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: its size or hash is wrong; nothing is kept then.
        """
        assert file.size is not None
        target = self._output / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(f"{file.uri}\0{file.size}\0{file.version}".encode()).hexdigest()[:12]
        part = target.with_name(f".{target.name[:200]}.{key}.part")
        for other in target.parent.glob(f".{_escape(target.name[:200])}.*.part"):
            if other != part:
                other.unlink()
        self._fetch(file, part)
        if part.stat().st_size != file.size:
            size = part.stat().st_size
            part.unlink()
            raise ValueError(f"{file.uri} has {size} bytes instead of {file.size}. Run again.")
        if self._verify and file.digest is not None:
            algorithm, wanted = file.digest
            if (found := hash_file(part, algorithm)) != wanted:
                part.unlink()
                raise ValueError(f"{file.uri} arrived damaged: its {algorithm} is {found}, not {wanted}. Run again.")
        part.replace(target)
        line = json.dumps({"path": file.path, "size": file.size, "version": file.version})
        path = self._output / RECORD_NAME
        with self._lock, name_errors(path), path.open("a", encoding="utf-8") as record:
            record.write(line + "\n")

    def _fetch(self, file: Remote, part: Path) -> None:
        assert file.size is not None
        with name_errors(part), open(part, "ab") as target:
            done = target.tell()
            if done >= file.size:
                return
            self._advance(done)
            size = _WEB_CHUNK_SIZE if file.uri.startswith("http") else _CHUNK_SIZE
            with closing(open_input(file.uri)) as source:
                source.seek(done)
                # what has arrived is kept, even if the rest of a chunk does not
                read = source.read1 if isinstance(source, io.BufferedReader) else source.read
                while done < file.size and (chunk := read(min(size, file.size - done))):
                    if self._stop.is_set():
                        raise _Failed
                    target.write(chunk)
                    done += len(chunk)
                    self._advance(len(chunk))


def _escape(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def read_record(output: Path) -> dict[str, tuple[int, str]]:
    """Return the size and version of each file that was downloaded completely; a line cut by a kill is skipped."""
    path, found = output / RECORD_NAME, {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], start=1):
        try:
            values = parse_record(line, f"{path} line {number}")
            found[str(values["path"])] = (values["size"], values["version"])
        except (ValueError, TypeError, KeyError):
            continue
    return found


def download(params: DownloadParams) -> list[Remote]:
    """Download what the sources hold to the output; return the files that were not there already.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: see `list_sources` and `Downloader.download`; files that are complete stay.
    """
    files = list_sources(params)
    with ThreadPoolExecutor(params.num_workers) as pool:
        files = list(pool.map(_describe, files))
    output = Path(params.folder)
    known = {} if params.force else read_record(output)
    left = [file for file in files if not _is_there(file, output, known)]
    sizes = [file.size or 0 for file in left]
    say(f"{len(files)} files, {_count(file.size or 0 for file in files)}; {len(left)} to download, {_count(sizes)}")
    if params.dry_run or params.list:
        for file in files:
            say(f"{file.size:>15,} {file.path}")
        return left
    output.mkdir(parents=True, exist_ok=True)
    with lock_folder(output, what="download", flag="--output"), show_progress("download", sum(sizes), 0) as advance:
        lock = threading.Lock()

        def report(size: int) -> None:
            with lock:
                advance(size)

        _download_all(left, Downloader(output, verify=params.verify, advance=report), params.num_workers)
    return left


def _download_all(files: Iterable[Remote], downloader: Downloader, num_workers: int) -> None:
    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(downloader.download, file) for file in files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            downloader.stop()
            pool.shutdown(cancel_futures=True)
    errors = [error for each in futures if not each.cancelled() and (error := each.exception()) is not None]
    for error in errors:
        if not isinstance(error, _Failed):
            raise error


def _describe(file: Remote) -> Remote:
    if file.size is not None:
        return file
    listed = describe(file.uri)
    return replace(file, size=listed.size, version=str(listed.version))


def _is_there(file: Remote, output: Path, known: dict[str, tuple[int, str]]) -> bool:
    path = output / file.path
    return known.get(file.path) == (file.size, file.version) and path.is_file() and path.stat().st_size == file.size


def _count(sizes: Iterable[int]) -> str:
    size = sum(sizes)
    power = min(4, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def main(argv: list[str]) -> None:
    """Run `vla-foundry data download`."""
    download(parse_command(DownloadParams, argv, prog="vla-foundry data download", positional=("source",)))
