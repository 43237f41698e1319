"""The list of faulty samples in a run folder, `data_faults.jsonl`: each once, from all ranks, epochs and resumes."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from vla_foundry.parsing import parse_record
from vla_foundry.provenance import hide_home
from vla_foundry.run_folder import DATA_FAULTS_NAME, hold_lock
from vla_foundry.storage.local import name_errors


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A sample that cannot be used, and why."""

    # manifest of its dataset; in a mixture, the dataset's name
    dataset: str
    # path or URI of its tar
    shard: str
    # its key in the tar: the common prefix of its members; "record N" or "row N" where there is none
    member: str
    # a few words; samples are counted by reason
    reason: str
    # what happened, with the name of the stage
    detail: str

    def __str__(self) -> str:
        return f"{self.shard} {self.member} ({self.detail})"


class FaultLog:
    """Appends to `data_faults.jsonl`; several processes may do so at the same time.

    A line is {"dataset", "shard", "member", "reason", "detail"}. The first reason of a sample is kept.

    Args:
        run_folder: where the file is; it is created with the first fault.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / DATA_FAULTS_NAME
        self._known: set[tuple[str, ...]] = set()
        # bytes of the file that have been read
        self._num_read = 0

    def add(self, faults: Iterable[Fault]) -> None:
        """Append the samples that the file does not name yet."""
        new = {}
        for fault in faults:
            line = {name: hide_home(value) for name, value in asdict(fault).items()}
            new.setdefault(_identity(line), line)
        if not new.keys() - self._known:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with name_errors(self.path), hold_lock(self.path, wait=True), self.path.open("r+b") as file:
            self._read(file)
            lines = [json.dumps(line) + "\n" for identity, line in new.items() if identity not in self._known]
            # what a killed process left half-written is no line
            file.truncate(self._num_read)
            self._num_read += file.write("".join(lines).encode())
            self._known |= new.keys()

    def count(self) -> int:
        """Return how many samples the file names."""
        if self.path.exists():
            with name_errors(self.path), self.path.open("rb") as file:
                self._read(file)
        return len(self._known)

    def _read(self, file: BinaryIO) -> None:
        file.seek(self._num_read)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._num_read += len(line)
            try:
                self._known.add(_identity(parse_record(line, DATA_FAULTS_NAME)))
            except (ValueError, KeyError, TypeError):
                continue  # not one of ours
        file.seek(self._num_read)


def _identity(line: dict[str, str]) -> tuple[str, ...]:
    return line["dataset"], line["shard"], line["member"]
