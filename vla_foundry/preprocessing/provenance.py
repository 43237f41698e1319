"""What made a dataset: versions, commit, params and source. No user, host, time or absolute path is recorded."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import vla_foundry

_PACKAGES = ("av", "h5py", "numpy", "pillow", "pyarrow", "ray", "tokenizers", "torch", "torchvision", "transformers")


def read_versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that may shape the output."""
    versions = {"python": platform.python_version(), "vla_foundry": vla_foundry.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def read_git_commit() -> str | None:
    """The commit of the source tree this package runs from; None if it is installed, or there is no git."""
    root = Path(vla_foundry.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def digest_of(values: Any) -> str:
    """SHA-256 of the canonical JSON of `values`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def format_provenance(plan: Mapping[str, Any], dataset: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """Format provenance.json.

    Args:
        plan: what determines the dataset's bytes (command, params, source, ...); a later run is compared with it.
        dataset: facts that readers rely on (kind, vocab_size, eos_token_id, seq_len, ...).
        counts: what went in, came out and was skipped.
    """
    values = {
        "dataset": dict(dataset),
        "plan": dict(plan),
        "counts": dict(counts),
        "versions": read_versions(),
        "git_commit": read_git_commit(),
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
