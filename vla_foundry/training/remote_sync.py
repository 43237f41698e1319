"""Copy the run folder to remote storage after each checkpoint, in the background, newest state last to be lost."""

import threading
from collections.abc import Callable
from pathlib import Path

from vla_foundry.run_folder import COMPLETE_NAME, WRITING_PREFIX
from vla_foundry.storage.uri import join_uri, upload

_STEP_PREFIX = "step_"


class RemoteSync:
    """One background thread that copies what is new; a failure is one line, and is tried again next time.

    Args:
        run_folder: what is copied.
        remote: the folder it is copied into, under the run's name.
        say: takes a line for the user.
    """

    def __init__(self, run_folder: Path, remote: str, say: Callable[[str], None]) -> None:
        self._run_folder = run_folder
        self._target = join_uri(remote, run_folder.name)
        self._say = say
        self._copied: dict[str, tuple[int, int]] = {}
        self._wanted = threading.Event()
        self._closing = False
        self._error = ""
        self._thread = threading.Thread(target=self._work, name="remote-sync", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Copy what is new, soon."""
        self._wanted.set()

    def close(self) -> None:
        """Copy what is left and wait for it.

        Raises:
            ValueError: it could not be copied.
        """
        self._closing = True
        self._wanted.set()
        self._thread.join()
        if self._error:
            raise ValueError(f"The run is done, but {self._target} lacks part of it: {self._error}")

    def _work(self) -> None:
        is_last = False
        while not is_last:
            self._wanted.wait()
            self._wanted.clear()
            # read before copying: what is requested during this round, close() included, gets a round of its own
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
                upload(str(path), join_uri(self._target, name))
                self._copied[name] = version
            except FileNotFoundError:
                # an old checkpoint that was deleted meanwhile
                continue
            except Exception as error:  # a process border: storage clients raise what they like
                self._error = f"{name} could not be copied ({' '.join(str(error).split())})"
                self._say(f"warning: {self._target}: {self._error}; it will be tried again.")
                return

    def _list_files(self) -> list[Path]:
        """Every file except those being written; COMPLETE comes after every other file of its step folder."""
        paths = [path for path in self._run_folder.rglob("*") if path.is_file()]
        paths = [path for path in paths if not any(part.startswith(WRITING_PREFIX) for part in path.parts)]
        return sorted(paths, key=self._order)

    def _order(self, path: Path) -> tuple[tuple[str, ...], bool, Path]:
        folders = path.relative_to(self._run_folder).parts[:-1]
        step = next((number for number, name in enumerate(folders) if name.startswith(_STEP_PREFIX)), len(folders))
        return folders[: step + 1], path.name == COMPLETE_NAME, path
