"""What made a run: versions, commit and command, without names of users or machines."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import vla_foundry
from vla_foundry.run_folder import PROVENANCE_NAME
from vla_foundry.world import World

_PACKAGES = ("vla-foundry", "torch", "numpy", "transformers", "tokenizers", "safetensors", "webdataset")


def record_start(run_folder: Path, world: World, first_step: int) -> None:
    """Append this start of the run to provenance.json."""
    path = run_folder / PROVENANCE_NAME
    record = json.loads(path.read_text()) if path.is_file() else {"starts": []}
    record["starts"].append(_describe_start(world, first_step))
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


def _describe_start(world: World, first_step: int) -> dict[str, Any]:
    on_gpu = world.device.startswith("cuda")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_step": first_step,
        "command": [word.replace(str(Path.home()), "~") for word in sys.argv],
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version_of(name)) is not None},
        **_describe_commit(),
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_commit() -> dict[str, Any]:
    """The commit of the source tree, and whether files differ from it; nothing outside a repository."""
    source = Path(vla_foundry.__file__).parents[1]
    if not (source / ".git").exists():
        return {}
    commit = _run_git(source, "rev-parse", "HEAD")
    return {"commit": commit, "is_dirty": bool(_run_git(source, "status", "--porcelain"))} if commit else {}


def _run_git(folder: Path, *words: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
