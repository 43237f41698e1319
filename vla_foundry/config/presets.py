"""Where config files are: the presets that come with the package, and files that a user names."""

import os
import posixpath
from pathlib import Path

from vla_foundry.storage.uri import is_remote

_PREFIXES = ("vla_foundry/config_presets/", "config_presets/")


def preset_root() -> Path:
    """The folder of presets: within an installed package, or beside the package in a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "config_presets"
    return installed if installed.is_dir() else package.parent / "config_presets"


def display_name(location: str) -> str:
    """A config file as a user would name it: presets begin with `config_presets/`, others are left as they are."""
    root = f"{preset_root()}{os.sep}"
    return f"config_presets/{location.removeprefix(root)}" if location.startswith(root) else location


def find_config(name: str, folder: str | None = None) -> str:
    """Find the config file that a user named.

    Args:
        name: a path or URI. A leading `config_presets/` or `vla_foundry/config_presets/` names the preset folder.
        folder: the folder of the file that includes it; None: it stands on the command line, so that the working
            directory is searched and then the preset folder.

    Raises:
        FileNotFoundError: it is in none of these places.
    """
    if is_remote(name):
        return name
    if folder is not None and is_remote(folder):
        scheme, _, place = folder.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(place, name))}"
    path = Path(name).expanduser()
    places = [path if path.is_absolute() else Path(folder or ".") / path]
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    if prefix is not None:
        places.append(preset_root() / name.removeprefix(prefix))
    elif folder is None and not path.is_absolute():
        places.append(preset_root() / path)
    for place in places:
        if place.is_file():
            return os.path.normpath(place)
    searched = " nor ".join(str(place) for place in places)
    raise FileNotFoundError(f"Config file '{name}' was not found: there is no {searched}.")
