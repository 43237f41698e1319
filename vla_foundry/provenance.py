"""Record what made a dataset or a run: package versions and the commit of the source tree, but not who and where."""

import os
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import vla_foundry

_GIT_SECONDS = 20


def read_package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def read_all_versions() -> dict[str, str]:
    """Return the versions of all installed packages, by name."""
    found = {str(package.name).lower(): package.version for package in metadata.distributions() if package.name}
    return dict(sorted(found.items()))


def read_git_commit() -> str | None:
    """Return the commit of the source tree; None if the package is not run from one, or git is missing."""
    return _run_git("rev-parse", "HEAD") or None


def has_uncommitted_changes(path: str = ".") -> bool | None:
    """Return True if files below `path` in the source tree differ from its commit; None without git."""
    status = _run_git("status", "--porcelain", "--", path)
    return None if status is None else bool(status)


def hide_home(text: str) -> str:
    """Replace the path of the user's home by `~`, which is expanded again in every path of a config."""
    home = os.path.expanduser("~").rstrip("/").removeprefix("~")  # "~" for a user without a home
    return re.sub(rf"(?<![\w/.-]){re.escape(home)}(/|(?![\w.-]))", "~/", text) if home else text


def hide_folder(path: str) -> str:
    """Return a path, or only its last folder and its name if it is one of this machine's; a URI stays whole."""
    return path if "://" in path else "/".join(Path(path).parts[-2:])


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
