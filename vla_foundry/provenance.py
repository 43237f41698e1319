"""What made a dataset or a run: versions of packages, and the commit of the source tree this package runs from."""

import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import vla_foundry

_GIT_SECONDS = 20


def read_package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def read_git_commit() -> str | None:
    """The commit of the source tree; None if the package is installed elsewhere, or there is no git."""
    return _run_git("rev-parse", "HEAD") or None


def has_uncommitted_changes(path: str = ".") -> bool | None:
    """True if files below `path` of the source tree differ from its commit; None if there is no git."""
    status = _run_git("status", "--porcelain", "--", path)
    return None if status is None else bool(status)


def _run_git(*words: str) -> str | None:
    root = Path(vla_foundry.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
