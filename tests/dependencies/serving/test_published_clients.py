"""The published clients of both websocket protocols drive a server, each in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.essential.serving.conftest import serve
from tests.essential.serving.test_grpc_server import act_in_process
from tests.essential.serving.test_websocket_server import join
from vla_foundry.evaluation.results import read_results
from vla_foundry.serving.policies import Served

pytestmark = [pytest.mark.network, pytest.mark.slow]
OPENPI = ["openpi-client==0.1.2", "typing_extensions"]
VLA_EVAL = ["vla-eval==0.8.0"]


def create_environment(folder: Path, packages: list[str]) -> Path:
    """Return the Python of a new environment with packages."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    subprocess.run([uv, "venv", "-q", "-p", "3.11", folder], check=True)
    python = folder / "bin/python"
    installed = subprocess.run([uv, "pip", "install", "-q", "-p", python, *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"cannot install {packages}: {installed.stderr.strip().splitlines()[-1]}")
    return python


def write_observations(folder: Path, recording: Any, served: Served) -> None:
    fields = {field.name: recording.fields[field.name].astype(np.float64) for field in served.metadata.fields}
    np.savez(folder / "observations.npz", **fields, **recording.images)


def run(python: Path, script: str, folder: Path, port: int) -> None:
    done = subprocess.run(
        [python, "-c", textwrap.dedent(script), folder, str(port)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_openpi_client(arm: Any, served: Served, tmp_path: Path) -> None:
    python = create_environment(tmp_path / "venv", OPENPI)
    write_observations(tmp_path, arm.recordings[0], served)
    script = """
        import sys
        import numpy as np
        from openpi_client.action_chunk_broker import ActionChunkBroker
        from openpi_client.websocket_client_policy import WebsocketClientPolicy

        folder, port = sys.argv[1:]
        data = dict(np.load(f"{folder}/observations.npz"))
        policy = WebsocketClientPolicy("127.0.0.1", int(port))
        assert policy.get_server_metadata()["chunk_steps"] == 6
        broker = ActionChunkBroker(policy, 1)
        actions = []
        for step in range(7):
            found = {name: values[step] for name, values in data.items()}
            actions.append(broker.infer({**found, "prompt": "lift the lid", "step": step, "seed": 3})["actions"])
        np.save(f"{folder}/actions.npy", np.stack(actions))
        try:
            policy.infer({"prompt": "nothing else"})
        except RuntimeError as error:
            assert "give the control step" in str(error), error
        else:
            raise AssertionError("no error")
    """
    with serve(served) as ports:
        run(python, script, tmp_path, ports.websocket)
    found = np.load(tmp_path / "actions.npy")
    assert found.shape == (7, 10)
    # the first prediction is the one of a policy in this process; later ones are made at every step here
    assert np.array_equal(found[0], join(act_in_process(arm, arm.recordings[0], seed=3, num_steps=1)[0], served))


def test_vla_eval_harness(arm: Any, served: Served, tmp_path: Path) -> None:
    python = create_environment(tmp_path / "venv", VLA_EVAL)
    write_observations(tmp_path, arm.recordings[0], served)
    script = """
        import json
        import sys
        from vla_eval.api import run

        folder, port = sys.argv[1:]
        entry = {"benchmark": "toy_benchmark:ToyBenchmark", "params": {"folder": folder}, "episodes_per_task": 1}
        config = {"server": {"url": f"ws://127.0.0.1:{port}/vla_eval"}, "benchmarks": [entry | {"max_steps": 50}]}
        results = run(config, docker=False, no_save=True, output_dir=folder)
        with open(f"{folder}/results.json", "w", encoding="utf-8") as file:
            json.dump(results, file, default=str)
    """
    log = tmp_path / "requests.jsonl"
    with serve(served, request_log=str(log)) as ports:
        run(python, script, tmp_path, ports.websocket)
    (result,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (task,) = result["tasks"]
    assert [episode["metrics"]["success"] for episode in task["episodes"]] == [True]
    assert result["num_errors"] == 0
    assert result["server_info"]["model_server"] == "arm"
    # the seed comes from the task
    seed = json.loads(log.read_text(encoding="utf-8").splitlines()[0])["seed"]
    expected = act_in_process(arm, arm.recordings[0], seed=seed, num_steps=7)
    assert np.array_equal(np.load(tmp_path / "actions.npy"), np.stack([join(action, served) for action in expected]))


def test_evaluate_harness_reads_the_outcomes(arm: Any, served: Served, tmp_path: Path) -> None:
    python = create_environment(tmp_path / "venv", VLA_EVAL)
    write_observations(tmp_path, arm.recordings[0], served)
    benchmark = {"benchmark": "toy_benchmark:ToyBenchmark", "params": {"folder": str(tmp_path)}, "max_steps": 50}
    benchmarks = [benchmark | {"episodes_per_task": 2}]
    (tmp_path / "toy.yaml").write_text(json.dumps({"benchmarks": benchmarks}), encoding="utf-8")
    words = ["evaluate", "harness", "--checkpoint", str(arm.run), "--device", "cpu", "--docker", "false"]
    words += ["--benchmark_config", str(tmp_path / "toy.yaml"), "--output", str(tmp_path / "out")]
    words += ["--harness_command", str(python.parent / "vla-eval")]
    done = subprocess.run(
        [sys.executable, "-m", "vla_foundry.cli", *words],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path.cwd()}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lift: 2/2 = 100%" in done.stdout
    (path,) = (tmp_path / "out/arm/lift/rollouts").glob("*/results.json")
    episodes, settings = read_results(path)
    assert [(episode.outcome, episode.num_steps) for episode in episodes] == [("success", 7)] * 2
    assert settings["harness_version"] == "0.8.0"
