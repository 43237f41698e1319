"""What made a run: versions, commit and command, without names of users or machines."""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vla_foundry.provenance import has_uncommitted_changes, read_git_commit, read_package_versions
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
        "packages": read_package_versions(_PACKAGES),
        **_describe_commit(),
    }


def _describe_commit() -> dict[str, Any]:
    """The commit of the source tree, and whether files differ from it; nothing outside a repository."""
    commit = read_git_commit()
    return {} if commit is None else {"commit": commit, "is_dirty": bool(has_uncommitted_changes())}
