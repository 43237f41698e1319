"""Record the matrix products of a computation and time them alone, as a lower bound of its time."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# (batch, rows, inner, columns, dtype)
Product = tuple[int, int, int, int, torch.dtype]


class RecordProducts(TorchDispatchMode):
    """Counts matrix products inside this context, backward included; attention and convolutions count as products."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._add(args[0], args[1])
        elif name in ("addmm", "baddbmm"):
            self._add(args[1], args[2])
        elif name.startswith("_scaled_dot_product") and "backward" not in name:
            self._add_attention(args[0], args[1], forward=True)
        elif name.startswith("_scaled_dot_product"):
            self._add_attention(args[1], args[2], forward=False)
        elif name == "convolution":
            self._add_convolution(args[1], result)
        elif name == "convolution_backward":
            self._add_convolution(args[2], args[0])
            self._add_convolution(args[2], args[0])
        return result

    def _add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        rows, inner = left.shape[-2:]
        self.products[(math.prod(left.shape[:-2]), rows, inner, right.shape[-1], left.dtype)] += 1

    def _add_attention(self, queries: torch.Tensor, keys: torch.Tensor, *, forward: bool) -> None:
        B, H, T, K = queries.shape
        S = keys.shape[2]
        # scores, and their product with the values; backward recomputes the scores and has two gradients per product
        self.products[(B * H, T, K, S, queries.dtype)] += 1 if forward else 3
        self.products[(B * H, T, S, K, queries.dtype)] += 1 if forward else 2

    def _add_convolution(self, weight: torch.Tensor, output: torch.Tensor) -> None:
        places = output.shape[0] * math.prod(output.shape[2:])
        self.products[(1, places, math.prod(weight.shape[1:]), weight.shape[0], weight.dtype)] += 1

    def num_flops(self) -> float:
        """Return the operations of all products."""
        return sum(2.0 * count * math.prod(product[:4]) for product, count in self.products.items())


def record(function: Callable[[], Any]) -> RecordProducts:
    """Run a function and return its products."""
    with RecordProducts() as recorded:
        function()
    return recorded


def time_products(recorded: RecordProducts, device: str = "cpu") -> float:
    """Return the seconds that the products take one after the other, on operands created before."""
    operands = {
        product: (
            torch.randn(batch, rows, inner, device=device).to(dtype),
            torch.randn(batch, inner, columns, device=device).to(dtype),
        )
        for product in recorded.products
        for batch, rows, inner, columns, dtype in [product]
    }

    def run() -> float:
        start = time.perf_counter()
        for product, count in recorded.products.items():
            left, right = operands[product]
            for _ in range(count):
                torch.bmm(left, right)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run()
    return min(run() for _ in range(3))


def measure_matmul_rate(dtype: torch.dtype, device: str = "cpu", side: int = 1024) -> float:
    """Return the operations per second of one large square product, as a measure of the machine."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best
