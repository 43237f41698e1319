"""Processes by number: which still run. An ended one is listed until its parent, or init, has asked for its code."""

from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    status = _read_status(pid)
    return bool(status) and status[0] not in "ZX"


def is_group_running(pgid: int) -> bool:
    """Whether a process of this group is there and has not ended."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return any(is_running(pid) for pid in pids if _read_status(pid)[2:3] == [str(pgid)])


def _read_status(pid: int) -> list[str]:
    """State, parent, group, session and more; empty: there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
