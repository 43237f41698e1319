"""Start-up: CPU and wall time until the JPEG decoder is ready, and until a training run has taken its first step.

    python benchmarks/startup.py                                     # the decoder alone
    python benchmarks/startup.py --data.dataset_manifest ... [FLAGS]   # and one step of `vla-foundry train` with FLAGS

Prints one JSON line for each measurement. CPU seconds include those of loader processes that have ended.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time

_DECODER = "from vla_foundry.images.codec import _jpeg_operator; _jpeg_operator()"
_ONE_STEP = ["--num_checkpoints", "1", "--wandb", "false", "--name", "startup", "--log_every_n_steps", "1"]


def measure(name: str, command: list[str]) -> None:
    """Run a command and print its wall and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"what": name, "wall_s": round(time.perf_counter() - start, 1), "cpu_s": round(cpu, 1)}))


def main(flags: list[str]) -> None:
    """Measure torch alone, then the decoder, then one training step if there are flags."""
    measure("import torch", [sys.executable, "-c", "import torch"])
    measure("JPEG decoder", [sys.executable, "-c", _DECODER])
    if flags:
        with tempfile.TemporaryDirectory() as folder:
            train = [sys.executable, "-m", "vla_foundry.main", *flags, *_ONE_STEP, "--save_path", folder]
            measure("one training step", train)


if __name__ == "__main__":
    main(sys.argv[1:])
