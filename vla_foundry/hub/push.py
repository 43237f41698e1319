"""Publish a run or a dataset on the Hugging Face hub, in one commit."""

import json
import tempfile
from pathlib import Path

from vla_foundry.hub.card import write_card
from vla_foundry.hub.cleaning import find_private, read_secrets
from vla_foundry.hub.content import Content, collect
from vla_foundry.params.commands.sharing import HubPushParams
from vla_foundry.parsing import parse_object
from vla_foundry.progress import say
from vla_foundry.run_folder import PASSPORT_NAME
from vla_foundry.storage.hub import named_errors
from vla_foundry.storage.local import name_errors, size_and_sha256

CARD_NAME = "README.md"
PASSPORT_VERSION = 1
_MAIN = "main"


def push(params: HubPushParams) -> str:
    """Publish a run or a dataset: what is large first, so that a killed upload continues, then the commit.

    Returns:
        Where it is: hf://[datasets/]ORG/NAME@COMMIT.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source is incomplete or holds a secret, or the hub refuses it.
    """
    with tempfile.TemporaryDirectory(prefix="vla_foundry_push_") as scratch, name_errors(scratch):
        content = collect(params.source, Path(scratch), max_shard_gb=params.max_shard_gb)
        # a passport that came with a pulled dataset is made anew
        files = {name: path for name, path in content.files.items() if name != PASSPORT_NAME}
        if not (content.kind == "lerobot" and CARD_NAME in files):
            files[CARD_NAME] = Path(scratch, CARD_NAME)
            files[CARD_NAME].write_text(write_card(content, params), encoding="utf-8")
        passport = Path(scratch, PASSPORT_NAME)
        passport.write_text(_write_passport(files, content.hashes), encoding="utf-8")
        files[PASSPORT_NAME] = passport
        if params.dry_run:
            for name, path in files.items():
                say(f"{path.stat().st_size:>14,}  {name}")
            say(files[CARD_NAME].read_text(encoding="utf-8"))
            return f"hf://{_prefix(content)}{params.repo} (dry run: nothing was sent)"
        return f"hf://{_prefix(content)}{params.repo}@{_commit(content, files, params)}"


def _prefix(content: Content) -> str:
    return "datasets/" if content.repository_type == "dataset" else ""


def _write_passport(files: dict[str, Path], hashes: dict[str, tuple[int, str]]) -> str:
    """Return {"files": {name: [bytes, SHA-256]}} of all files but the card, which may be edited.

    Args:
        hashes: those that are known.

    Raises:
        ValueError: a file holds what must not be published.
    """
    secrets, listed = read_secrets(), {}
    for name, path in sorted(files.items()):
        found = find_private(name, path, secrets)
        if found is not None:
            raise ValueError(f"{path} holds {found}, so nothing was published. Remove it from the file.")
        if name != CARD_NAME:
            listed[name] = hashes.get(name) or size_and_sha256(path)
    return json.dumps({"version": PASSPORT_VERSION, "files": listed}, indent=1) + "\n"


def _commit(content: Content, files: dict[str, Path], params: HubPushParams) -> str:
    """Send the files, and take away those of the last push that are gone; return the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import BadRequestError

    api, kind = HfApi(), content.repository_type
    with named_errors(f"hf://{_prefix(content)}{params.repo}"):
        if params.revision == _MAIN:
            api.create_repo(params.repo, repo_type=kind, private=params.private, exist_ok=True)
        elif not _has_revision(params, kind):
            raise ValueError(
                f"{params.repo} has no revision '{params.revision}', so nothing was published. Push without "
                "--revision, or make the branch first (hf repos branch create)."
            )
        gone = _list_published(params, kind) - set(files)
        operations = [
            *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
            *(CommitOperationDelete(name) for name in sorted(gone)),
        ]
        size = sum(path.stat().st_size for path in files.values())
        say(f"{len(files)} files, {size / 1e6:,.1f} MB to {params.repo}; what is there already is not sent again")
        message = params.message or f"{content.kind} {Path(params.source).resolve().name}"
        try:
            done = api.create_commit(
                params.repo, operations, commit_message=message, repo_type=kind, revision=params.revision
            )
        except (RuntimeError, BadRequestError) as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"{params.repo} was not changed: {' '.join(str(cause).split())}. Run the command again to go on."
            ) from error
    return str(done.oid)


def _has_revision(params: HubPushParams, kind: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().repo_info(params.repo, repo_type=kind, revision=params.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return False
    return True


def _list_published(params: HubPushParams, kind: str) -> set[str]:
    """Return the files of the last push to the repository, those that are still there."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    repo, revision = params.repo, params.revision
    try:
        path = hf_hub_download(repo, PASSPORT_NAME, repo_type=kind, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return set()
    listed = parse_object(Path(path).read_bytes(), PASSPORT_NAME).get("files")
    there = set(HfApi().list_repo_files(repo, repo_type=kind, revision=revision))
    return {name for name in listed if name in there} if isinstance(listed, dict) else set()
