"""Copy the run folder to remote storage after each checkpoint, in a background thread."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from vla_foundry.provenance import hide_home
from vla_foundry.run_folder import CHECKPOINTS_FOLDER, COMPLETE_NAME
from vla_foundry.storage.uri import join_uri, upload, write_bytes

_STEP_PREFIX = "step_"
_TEXTS = (".yaml", ".json", ".txt")
# at the end of a run, a file may take this long, and as long as a slow connection takes for its bytes
_PATIENCE_SECONDS, _SLOWEST_BYTES_PER_SECOND = 120.0, 1e6


def _copy(path: Path, name: str, folder: str) -> None:
    """Copy a file into a folder, but not whose it is: configs hold paths, and TensorBoard names its files by host."""
    target = join_uri(folder, name.replace(f".{socket.gethostname()}.", ".host."))
    # COMPLETE has the SHA-256 of what a checkpoint holds
    if path.suffix in _TEXTS and not name.startswith(f"{CHECKPOINTS_FOLDER}/"):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        if (hidden := hide_home(text)) != text:
            write_bytes(target, hidden.encode("utf-8", "surrogateescape"))
            return
    upload(str(path), target)


class RemoteSync:
    """A background thread that copies new files; a failure prints one line and is retried at the next request.

    Args:
        run_folder: the folder to copy.
        remote: the folder to copy it into, under the run's name.
        say: prints a line for the user.
    """

    def __init__(self, run_folder: Path, remote: str, say: Callable[[str], None]) -> None:
        self._run_folder = run_folder
        self._target = join_uri(remote, run_folder.name)
        self._say = say
        self._copied: dict[str, tuple[int, int]] = {}
        self._wanted = threading.Event()
        self._closing = False
        self._error = ""
        # the file being copied, and when to give up waiting for it
        self._current = ("", 0.0)
        self._thread = threading.Thread(target=self._work, name="remote-sync", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Ask the thread to copy new files; do not wait."""
        self._wanted.set()

    def close(self) -> None:
        """Copy the remaining files and wait until they are copied, or until the storage hangs.

        Raises:
            ValueError: a file could not be copied.
        """
        self._closing = True
        self._wanted.set()
        while self._thread.is_alive():
            self._thread.join(0.1)
            name, deadline = self._current
            if name and time.monotonic() > deadline:
                self._error = f"{name} could not be copied (no answer; gave up)"
                self._say = lambda line: None  # what the thread still hears comes too late
                break
        if self._error:
            raise ValueError(f"The run is done, but {self._target} lacks part of it: {self._error}")

    def __enter__(self) -> "RemoteSync":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an error, which is what the user must see, warnings say what could not be copied."""
        if kind is None:
            self.close()
        elif issubclass(kind, Exception):
            with suppress(ValueError):
                self.close()

    def _work(self) -> None:
        is_last = False
        while not is_last:
            self._wanted.wait()
            self._wanted.clear()
            # read before copying: a request during this round, close() included, gets its own round
            is_last = self._closing
            self._copy_new()

    def _copy_new(self) -> None:
        self._error = ""
        for path in self._list_files():
            name = str(path.relative_to(self._run_folder))
            try:
                status = path.stat()
                version = (status.st_size, status.st_mtime_ns)
                if self._copied.get(name) == version:
                    continue
                patience = _PATIENCE_SECONDS + status.st_size / _SLOWEST_BYTES_PER_SECOND
                self._current = (name, time.monotonic() + patience)
                _copy(path, name, self._target)
                self._copied[name] = version
            except Exception as error:  # storage clients may raise anything
                if not path.exists():
                    # an old checkpoint that was deleted meanwhile
                    continue
                self._error = f"{name} could not be copied ({' '.join(str(error).split())})"
                self._say(f"warning: {self._target}: {self._error}; it will be tried again.")
                return
            finally:
                self._current = ("", 0.0)

    def _list_files(self) -> list[Path]:
        """List every file except those being written, and wandb's, which copies its own.

        COMPLETE comes after every other file of its step folder.
        """
        paths = [path for path in self._run_folder.rglob("*") if path.is_file()]
        names = {path: path.relative_to(self._run_folder).parts for path in paths}
        kept = (path for path in paths if names[path][0] != "wandb" and not any(n[0] == "." for n in names[path]))
        return sorted(kept, key=self._order)

    def _order(self, path: Path) -> tuple[tuple[str, ...], bool, Path]:
        folders = path.relative_to(self._run_folder).parts[:-1]
        step = next((number for number, name in enumerate(folders) if name.startswith(_STEP_PREFIX)), len(folders))
        return folders[: step + 1], path.name == COMPLETE_NAME, path
