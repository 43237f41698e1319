"""Stop between two steps when the scheduler of the cluster asks for it (SIGTERM), on all ranks at the same step."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from vla_foundry.world import World

# exit code of a run that saved a checkpoint and stopped because of SIGTERM (128 + 15, as shells report it)
EXIT_STOPPED = 143


class StopSignal:
    """Listen for SIGTERM inside a `with` block."""

    def __init__(self, world: World) -> None:
        self._is_shared = world.world_size > 1
        self._received = False
        self._flag = torch.zeros(1)
        self._pending: dist.Work | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)
        if kind is None and self._pending is not None:
            self._pending.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def poll(self) -> bool:
        """Collective: call on every rank, once a step. Return whether to stop now.

        Ranks hear the signal at different moments. Each sends its flag and reads the sum of those sent one step
        earlier, so hosts agree without waiting for each other, and the accelerator is not touched.
        """
        if not self._is_shared:
            return self._received
        stopping = False
        if self._pending is not None:
            self._pending.wait()
            stopping = bool(self._flag[0] > 0)
        self._flag = torch.tensor([float(self._received)])
        self._pending = dist.all_reduce(self._flag, async_op=True)
        return stopping
