"""Download a run or a dataset from the Hugging Face hub, and check every file."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vla_foundry.hub.push import CARD_NAME
from vla_foundry.params.commands.sharing import HubPullParams
from vla_foundry.parsing import parse_object
from vla_foundry.run_folder import PASSPORT_NAME, hold_lock
from vla_foundry.storage.hub import named_errors
from vla_foundry.storage.local import hash_file, name_errors

# huggingface_hub's own notes about a download
_CACHE = ".cache"


def pull(params: HubPullParams) -> Path:
    """Download a repository at one commit; the folder appears once all of it is there and checked.

    Raises:
        FileNotFoundError: the repository or revision does not exist.
        ValueError: the output exists, the hub cannot be reached, or a file is damaged.
    """
    from huggingface_hub import HfApi, snapshot_download

    kind, name, revision = params.repository
    output = Path(os.path.abspath(name.partition("/")[2] if params.output is None else params.output))
    if output.exists():
        raise ValueError(f"output {output} exists. Choose another --output, or delete it.")
    aside = output.with_name(f".pulling_{output.name}")
    origin = f"hf://{'datasets/' if kind == 'dataset' else ''}{name}"
    with named_errors(f"{origin}@{revision}"):
        commit = str(HfApi().repo_info(name, repo_type=kind, revision=revision).sha)
        tree = HfApi().list_repo_tree(name, repo_type=kind, revision=commit, recursive=True)
        listed = {entry.path: entry for entry in tree if hasattr(entry, "size")}
    with _lock(aside, output), name_errors(aside), named_errors(f"{origin}@{revision}"):
        snapshot_download(name, repo_type=kind, revision=commit, local_dir=aside)
        for path in [file for file in _list_files(aside) if file not in listed]:
            (aside / path).unlink()  # of another commit, which a killed download began with
        _check(aside, listed, f"{origin}@{commit[:12]}")
        shutil.rmtree(aside / _CACHE, ignore_errors=True)
        aside.rename(output)
    return output


@contextmanager
def _lock(aside: Path, output: Path) -> Iterator[None]:
    """Hold the folder of a download; what is held goes away with it."""
    inside = aside / _CACHE
    inside.mkdir(parents=True, exist_ok=True)
    with hold_lock(inside / "lock") as file:
        if file is None or output.exists():
            raise ValueError(f"output {output} is being pulled by another process. Wait, or choose another --output.")
        yield


def _list_files(folder: Path) -> list[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in found if path.parts[0] != _CACHE]


def _check(folder: Path, listed: dict[str, Any], origin: str) -> None:
    """Compare all files with the hub's checksums, and with those of the push."""
    passport = folder / PASSPORT_NAME
    pushed = parse_object(passport.read_bytes(), PASSPORT_NAME).get("files") if passport.is_file() else {}
    if not isinstance(pushed, dict):
        raise ValueError(f"{origin}: {PASSPORT_NAME} holds no files.")
    for name, entry in listed.items():
        path = folder / name
        algorithm, digest = ("git", entry.blob_id) if entry.lfs is None else ("sha256", entry.lfs.sha256)
        if hash_file(path, algorithm) != digest:
            path.unlink()
            raise ValueError(f"{origin}: {name} arrived damaged. Run the command again to download it once more.")
    missing = sorted(pushed.keys() - listed.keys())
    for name in pushed.keys() & listed.keys() - {CARD_NAME}:
        path, lfs = folder / name, listed[name].lfs
        # a large file's hash was checked above
        digest = hash_file(path, "sha256") if lfs is None else lfs.sha256
        if [path.stat().st_size, digest] != pushed[name]:
            raise ValueError(
                f"{origin}: {name} is not the file that was published with the others ({PASSPORT_NAME}). "
                "Pull an older commit with @REVISION, or have it pushed again."
            )
    if missing:
        raise ValueError(f"{origin}: {missing[0]} is missing ({PASSPORT_NAME} lists it). Have it pushed again.")
