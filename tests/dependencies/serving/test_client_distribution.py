"""The client installs by itself, without torch, and drives a server."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dependencies.serving.test_published_clients import create_environment, run, write_observations
from tests.essential.serving.conftest import serve
from tests.essential.serving.test_grpc_server import act_in_process
from vla_foundry.serving.policies import Served

pytestmark = [pytest.mark.network, pytest.mark.slow]
CLIENT = Path(__file__).parents[3] / "vla_foundry" / "client"


def test_the_client_needs_no_torch(arm: Any, served: Served, tmp_path: Path) -> None:
    python = create_environment(tmp_path / "venv", ["hatchling"])
    built = ["uv", "build", "-q", "--wheel", "--no-build-isolation", "-p", python, "-o", tmp_path / "dist", CLIENT]
    subprocess.run(built, check=True, env={**os.environ, "VIRTUAL_ENV": str(tmp_path / "venv")})
    (wheel,) = (tmp_path / "dist").glob("vla_foundry_client-*.whl")
    other = create_environment(tmp_path / "other", [str(wheel)])
    write_observations(tmp_path, arm.recordings[0], served)
    script = """
        import importlib.util
        import sys
        import numpy as np
        from vla_foundry.client import RemotePolicy, RobotObservation

        folder, port = sys.argv[1:]
        assert importlib.util.find_spec("torch") is None
        data = dict(np.load(f"{folder}/observations.npz"))
        with RemotePolicy(f"127.0.0.1:{port}") as policy:
            cameras = [camera.name for camera in policy.metadata.cameras]
            policy.reset(3)
            actions = []
            for step in range(4):
                found = {name: values[step] for name, values in data.items()}
                images = {name: found.pop(name) for name in cameras}
                found.pop("rig.depth")  # the policy does not need this camera
                observation = RobotObservation(images=images, fields=found, instruction="lift the lid")
                actions.append(policy.act(observation))
        with RemotePolicy(f"127.0.0.1:{port}", execution="realtime") as policy:
            policy.reset(3)
            first = policy.act(observation)
            assert policy.delay_steps > 0 and first.keys() == policy.act(observation).keys()
        for name in actions[0]:
            np.save(f"{folder}/{name}.npy", np.stack([action[name] for action in actions]))
    """
    with serve(served) as ports:
        run(other, script, tmp_path, ports.grpc)
    expected = act_in_process(arm, arm.recordings[0], seed=3, num_steps=4)
    for name in expected[0]:
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), np.stack([action[name] for action in expected]))
