"""The examples of launchers are what their schedulers take, and their scripts train."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.essential.training.conftest import manifest as manifest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*") if path.suffix in (".sh", ".sbatch"))
# Slurm's commands as the scripts call them, for a job that fails; it was preempted before it was started again
COMMANDS = {
    "srun": "exit 3",
    "scontrol": 'case "$1 $2" in "show hostnames") echo localhost;;'
    '"show job") echo " StartTime=2026-01-02T00:00:00"; echo " PreemptTime=${PREEMPTED:-None} x";;'
    '*) echo "$@" >> requests.txt;; esac',
}
RunLater = Callable[..., subprocess.Popen[str]]
# two nodes on this machine, the first of which has its name; a step's processes are all killed, as by control groups
SLURM_CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={host}-second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def read_skypilot() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "skypilot/train.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def flags(manifest: Path) -> list[str]:
    return [
        *("--config_path", "config_presets/training_jobs/llm_tiny.yaml", "--data.dataset_manifest", str(manifest)),
        *("--data.seq_len", "32", "--model.vocab_size", "64", "--data.num_workers", "0", "--name", "llm"),
    ]


@pytest.fixture
def run_in_slurm(tmp_path: Path) -> RunLater:
    """Starts a script as a Slurm job."""
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)

    def start(script: str, *words: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **variables,
        }
        command = ["bash", str(EXAMPLES / "slurm" / script), *words]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shell_scripts_are_sound(tmp_path: Path) -> None:
    blocks = {name: tmp_path / f"{name}.sh" for name in ("setup", "run")}
    for name, path in blocks.items():
        path.write_text(f"#!/usr/bin/env bash\n{read_skypilot()[name]}", encoding="utf-8")
    done = subprocess.run(["shellcheck", *SCRIPTS, *blocks.values()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def run_slurm(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Call Slurm's commands for a cluster of two nodes on this machine, and return what they print."""
    if shutil.which("slurmctld") is None or shutil.which("slurmd") is None:
        pytest.skip("needs Slurm: apt-get install slurmctld slurmd slurm-client")
    folder = tmp_path / "slurm"
    folder.mkdir()
    with ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
    host = socket.gethostname().partition(".")[0]
    names = {"host": host, "user": getpass.getuser(), "folder": folder}
    (folder / "slurm.conf").write_text(SLURM_CONFIG.format(ports=ports, **names), encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_CONF": str(folder / "slurm.conf"),
        "OMP_NUM_THREADS": "1",
    }

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    with ExitStack() as stack:
        for words in (["slurmctld"], ["slurmd", "-N", host], ["slurmd", "-N", f"{host}-second"]):
            log = stack.enter_context((folder / f"{words[-1]}.log").open("w"))
            daemon = subprocess.Popen([*words, "-D"], env=environment, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.kill)
        end = time.monotonic() + 30
        while run("sinfo", "--noheader", "--format=%T").split() != ["idle"]:
            if time.monotonic() > end:
                pytest.skip(f"Slurm does not start on this machine: {run('sinfo', '--Node')}")
            time.sleep(0.2)
        yield run
        run("scancel", f"--user={names['user']}")
        wait_for(lambda: run("squeue", "--noheader") == "", lambda: run("squeue"))


def wait_for(is_time: Callable[[], bool], describe: Callable[[], str]) -> None:
    """Wait for a job to come as far."""
    end = time.monotonic() + 120
    while not is_time():
        assert time.monotonic() < end, describe()
        time.sleep(0.2)


@pytest.mark.slow  # two nodes, each with a process of torchrun
def test_a_slurm_job_whose_time_is_up_saves_a_checkpoint_and_is_queued_again(
    run_slurm: Callable[..., str], flags: list[str], tmp_path: Path
) -> None:
    words = [*flags, "--total_train_samples", "1600000", "--num_checkpoints", "1"]
    options = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--output=log"]
    job = run_slurm("sbatch", "--parsable", *options, str(EXAMPLES / "slurm" / "train.sbatch"), *words).strip()
    log = tmp_path / "log"

    def describe() -> str:
        return run_slurm("scontrol", "show", "job", job) + (log.read_text(encoding="utf-8") if log.exists() else "")

    wait_for(lambda: "\nstep 1/" in describe(), describe)
    # as Slurm does some minutes before the end
    run_slurm("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: "Restarts=1" in describe(), describe)
    found = describe()
    assert "on 2 x cpu" in found
    assert "Stopped by SIGTERM after step" in found
    assert len(list(tmp_path.glob("experiments/llm/checkpoints/step_*"))) == 1


@pytest.mark.parametrize(("preempted", "is_queued"), [("2026-01-02T00:00:05", True), ("2026-01-01T00:00:00", False)])
def test_a_slurm_job_that_fails_is_queued_again_only_if_it_was_preempted_since_its_start(
    run_in_slurm: RunLater, tmp_path: Path, preempted: str, is_queued: bool
) -> None:
    job = run_in_slurm("train.sbatch", PREEMPTED=preempted)
    job.communicate(timeout=20)
    assert job.returncode == 3
    assert (tmp_path / "requests.txt").exists() == is_queued


def test_a_slurm_array_with_more_jobs_than_policies_says_so(run_in_slurm: RunLater) -> None:
    job = run_in_slurm("evaluate.sbatch", "experiments/a,experiments/b", SLURM_ARRAY_TASK_ID="2")
    assert job.communicate(timeout=20)[1].startswith("error: the array has a job 2, but there are 2 runs")
    assert job.returncode == 2


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("serve.sh", "is in use, and another policy might answer"),
        ("train_cotrained.sh", "must be a finished quickstart"),
        ("evaluate.sh", "usage: "),
    ],
)
def test_scripts_refuse_what_cannot_work(script: str, message: str, tmp_path: Path) -> None:
    words = [] if message == "usage: " else [str(tmp_path / "my run"), str(tmp_path / "output")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {**os.environ, "PORT": str(server.getsockname()[1])}
        command = ["bash", str(EXAMPLES / script), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ray_takes_the_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((EXAMPLES / "ray/cluster.yaml").read_text(encoding="utf-8")))
    validate_config(config)
    assert "secrets.env" in config["rsync_exclude"]
    [(target, source)] = config["file_mounts"].items()
    assert (target, source) == ("/home/ubuntu/vla_foundry", ".")


def test_the_skypilot_task_trains(flags: list[str], tmp_path: Path) -> None:
    task = read_skypilot()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    flags += ["--total_train_samples", "32", "--num_checkpoints", "1"]
    environment = {
        **os.environ,
        **task["secrets"],
        "FLAGS": " ".join(flags),
        "SKYPILOT_NUM_NODES": "1",
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n",
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    config = tmp_path / "experiments/llm/checkpoints/step_00000002/state.json"
    assert json.loads(config.read_text(encoding="utf-8"))["step"] == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_scripts_lead_from_text_to_a_served_policy(tmp_path: Path) -> None:
    def run(script: str, *words: object, **variables: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "NUM_WORKERS": "0", "EPISODES": "0:1", **variables}
        command = ["bash", str(EXAMPLES / script), *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "corpus").mkdir()
    (tmp_path / "pictures").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        (tmp_path / "corpus" / f"{page.stem}.txt").write_bytes(page.read_bytes())
    for color in ("red", "blue"):
        Image.new("RGB", (64, 64), color).save(tmp_path / "pictures" / f"{color}.png")
        (tmp_path / "pictures" / f"{color}.txt").write_text(f"all {color}", encoding="utf-8")

    one_step = ["--hparams.global_batch_size", "2", "--hparams.per_gpu_batch_size", "1", "--num_checkpoints", "1"]
    one_step += ["--total_train_samples", "2", "--hparams.warmup", "0"]
    small = ["--model.hidden_dim", "32", "--model.n_layers", "1", "--model.n_heads", "2"]
    llm, vlm = tmp_path / "llm", tmp_path / "vlm"
    run("train_llm.sh", tmp_path / "corpus", llm, *small, *one_step)
    run("train_vlm.sh", tmp_path / "pictures", llm / "runs/llm", vlm, *one_step)
    robot = tmp_path / "robot"
    run("preprocess_robotics.sh", "demos", robot, EPISODES="2", PICTURES=str(tmp_path))
    run("train_vla.sh", robot / "demos", vlm / "runs/vlm", tmp_path / "vla", *one_step)
    policy = tmp_path / "vla/runs/policy"
    assert "name: other" in run("resume.sh", policy, "other", "--resolve_configs", "true")
    assert "name: policy" in run("resume.sh", policy, "--resolve_configs", "true")
    run("evaluate.sh", policy, tmp_path / "evaluation", "--max_steps", "3", "--tasks", "drawer-open-v3@half")
    assert (tmp_path / "evaluation/report/report.html").is_file()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run("serve.sh", policy, tmp_path / "served", PORT=str(port), STEPS="3")
    assert (tmp_path / "served/served/summary.json").is_file()
