"""Read and write Hugging Face repositories by huggingface_hub: `hf://[datasets/|spaces/]owner/repo[@revision]/path`."""

import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from vla_foundry.storage.local import FULL, IncompleteDownload, Listed, compile_pattern, is_pattern, replace_file

_READ_SIZE = 4 << 20


def _file_system() -> Any:
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise ValueError("hf:// needs huggingface_hub, which is not installed: uv pip install 'vla-foundry'") from None
    return HfFileSystem()


@contextmanager
def named_errors(uri: str) -> Iterator[None]:
    """Turn the hub's errors into FileNotFoundError or a one-line ValueError that names `uri`."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except OfflineModeIsEnabled:
        raise ValueError(
            f"{uri} needs the network, but HF_HUB_OFFLINE is set. Unset it, or use a local copy."
        ) from None
    except (FileNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        raise FileNotFoundError(f"{uri} does not exist, or is only visible with a token (HF_TOKEN).") from None
    except (HfHubHTTPError, HFValidationError, NotImplementedError) as error:
        raise ValueError(f"{uri}: {' '.join(str(error).split())}") from None
    except (OSError, *_client_errors()) as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
            raise  # of this machine's disk
        raise ValueError(f"{uri} cannot be reached: {' '.join(str(error).split())}") from None


def _client_errors() -> tuple[type[BaseException], ...]:
    """Return the base of the HTTP client's errors; without a network, it raises others than OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


# owner/name on the Hugging Face hub, or a legacy name without an owner
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@contextmanager
def loading_published(what: str, outcome: str = "cannot be loaded", *, name: str | None = None) -> Iterator[None]:
    """Turn all that Hugging Face's libraries raise about missing, broken or unknown files into a one-line ValueError.

    Args:
        what: the message's subject, such as "model.hf_pretrained 'owner/name'".
        outcome: what the message says of it.
        name: what is loaded, folder or name on the hub, to be fetched first: without a network the libraries themselves
            would try again for minutes.
    """
    try:
        if name is not None:
            find_published(name, fetch=True)
        yield
    except Exception as error:  # the border to libraries, which may raise anything: tokenizers raises Exception itself
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
        if isinstance(error, _client_errors()) and not isinstance(error, OSError):
            reason = f"it is not on this machine, and the hub cannot be reached ({reason})."
        elif not isinstance(error, OSError | ValueError | RuntimeError | ImportError):
            reason = f"its content is not as expected ({type(error).__name__}: {reason})."
        raise ValueError(f"{what} {outcome}: {reason}") from error


class HubStorage:
    """See vla_foundry.storage.uri.Storage."""

    def open_input(self, uri: str) -> BinaryIO:
        self.describe(uri)
        with named_errors(uri):
            return io.BufferedReader(cast(Any, _file_system().open(uri, "rb", block_size=_READ_SIZE)))

    def read_range(self, uri: str, offset: int, size: int, version: str | None = None) -> bytes:
        with named_errors(uri), _file_system().open(uri, "rb", block_size=size, cache_type="none") as file:
            file.seek(offset)
            return file.read(size)

    def describe(self, uri: str) -> Listed:
        with named_errors(uri):
            info = _file_system().info(uri)
        if info["type"] != "file":
            raise FileNotFoundError(f"{uri} is not a file.")
        return _listed(info)

    def list_entries(self, folder_or_glob: str) -> dict[str, Listed]:
        file_system = _file_system()
        with named_errors(folder_or_glob):
            if is_pattern(folder_or_glob):
                prefix, matches = compile_pattern(folder_or_glob)
                found = file_system.find(prefix.rpartition("/")[0], detail=True)
                found = {name: info for name, info in found.items() if matches(f"hf://{name}")}
            else:
                found = file_system.find(folder_or_glob, detail=True)
        files = {f"hf://{name}": _listed(info) for name, info in found.items() if info["type"] == "file"}
        if not files:
            raise FileNotFoundError(f"Nothing found at {folder_or_glob}.")
        return files

    def write_bytes(self, uri: str, data: bytes) -> None:
        self._commit(uri, data)

    def download(self, uri: str, path: str) -> None:
        size = self.describe(uri).size
        with replace_file(path) as temporary:
            with (
                named_errors(uri),
                _file_system().open(uri, "rb", block_size=0) as source,
                open(temporary, "xb") as target,
            ):
                shutil.copyfileobj(source, target, _READ_SIZE)
            if os.path.getsize(temporary) != size:
                raise IncompleteDownload(f"{uri} is truncated: {os.path.getsize(temporary)} of {size} bytes arrived.")

    def upload(self, path: str, uri: str) -> None:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is not a file.")
        self._commit(uri, path)

    def _commit(self, uri: str, path_or_bytes: str | bytes) -> None:
        from huggingface_hub import HfApi

        file_system = _file_system()
        with named_errors(uri):
            target = file_system.resolve_path(uri)
            HfApi().upload_file(
                path_or_fileobj=path_or_bytes,
                path_in_repo=target.path_in_repo,
                repo_id=target.repo_id,
                repo_type=target.repo_type,
                revision=target.revision,
            )
        file_system.invalidate_cache()

    def delete(self, uri: str) -> None:
        with named_errors(uri):
            if _file_system().exists(uri):
                _file_system().rm_file(uri)


def fetch_to_cache(uri: str) -> str:
    """Return a file or a whole folder of a repository in the hub's local cache; an interrupted download goes on."""
    from huggingface_hub import hf_hub_download, snapshot_download

    file_system = _file_system()
    with named_errors(uri):
        place = file_system.resolve_path(uri)
        options = {"repo_id": place.repo_id, "repo_type": place.repo_type, "revision": place.revision}
        if file_system.info(uri)["type"] == "file":
            return hf_hub_download(filename=place.path_in_repo, **options)
        snapshot = snapshot_download(allow_patterns=[f"{place.path_in_repo}/*"], **options)
        return os.path.join(snapshot, place.path_in_repo)


def _listed(info: dict[str, Any]) -> Listed:
    return Listed(info["size"], info.get("blob_id") or info.get("xet_hash") or "")


def find_published(name: str, *, fetch: bool = False) -> str | None:
    """Return the folder of a published model or tokenizer: the one named, or its place in the hub's cache.

    Args:
        fetch: fetch it to the cache if it is not there; see `find_snapshot`.
    """
    repository = name.removeprefix("hf://")
    if os.path.isdir(name) or _HUB_NAME.fullmatch(repository) is None:
        return name
    return find_snapshot(repository, fetch=fetch)


def find_snapshot(repository: str, *, fetch: bool) -> str | None:
    """Return the folder of a model's JSON files in the hub's local cache; None: not there.

    Args:
        repository: owner/name, or a legacy name without an owner.
        fetch: if they are not there, fetch them.

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: the hub cannot be reached.
    """
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return os.path.dirname(found)
    if not fetch:
        return None
    with named_errors(f"hf://{repository}"):
        try:
            return snapshot_download(repository, allow_patterns=["*.json", "*.jinja"])
        except LocalEntryNotFoundError:
            reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
            raise ValueError(
                f"{repository} is not a local folder, is not in the cache of Hugging Face, and {reason}. Download it "
                "where there is a network, or give a folder."
            ) from None


def list_pinned(uri: str) -> tuple[str, dict[str, tuple[str, int, tuple[str, str]]]]:
    """List files at the commit that a name stands for now.

    Returns:
        The name with the commit, and {whole name: (path below `uri`, bytes, (algorithm, digest))}; the algorithm is
        sha256, or git (SHA-1 of a git blob) for small files.
    """
    from huggingface_hub import HfApi

    file_system = _file_system()
    with named_errors(uri):
        place = file_system.resolve_path(uri)
        commit = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
        kind = "" if place.repo_type == "model" else f"{place.repo_type}s/"
        pinned = f"{kind}{place.repo_id}@{commit}"
        base = f"{pinned}/{place.path_in_repo}".rstrip("/")
        found = file_system.find(base, detail=True)
    files = {}
    for name, info in found.items():
        if info["type"] == "file":
            lfs = info.get("lfs")
            digest = ("sha256", lfs["sha256"]) if lfs else ("git", info["blob_id"])
            path = name[len(base) :].lstrip("/") or name.rpartition("/")[2]
            files[f"hf://{name}"] = (path, info["size"], digest)
    if not files:
        raise FileNotFoundError(f"Nothing found at {uri}.")
    return f"hf://{base}", files
