"""Import users' modules that register models, data types and the like, before anything is parsed."""

import importlib
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

ENTRY_POINT_GROUP = "vla_foundry.plugins"
# those that users named so far; processes that are spawned have to import them again
_named: list[str] = []


def named_plugins() -> tuple[str, ...]:
    """The plug-ins that users named so far in this process."""
    return tuple(dict.fromkeys(_named))


def import_installed_plugins() -> None:
    """Import the plug-ins that installed packages announce as entry points.

    Raises:
        ValueError: one can not be imported; the message names the package.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        owner = f" of the package {entry.dist.name}" if entry.dist is not None else ""
        _import(entry.module, f"The plug-in {entry.value}{owner}")


def import_plugins(modules: Iterable[str], origin: str) -> None:
    """Import the plug-ins that a user names; the working directory is searched too.

    Args:
        modules: dotted names.
        origin: where they are named, for messages.

    Raises:
        ValueError: one does not exist or can not be imported.
    """
    for module in modules:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        _import(module, f"{origin}: the plug-in {module}")
        _named.append(module)


def _import(module: str, what: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ValueError(
                f"{what} was not found. Give a module that Python can import, as my_package.my_module."
            ) from None
        raise ValueError(f"{what} needs the module {error.name}, which is not installed.") from error
    except (ImportError, SyntaxError, TypeError) as error:
        raise ValueError(f"{what} can not be imported: {error}.") from error
