"""Replay sampling as CUDA graphs: the backbone and all denoising steps are launched as one."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from vla_foundry.batch import Documents
from vla_foundry.models.attention import keep_constants

Sample = Callable[[dict[str, Any], Tensor], Tensor]
# runs a function once for good; returns what runs it again on the same memory, and its output
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]

# one for each number of cameras and text length, with and without guidance; older ones are discarded
_MAX_GRAPHS = 8
_NUM_WARM_UPS = 3


class GraphedSampler:
    """Samples actions by replaying a graph, one for all inputs of the same shapes and host values.

    Args:
        sample: returns actions for inputs and seeds; it neither reads values back nor copies new ones from the host.
        capture: makes a graph.

    Raises:
        ValueError: (when called) the model cannot be captured.
    """

    def __init__(self, sample: Sample, *, capture: Capture | None = None) -> None:
        self._sample = sample
        self._capture = capture or _capture
        # inputs, their replay, output, and the constants on the device that the graph reads
        self._graphs: OrderedDict[Hashable, tuple[list[Tensor], Callable[[], Any], Tensor, dict[Any, Tensor]]] = (
            OrderedDict()
        )

    def __call__(self, inputs: dict[str, Any], seeds: Tensor) -> Tensor:
        leaves, structure = tree_flatten((inputs, seeds))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (structure, tuple(map(_describe, leaves)))
        if key not in self._graphs:
            # the new graph may need the memory
            if len(self._graphs) == _MAX_GRAPHS:
                self._graphs.popitem(last=False)
            own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            try:
                with keep_constants() as constants:
                    again, output = self._capture(lambda: self._sample(*tree_unflatten(own, structure)))
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"the model cannot be captured as a CUDA graph: {reason}. Leave cuda_graphs out."
                ) from None
            self._graphs[key] = ([leaf for leaf in own if isinstance(leaf, Tensor)], again, output, constants)
        self._graphs.move_to_end(key)
        static, again, output, _ = self._graphs[key]
        for target, tensor in zip(static, tensors, strict=True):
            target.copy_(tensor)
        again()
        return output.clone()


def _describe(leaf: Any) -> Hashable:
    """Return what a graph depends on: the shape of a tensor, the value of anything else."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype)
    if isinstance(leaf, np.ndarray):
        return (leaf.shape, leaf.dtype.str, leaf.tobytes())
    if isinstance(leaf, Documents):
        return tuple(map(_describe, vars(leaf).values()))
    return leaf


def _capture(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """Capture a function after warm-up runs, as torch.cuda.graph wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_NUM_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads may use the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output
