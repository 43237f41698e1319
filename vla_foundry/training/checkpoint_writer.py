"""Write a TrainState as a step folder (see run_folder.py), perhaps in the background: aside, flushed, hashed, renamed.

Each rank writes the rows that it holds of sharded tensors, in the safetensors format of torch.distributed.checkpoint.
Nothing is gathered on one rank, unless the ranks see different disks.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from vla_foundry.models.weights import BASE_KEY
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.run_folder import (
    CHECKPOINTS_FOLDER,
    COMPLETE_NAME,
    EMA_WEIGHTS_NAME,
    MODEL_WEIGHTS_NAME,
    STATE_NAME,
    TRAINING_STATE_FOLDER,
    WRITING_PREFIX,
    find_fault,
    index_name,
    list_step_folders,
    step_folder_name,
)
from vla_foundry.storage.local import name_errors, sync_folder
from vla_foundry.storage.uri import write_bytes
from vla_foundry.tensors import Part, write_tensors
from vla_foundry.training.checkpoint import STATE_VERSION, ema_tensors, model_tensors, moment_tensors, read_scalars
from vla_foundry.training.distributed import (
    broadcast_object,
    create_host_group,
    gather,
    gather_objects,
    is_sharded,
    is_writer,
    local_rows,
    local_shard,
    main_rank_first,
)
from vla_foundry.training.state import TrainState
from vla_foundry.world import World

_MOMENTS_FILE = f"{TRAINING_STATE_FOLDER}/moments.safetensors"


@dataclass(kw_only=True)
class _Save:
    """A checkpoint that is being written."""

    # where it is written, and where it is moved when it is complete
    folder: Path
    final: Path
    scalars: dict[str, Any]
    # of each file's header
    metadata: dict[str, str]
    # file -> tensor -> what this rank writes of it
    files: dict[str, dict[str, Part]]
    # files of weights whose place an index takes, because ranks write parts of them
    divided: list[str]
    # the ranks see one disk; else rank 0 gathers and writes everything
    is_shared: bool
    # of the whole checkpoint, without headers
    num_bytes: int


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time.

    In the background, a save copies this rank's parts to host memory, and a thread writes them. It has a process group
    of its own, so that its messages do not mix with those of training. A failed save raises in the next `wait`.

    Args:
        run_folder: the run.
        max_checkpoints: number of newest checkpoints to keep; older ones are deleted once the newest verifies. None
            keeps all.
        background: how to reach the other ranks in the background; None: `save` returns when all is on disk.
        report: called on rank 0 with a line for the user, and the step folder if that is now complete.
    """

    def __init__(
        self,
        run_folder: Path,
        world: World,
        *,
        max_checkpoints: int | None = None,
        background: DistributedParams | None = None,
        report: Callable[[str, Path | None], None] = lambda line, folder: None,
    ) -> None:
        self._run_folder, self._world = run_folder, world
        self._max_checkpoints = max_checkpoints
        self._in_background = background is not None
        self._group = None if background is None else create_host_group(background)
        self._report = report
        # copies in host memory, kept for the next save, because new memory is slow
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for a running save, unless other ranks may be gone that it waits for."""
        if kind is None:
            self.wait()
        elif self._thread is not None and self._world.world_size == 1:
            self._thread.join()

    @property
    def has_failed(self) -> bool:
        """True if a save in the background failed on this rank; `wait` says how."""
        return self._error is not None

    def save(self, state: TrainState, facts: Mapping[str, Any]) -> Path:
        """Collective: call on every rank. Save the checkpoint of `state.step`, after a running save.

        Args:
            facts: extra JSON-serializable entries of state.json (the data plan, logger ids).

        Returns:
            The step folder; in the background, it is not complete yet.
        """
        self.wait()
        save = self._plan(state, facts)
        if self._in_background:
            self._copy(save)
            self._thread = threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._finish(save)
        return save.final

    def wait(self) -> None:
        """Wait until a save in the background has ended, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    @torch.no_grad()
    def _plan(self, state: TrainState, facts: Mapping[str, Any]) -> _Save:
        world = self._world
        final = self._run_folder / CHECKPOINTS_FOLDER / step_folder_name(state.step)
        folder = final.with_name(WRITING_PREFIX + final.name)
        scalars = {"version": STATE_VERSION, **read_scalars(state), "world_size": world.world_size, **facts}
        try:
            main_rank_first(world, lambda: _create_empty(folder))
        except OSError as error:
            raise ValueError(f"{error.filename}: {error.strerror}.") from error
        is_shared = all(gather_objects((folder / TRAINING_STATE_FOLDER).is_dir()))
        tensors = {MODEL_WEIGHTS_NAME: model_tensors(state)}
        if state.ema is not None:
            tensors[EMA_WEIGHTS_NAME] = ema_tensors(state)
        divided = [name for name in tensors if is_shared and any(map(is_sharded, tensors[name].values()))]
        tensors[_MOMENTS_FILE] = moment_tensors(state)
        files = {}
        for name, named in tensors.items():
            spreads = is_shared and (name in divided or name == _MOMENTS_FILE)
            files[_part_name(name, world) if spreads else name] = _find_parts(named, world, is_shared, spreads)
        return _Save(
            folder=folder,
            final=final,
            scalars=scalars,
            metadata={} if state.base is None else {BASE_KEY: state.base.digest},
            files=files,
            divided=divided,
            is_shared=is_shared,
            num_bytes=sum(tensor.nbytes for named in tensors.values() for tensor in named.values()),
        )

    def _copy(self, save: _Save) -> None:
        """Collective: call on every rank. Copy what this rank writes to host memory."""
        for file, parts in save.files.items():
            for name, part in parts.items():
                values = part.read()
                if not save.is_shared and not self._world.is_main:
                    continue
                copy = self._copies.get((file, name))
                if copy is None or copy.shape != values.shape or copy.dtype != values.dtype:
                    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                    self._copies[file, name] = copy
                copy.copy_(values, non_blocking=True)
                parts[name] = part._replace(read=copy.detach)
        if self._world.device.startswith("cuda"):
            torch.cuda.current_stream(self._world.device).synchronize()

    def _run(self, save: _Save) -> None:
        try:
            self._finish(save)
        except BaseException as error:  # the border of this thread: whoever waits for it gets the error
            self._error = error

    def _finish(self, save: _Save) -> None:
        """Collective: call on every rank. Write the files, and make them a checkpoint once all ranks have."""
        world, group = self._world, self._group
        mine: dict[str, tuple[int, str]] = {}
        fault: tuple[str, str] | None = None
        try:
            mine = self._write(save)
        except OSError as error:
            fault = (str(error.filename), str(error.strerror))
            if not save.is_shared:
                # the other ranks still send their parts
                self._fail(save, fault)
        found = gather_objects((mine, fault), group)
        for _, fault in found:
            if fault is not None:
                self._fail(save, fault)
        files = {name: entry for part, _ in found for name, entry in part.items()}
        try:
            mine |= main_rank_first(world, lambda: _publish(save, files), group)
        except OSError as error:
            self._fail(save, (str(error.filename), str(error.strerror)))
        if world.is_main:
            self._report(f"Saved {save.final}", save.final)
        if self._max_checkpoints is not None:
            self._delete_old(save.final, mine)

    def _write(self, save: _Save) -> dict[str, tuple[int, str]]:
        mine = {}
        for name, parts in save.files.items():
            if not save.is_shared and not self._world.is_main:
                for part in parts.values():
                    part.read()
            elif parts:
                marks = save.is_shared and (name.startswith(TRAINING_STATE_FOLDER) or bool(save.divided))
                with name_errors(save.folder / name):
                    mine[name] = write_tensors(save.folder / name, parts, save.metadata, marks_parts=marks)
        return mine

    def _fail(self, save: _Save, fault: tuple[str, str]) -> NoReturn:
        """Delete what was written; rank 0 says why, and how much space a checkpoint needs."""
        if not self._world.is_main:
            raise SystemExit(2)
        shutil.rmtree(save.folder, ignore_errors=True)
        free = ""
        with suppress(OSError):
            free = f", and {shutil.disk_usage(save.folder.parent).free / 1e6:,.1f} MB are free"
        raise ValueError(
            f"{fault[0]}: {fault[1]}. A checkpoint needs {save.num_bytes / 1e6:,.1f} MB{free}. Make room, then "
            "continue with --resume auto."
        )

    def _delete_old(self, newest: Path, mine: Mapping[str, Any]) -> None:
        """Collective: call on every rank. Delete checkpoints beyond the limit, once the newest is read back intact."""
        old: list[Path] = []
        if self._world.is_main:
            folders = list_step_folders(self._run_folder)
            # later steps are damaged checkpoints: a run continues from its newest valid one
            old = folders[folders.index(newest) + (self._max_checkpoints or 1) :]
        if not broadcast_object(bool(old), self._group):
            return
        # each rank reads what it wrote
        faults = gather_objects(find_fault(newest, only=mine) if mine else None, self._group)
        fault = next((fault for fault in faults if fault is not None), None)
        if fault is not None and self._world.is_main:
            self._report(f"warning: {newest.name} is damaged, so older checkpoints are kept: {fault}.", None)
        for folder in old if fault is None else []:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                self._report(f"warning: {folder.name} is beyond the limit, but stays: {error}.", None)


def save_checkpoint(
    run_folder: Path, state: TrainState, *, world: World, facts: Mapping[str, Any], max_checkpoints: int | None = None
) -> Path:
    """Collective: call on every rank. Write the checkpoint of `state.step`; it is on disk on return.

    Args:
        facts: see `CheckpointWriter.save`.
        max_checkpoints: see `CheckpointWriter`.

    Returns:
        The step folder.
    """
    return CheckpointWriter(run_folder, world, max_checkpoints=max_checkpoints).save(state, facts)


def _part_name(name: str, world: World) -> str:
    return f"{name.removesuffix('.safetensors')}-{world.rank + 1:05d}-of-{world.world_size:05d}.safetensors"


def _find_parts(tensors: Mapping[str, Tensor], world: World, is_shared: bool, spreads: bool) -> dict[str, Part]:
    """Return what this rank writes of tensors.

    Args:
        is_shared: the ranks see one disk; else rank 0 writes all, and the other ranks send what they hold.
        spreads: ranks share the work; else rank 0 writes all, which it holds.
    """
    parts = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        if not is_shared:
            parts[name] = Part(tensor.shape, tensor.dtype, partial(gather, tensor))
        elif is_writer(tensor, index, world) if spreads else world.is_main:
            local, first = local_shard(tensor), local_rows(tensor).start or 0
            if not first or len(local):
                parts[name] = Part(local.shape, local.dtype, local.detach, first)
    return parts


def _create_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / TRAINING_STATE_FOLDER).mkdir(parents=True)


def _publish(save: _Save, files: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Write the rest of a step folder and make it count; return the bytes and SHA-256 of the files added."""
    texts = {STATE_NAME: save.scalars}
    for name in save.divided:
        stem = name.removesuffix(".safetensors")
        parts = sorted(file for file in files if file.startswith(f"{stem}-"))
        texts[index_name(name)] = {"metadata": {"total_size": sum(files[part][0] for part in parts)}, "files": parts}
    added = {}
    for name, values in texts.items():
        content = json.dumps(values, indent=1).encode()
        write_bytes(str(save.folder / name), content)
        added[name] = (len(content), hashlib.sha256(content).hexdigest())
    sync_folder(str(save.folder / TRAINING_STATE_FOLDER))
    write_bytes(str(save.folder / COMPLETE_NAME), json.dumps(files | added, indent=1).encode())
    # a folder already here is a damaged checkpoint: a run continues from its newest valid one
    shutil.rmtree(save.final, ignore_errors=True)
    save.folder.rename(save.final)
    sync_folder(str(save.final.parent))
    return added
