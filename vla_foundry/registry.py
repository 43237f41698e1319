"""The one registry class: a name typed in a config or on the command line -> the object that serves it."""

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


def unknown_name_message(what: str, name: object, known: list[str]) -> str:
    """One line that says `name` is unknown, the nearest known name, and all known names."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return f"{what} '{name}' is unknown.{hint} Registered: {', '.join(known) or 'none'}."


class Registry(Generic[T]):
    """Map names to objects.

    Args:
        what: the config path or concept that a name belongs to, as the user types it (`model.type`).
        lazy: name -> module that registers it. Such a module is imported the first time its name is asked for.
    """

    def __init__(self, what: str, lazy: Mapping[str, str] | None = None) -> None:
        self.what = what
        self._lazy = dict(lazy or {})
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument as `name`.

        Raises:
            ValueError: `name` is registered already, to another object.
        """

        def decorate(entry: T) -> T:
            if name in self._entries and self._entries[name] is not entry:
                raise ValueError(f"{self.what} '{name}' is registered twice. Choose another name.")
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> T:
        """Return the object registered as `name`, importing its module if need be.

        Raises:
            ValueError: no such name; the message holds the nearest one and all names.
        """
        if name not in self._entries and name in self._lazy:
            importlib.import_module(self._lazy[name])
        if name not in self._entries:
            raise ValueError(unknown_name_message(self.what, name, self.names()))
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported."""
        return sorted(self._entries.keys() | self._lazy.keys())
