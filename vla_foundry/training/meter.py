"""Measure a run between two log lines; sums stay on the device and are read in a single transfer."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vla_foundry.batch import Batch
from vla_foundry.training.distributed import all_reduce, gather_objects
from vla_foundry.training.state import TrainState
from vla_foundry.world import World

# dense bf16 floating-point operations per second, by a substring of the GPU's name; the first match wins
_PEAK_FLOPS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.75e15),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device: str) -> float | None:
    """Return a device's peak dense bf16 FLOP/s; None if unknown."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS if part in name), None)


def count_tokens(batch: Batch) -> tuple[int, int]:
    """Return how many tokens a microbatch feeds the model, padding included, and the length of its rows."""
    input_ids = batch.get("input_ids")
    if input_ids is None or input_ids.shape[0] == 0:
        return 0, 0
    length = input_ids.shape[1] - 1
    return input_ids.shape[0] * length, length


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """A step's numbers, scalars on the device; zeros where the update was skipped."""

    # equal on all ranks
    loss: Tensor
    grad_norm: Tensor
    # 1.0 if the weights were updated, else 0.0
    updated: Tensor
    # the model's own sums on this rank, and their divisor under "count"; see `loop.name_logs`
    log_sums: dict[str, Tensor]


class Meter:
    """Sums over the steps since the last reading."""

    def __init__(self, *, world: World, flops_per_token: Callable[[int], float] | None, uses_bf16: bool) -> None:
        self._world = world
        self._flops_per_token = flops_per_token
        self._peak = peak_flops(world.device) if uses_bf16 else None
        # samples replaced since the start of this process, on this rank, by reason
        self._dropped: Counter[str] = Counter()
        # the most skipped updates in a row that the last reading saw
        self.longest_skipped_row = 0
        self.restart()

    def restart(self) -> None:
        """Reset all measurements and restart the clock."""
        self._device_sums: dict[str, Tensor] = {}
        self._log_sums: dict[str, Tensor] = {}
        self._samples = self._tokens = self._padding = self._steps = 0
        self._flops = self._waited = 0.0
        self._started = time.perf_counter()

    def add_data(self, microbatches: Sequence[Batch], waited: float) -> None:
        """Count one step's data, which took `waited` seconds to arrive."""
        for batch in microbatches:
            tokens, length = count_tokens(batch)
            self._tokens += tokens
            if (documents := batch.get("documents")) is not None:
                self._padding += int(
                    (documents.lengths[documents.is_padding] - 1).sum()
                )  # the last token is not an input
            if self._flops_per_token is not None and tokens:
                self._flops += tokens * self._flops_per_token(length)
            self._samples += len(batch["positions"])
            self._dropped.update(batch.get("dropped") or {})
        self._waited += waited
        self._steps += 1

    def add_step(self, result: StepResult) -> None:
        """Add one step's numbers, which stay on the device."""
        same = {"loss": result.loss, "grad_norm": result.grad_norm, "updated": result.updated}
        for total, new in ((self._device_sums, same), (self._log_sums, result.log_sums)):
            for name, value in new.items():
                total[name] = total[name] + value if name in total else value

    def read(self, state: TrainState) -> dict[str, Any]:
        """Collective: call on every rank. Return the metrics since the last reading, and restart.

        This is the only place where the host waits for the device.
        """
        names = sorted(self._log_sums)
        read_at = time.perf_counter()
        elapsed = read_at - self._started
        host = [self._samples, self._tokens, self._flops, self._waited, elapsed, self._dropped.total(), self._padding]
        local = [torch.tensor(host, dtype=torch.float64, device=self._world.device)]
        local += [self._log_sums[name].double().reshape(1) for name in names]
        counters = state.counters
        same = [*self._device_sums.values(), state.lr, counters.skipped, counters.targets, counters.longest_row]
        same = [value.double().reshape(1).to(self._world.device) for value in same]
        values = torch.cat([all_reduce(torch.cat(local)), *same]).tolist()
        counters.longest_row.copy_(counters.skipped_in_row)

        samples, tokens, flops, waited, elapsed, dropped, padding = values[:7]
        logs = dict(zip(names, values[7:], strict=False))
        loss, norm, updated, lr, skipped, targets, longest = values[7 + len(names) :]
        self.longest_skipped_row = int(longest)
        ranks = self._world.world_size
        # ranks start their first interval at different times: take the mean
        seconds = elapsed / ranks + time.perf_counter() - read_at
        metrics: dict[str, Any] = {
            # means over the steps that updated the weights
            "loss": loss / updated if updated else None,
            **_means(logs),
            "lr": lr,
            "grad_norm": norm / updated if updated else None,
            "tokens_per_second": tokens / seconds,
            "samples_per_sec_per_gpu": samples / seconds / ranks,
            "step_seconds": seconds / self._steps,
            "data_wait_share": waited / ranks / seconds,
            "padding_share": padding / max(tokens, 1),
            "memory_gb": _read_memory(self._world.device),
            "targets": int(targets),
            "skipped_steps": int(skipped),
            "dropped_samples": int(dropped),
        }
        if self._peak is not None and flops:
            metrics["mfu"] = flops / seconds / ranks / self._peak
        if dropped:
            metrics["dropped_reasons"] = dict(sum(gather_objects(self._dropped), Counter()))
        self.restart()
        return metrics


def _means(sums: dict[str, float]) -> dict[str, float | None]:
    """Divide sums by their counts; those of a mixture's datasets are called NAME/DATASET, as are their counts."""
    parts = {key: key.partition("/") for key in sums}
    counts = {dataset: sums[key] for key, (name, _, dataset) in parts.items() if name == "count"}
    return {
        name + f"_{dataset}" * bool(dataset): sums[key] / counts[dataset] if counts[dataset] else None
        for key, (name, _, dataset) in parts.items()
        if name != "count"
    }


def _read_memory(device: str) -> float:
    """Return the peak memory used so far, in GiB, of the GPU or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
