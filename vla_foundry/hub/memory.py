"""Count the memory that a training step takes on a GPU, without one: shapes are followed, and nothing is computed."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vla_foundry.batch import LossOutput
from vla_foundry.models import attention, losses
from vla_foundry.training.distributed import find_lowered
from vla_foundry.training.loop import autocast


def count_activation_bytes(model: nn.Module, inputs: dict[str, Any], *, precision: str = "amp_bfloat16") -> int:
    """Return the most bytes that one microbatch's forward and backward pass hold at a time on a GPU.

    These are activations, what the loss keeps, and what is being computed. Not among them are weights, copies of them
    in bf16, their gradients, moments, and `inputs`. The count is of tensors: an allocator takes some percent more.
    Blocks run as they are written; a compiled block keeps less.

    Args:
        model: on any device. Its values are not read, so it may be on the meta device, where it takes no memory: made
            by `create_model(params, load_pretrained=False)` within `with torch.device("meta")`, then distributed by
            `parallelize(model, DistributedParams(), world=World(device="meta"), ...)`, which casts and checkpoints.
        inputs: a microbatch that the model's batch handler prepared for the CPU; its values are not read either.
        precision: `hparams.precision`.

    Raises:
        ValueError: the model reads values of tensors on the host, which have none here.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    lowered = {parameter for block in find_lowered(model, precision) for parameter in block.parameters()}
    both_passes = _BothPasses(model, precision)
    with mode, torch.random.fork_rng(devices=[]), _as_on_a_gpu():
        state: dict[str, Tensor] = {}
        for name, tensor in [*both_passes.named_parameters(), *both_passes.named_buffers()]:
            dtype = torch.bfloat16 if tensor in lowered and tensor.is_floating_point() else tensor.dtype
            state[name] = torch.empty(tensor.shape, dtype=dtype, requires_grad=tensor.requires_grad)
        with unset_fake_temporarily():
            inputs = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, inputs)
        counter = _LiveBytes([*state.values(), *tree_leaves(inputs)])
        for tensor in state.values():
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(lambda parameter: counter.ignore(parameter.grad))
        try:
            with counter:
                torch.func.functional_call(both_passes, state, kwargs=inputs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            kind = type(model).__name__
            raise ValueError(
                f"The memory of {kind} cannot be counted: it reads values of tensors on the host ({error})."
            ) from error
    return counter.most


class _BothPasses(nn.Module):
    """Forward and backward: blocks that recompute their activations read weights in both."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, **inputs: Any) -> None:
        with autocast(self.precision, "cpu"):
            output = self.model(**inputs)
        if not isinstance(output, LossOutput):
            raise ValueError(f"The model's forward returned {type(output).__name__}, not a LossOutput (batch.py).")
        output.sum.backward()


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages that operations made and that still exist."""

    def __init__(self, ignored: list[Any]) -> None:
        super().__init__()
        self.most = 0
        # bytes by the number of a storage; one is dropped when the storage is freed
        self._live: dict[int, int] = {}
        self._total = 0
        # kept alive, so that no new storage takes the number of one of them
        self._ignored: dict[int, Tensor] = {}
        for value in ignored:
            self.ignore(value)

    def ignore(self, value: Any) -> None:
        """Do not count a tensor's storage from now on."""
        if isinstance(value, Tensor):
            number = value.untyped_storage()._cdata
            self._ignored[number] = value
            self._free(number)

    def _free(self, number: int) -> None:
        self._total -= self._live.pop(number, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                storage = output.untyped_storage()
                number = storage._cdata
                if number not in self._ignored and number not in self._live:
                    self._live[number] = storage.nbytes()
                    self._total += storage.nbytes()
                    weakref.finalize(storage, self._free, number).atexit = False
        self.most = max(self.most, self._total)
        return outputs


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let tensors of the CPU take the branches of a GPU."""
    devices, waiting = set(attention.VARLEN_DEVICES), set(losses.NEVER_WAITING)
    chunks = dict(losses.CHUNK_LOGITS)
    attention.VARLEN_DEVICES.add("cpu")
    losses.NEVER_WAITING.discard("cpu")
    losses.CHUNK_LOGITS["cpu"] = chunks["cuda"]
    try:
        yield
    finally:
        losses.CHUNK_LOGITS.update(chunks)
        attention.VARLEN_DEVICES.intersection_update(devices)
        losses.NEVER_WAITING.update(waiting)
