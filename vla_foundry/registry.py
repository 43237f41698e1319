"""Look up objects by the name typed in a config or on the command line."""

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")
E = TypeVar("E")


def unknown_name_message(
    what: str, name: object, known: list[str], *, fault: str = "is unknown", listed_as: str = "Registered"
) -> str:
    """Return one line saying that `name` is unknown, with the nearest known name and all known names.

    Args:
        what: what the name is of, as the user types it.
        name: the name.
        known: the known names.
        fault: what is wrong with it.
        listed_as: what introduces the known names.
    """
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return f"{what} '{name}' {fault}.{hint} {listed_as}: {', '.join(known) or 'none'}."


class Registry(Generic[T]):
    """Map names to objects.

    No list holds the names that come with the package. When someone asks for a name that is not registered yet, the
    source files of `package` are searched, once, for lines such as `@register_model("transformer")`, and the module
    with that name is imported. So a new file registers itself, and only what is used is imported.

    Args:
        what: the config path or concept that a name belongs to, as the user types it (`model.type`).
        package: where to search, with its subpackages.
        decorator: the function that registers there, always called with the name as a literal.
    """

    def __init__(self, what: str, *, package: str, decorator: str) -> None:
        self.what = what
        self._package = package
        self._line = re.compile(rf"^@{decorator}\(\s*[\"']([^\"']+)[\"']", re.MULTILINE)
        self._entries: dict[str, Any] = {}
        # {name: module} found in the source files; None: not searched yet
        self._modules: dict[str, str] | None = None

    def register(self, name: str) -> Callable[[E], E]:
        """Return a decorator that registers its argument as `name`.

        Raises:
            ValueError: another object is already registered as `name`.
        """

        def decorate(entry: E) -> E:
            if name in self._entries and self._entries[name] is not entry:
                raise ValueError(f"{self.what} '{name}' is registered twice. Choose another name.")
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> T:
        """Return the object registered as `name`, importing its module if necessary.

        Raises:
            ValueError: the name is unknown; the message gives the nearest name and all names.
        """
        if name not in self._entries and name in self._find_modules():
            importlib.import_module(self._find_modules()[name])
        if name not in self._entries:
            raise ValueError(unknown_name_message(self.what, name, self.names()))
        return self._entries[name]

    def names(self) -> list[str]:
        """Return all names, sorted, without importing anything."""
        return sorted(self._entries.keys() | self._find_modules().keys())

    def _find_modules(self) -> dict[str, str]:
        if self._modules is None:
            spec = find_spec(self._package)
            self._modules = {}
            for root in map(Path, (spec.submodule_search_locations or []) if spec is not None else []):
                for file in sorted(root.rglob("*.py")):
                    parts = file.relative_to(root).with_suffix("").parts
                    module = ".".join((self._package, *parts)).removesuffix(".__init__")
                    names = self._line.findall(file.read_text(encoding="utf-8"))
                    self._modules.update(dict.fromkeys(names, module))
        return self._modules


def import_lazily(package: str, modules: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose public names are imported when they are first used.

    Args:
        modules: public name -> module that defines it.
    """

    def get_attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(modules[name]), name)

    # notebooks complete from this list
    return get_attribute, lambda: sorted(vars(sys.modules[package]).keys() | modules.keys())


def summarize_names(names: Iterable[str], limit: int = 5) -> str:
    """Join names, with layer numbers as `*` and at most `limit` different ones."""
    patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    return ", ".join(patterns[:limit]) + (f" and {len(patterns) - limit} more" if len(patterns) > limit else "")


def match_names(patterns: Iterable[str], names: Collection[str], path: str, what: str) -> list[str]:
    """Return the names that match any pattern, in their order.

    Args:
        patterns: patterns as of file names: `*.attention.*`.
        names: dotted names of parts of a model.
        path: config path of the patterns, for messages.
        what: what the names are, for messages.

    Raises:
        ValueError: a pattern matches no name.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{path}: '{pattern}' matches no {what}. Names are such as {summarize_names(names, 8)}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
