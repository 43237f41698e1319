"""Measure every speed claim on one GPU: one process per row, one JSON line per row.

    python benchmarks/gpu.py                          # all rows, in at most 8 minutes
    python benchmarks/gpu.py --rows llm_8 infer_graphs
    python benchmarks/gpu.py --preset tiny            # every row at a toy size, on a CPU too

It needs torch, transformers and the base dependencies (and torchao for the row with fp8), but neither data nor
published weights, and the package need not be installed. A row that fails, runs out of memory or exceeds its limit is a
line with an `error`; the others still run. README.md says what the figures mean.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# row -> function of gpu_rows.py and its arguments, in the order in which they run
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "device": ("measure_device", {}),
    "llm_8": ("train_llm", {"batch": 8}),
    "llm_8_compiled": ("train_llm", {"batch": 8, "compiled": True}),
    "llm_16": ("train_llm", {"batch": 16}),
    "llm_16_compiled": ("train_llm", {"batch": 16, "compiled": True}),
    "llm_16_budget_compiled": ("train_llm", {"batch": 16, "activation_budget": 0.7, "compiled": True}),
    "llm_16_fp8_compiled": ("train_llm", {"batch": 16, "fp8": "tensorwise", "compiled": True}),
    "llm_8_documents_compiled": ("train_llm", {"batch": 8, "has_documents": True, "compiled": True}),
    "vlm_padded_compiled": ("train_vlm", {"packed": False, "compiled": True}),
    "vlm_packed_compiled": ("train_vlm", {"packed": True, "compiled": True}),
    "vla_1_draw_compiled": ("train_vla", {"draws": 1, "compiled": True}),
    "vla_8_draws_compiled": ("train_vla", {"draws": 8, "compiled": True}),
    "infer": ("infer", {}),
    "infer_compiled": ("infer", {"compiled": True}),
    "infer_graphs": ("infer", {"graphs": True}),
    "infer_compiled_graphs": ("infer", {"compiled": True, "graphs": True}),
    "qwen3vla_8_draws": ("train_qwen3vla", {"draws": 8}),
    "checkpoint": ("checkpoint", {}),
    "qwen3vla_8_draws_compiled": ("train_qwen3vla", {"draws": 8, "compiled": True}),
    "start": ("start", {}),
}
# dense bf16 of an H100 or H200, without sparsity
PEAK_TFLOPS = 989.0


def run_row(name: str, is_tiny: bool, sender: Connection) -> None:
    """Measure one row and send its result; called in the row's own process."""
    os.setsid()  # compile workers are stopped with it
    threading.Thread(target=leave_with_parent, daemon=True).start()
    import gpu_rows

    function, arguments = ROWS[name]
    try:
        result = getattr(gpu_rows, function)(is_tiny, **arguments)
    except Exception as error:  # process border: the row is named, and its error is its result
        lines = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {lines[0]}"}
    sender.send(result)


def leave_with_parent() -> None:
    """End this process, and what it started, when the one that supervises it is killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def supervise(name: str, is_tiny: bool, limit_s: float) -> dict[str, Any]:
    """Run a row in a process of its own and return its result; stop it at its limit."""
    # the server of forks has imported everything once, and has not touched the GPU
    context = get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_row, args=(name, is_tiny, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit_s):
            return receiver.recv()
        return {"error": f"stopped at its limit of {limit_s:g} s"}
    except EOFError:
        process.join()
        return {"error": f"the process ended with exit code {process.exitcode}"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()


def add_shares(result: dict[str, Any], measured_tflops: float | None) -> dict[str, Any]:
    """Add TFLOP/s, and their shares of the published and of the measured peak."""
    flops, seconds = result.pop("flops", None), result.pop("seconds", None)
    if flops is None or seconds is None:
        return result
    tflops = flops / seconds / 1e12
    result |= {"tflops": _round(tflops), "mfu": _round(tflops / PEAK_TFLOPS)}
    if measured_tflops:
        result["share_of_measured_peak"] = _round(tflops / measured_tflops)
    return result


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--preset", choices=("full", "tiny"), default="full")
    parser.add_argument("--limit_s", type=float, default=90.0, help="seconds after which a row is stopped")
    parser.add_argument("--minutes", type=float, default=8.0, help="rows that would start later are not run")
    parser.add_argument("--output", type=Path, help="a file that the lines are appended to as well")
    arguments = parser.parse_args()
    if not (arguments.limit_s > 0 and arguments.minutes > 0):
        parser.error("--limit_s and --minutes must be above 0.")
    if arguments.output is not None:
        try:
            arguments.output.open("a").close()
        except OSError as error:
            parser.error(f"--output {arguments.output} cannot be written: {error.strerror}.")
    if arguments.preset == "full":
        import torch

        if not torch.cuda.is_available():
            parser.error("--preset full needs a GPU, but torch sees none. Use --preset tiny.")
    return arguments


def main() -> int:
    """Run the rows one after the other; return 2 if a line could not be written to the file."""
    end = time.perf_counter()
    arguments = parse()
    code = 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the row is stopped, its files deleted
    end += 60 * arguments.minutes
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    get_context("forkserver").set_forkserver_preload(["gpu_rows"])
    measured: float | None = None
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        # compiled code of an earlier run would hide the time that compiling takes
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        for name in arguments.rows:
            started = time.perf_counter()
            left = end - started
            if left <= 0:
                result = {"error": f"not run: the {arguments.minutes:g} minutes are over"}
            else:
                result = supervise(name, arguments.preset == "tiny", min(arguments.limit_s, left))
            measured = result.get("matmul_tflops", measured)
            row = {"row": name, **add_shares(result, measured), "row_s": round(time.perf_counter() - started, 1)}
            line = json.dumps(row)
            print(line, flush=True)
            if arguments.output is not None:
                try:
                    with arguments.output.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
                except OSError as error:  # the line is on the screen, and other rows may still be of use
                    print(f"error: --output {arguments.output}: {error.strerror}", file=sys.stderr)
                    code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
