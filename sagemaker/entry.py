"""The entry script of a SageMaker container: start training on this machine's GPUs with torchrun, one of `hosts`.

It needs only Python and, for secrets, boto3; what it reads is described in docs/launching.md.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

BASE = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
SOURCE = Path(__file__).resolve().parents[1]
_SECONDS_FOR_DNS = 600
# a machine that is taken back ends two minutes after SIGTERM
_SECONDS_TO_SAVE = "110"
_MAX_REASON = 1024


def main() -> int:
    """Run training to its end; return its exit code."""
    resources = json.loads(
        os.environ.get("SM_RESOURCE_CONFIG") or (BASE / "input/config/resourceconfig.json").read_text(encoding="utf-8")
    )
    hosts, current = sorted(resources["hosts"], key=host_number), resources["current_host"]
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": _SECONDS_TO_SAVE, **read_environment(resources)}
    process = subprocess.Popen(torchrun_words(hosts, current), env={**environment, "PYTHONPATH": str(SOURCE)})
    # every rank saves a checkpoint and leaves
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait()
    if code and current == hosts[0]:
        write_reason()
    return code if code >= 0 else 128 - code


def host_number(host: str) -> tuple[int, str]:
    """Order algo-10 after algo-2."""
    digits = re.search(r"\d+$", host)
    return int(digits[0]) if digits else 0, host


def torchrun_words(hosts: list[str], current: str) -> list[str]:
    """Return torchrun's command for this host."""
    where = ["--standalone"]
    if len(hosts) > 1:
        wait_for(hosts[0])
        node = ["--nnodes", str(len(hosts)), "--node_rank", str(hosts.index(current))]
        where = [*node, "--master_addr", hosts[0], "--master_port", os.environ.get("MASTER_PORT", "29500")]
    config = BASE / "input/data/config/config.yaml"
    return [
        *(sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node", str(max(1, count_gpus()))),
        *("-m", "vla_foundry.main", "--config_path", str(config), "--save_path", str(BASE / "experiments")),
    ]


def wait_for(host: str) -> None:
    """Wait until a host that starts at the same time has an address."""
    for _ in range(_SECONDS_FOR_DNS):
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"error: the host {host} has no address after {_SECONDS_FOR_DNS} s.")


def count_gpus() -> int:
    """Return the number of GPUs of this machine."""
    if "SM_NUM_GPUS" in os.environ:
        return int(os.environ["SM_NUM_GPUS"])
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return shown.stdout.count("GPU ")


def read_environment(resources: dict) -> dict[str, str]:
    """Return the variables of training: the network's interface, and secrets, which are in no other place."""
    environment = {}
    if interface := resources.get("network_interface_name"):
        environment = {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    if secret := os.environ.get("VLA_FOUNDRY_SECRET"):
        from boto3.session import Session

        client = Session().client("secretsmanager")
        environment |= json.loads(client.get_secret_value(SecretId=secret)["SecretString"])
    return environment


def write_reason() -> None:
    """Tell SageMaker why training failed: the run's own error line becomes the job's FailureReason."""
    logs = sorted((BASE / "experiments/.failed").glob("*.log"), key=lambda path: path.stat().st_mtime)
    if logs:
        (BASE / "output").mkdir(exist_ok=True)
        reason = logs[-1].read_text(encoding="utf-8")[-_MAX_REASON:]
        (BASE / "output/failure").write_text(reason, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
