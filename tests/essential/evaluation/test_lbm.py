"""`evaluate --simulator lbm`, with a process that speaks the simulator's side of the protocol in place of its image."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.essential.inference.conftest import arm as arm
from tests.essential.inference.test_policy import ACTUAL
from vla_foundry.evaluation.evaluate import main
from vla_foundry.evaluation.results import read_summary

# `docker run`, as far as we use it: every episode is a client of its own; the third breaks down
STAND_IN = f"""#!{sys.executable}
import json, os, sys
import grpc, numpy as np
from vla_foundry.client.wire import decode, encode
from vla_foundry.serving import lbm

words = sys.argv[1:]
values = dict(words[at + 1].split("=") for at, word in enumerate(words) if word == "-e")
rollouts = words[words.index("-v") + 1].split(":")[0]
image, shell, launcher, task = words[-4:]
assert (words[0], image, shell, launcher) == ("run", "my/image", "bash", "/my/launch.sh"), words
assert words[words.index("--gpus") + 1] == "device=3"


def status():
    pose = lbm.RigidTransform(translation=np.array([0.1, 0.2, 0.3]), rotation=np.eye(3).ravel())
    arm = lbm.RobotPoseStatus(robot_name="right::arm", pose=pose)
    hand = lbm.RobotGripperStatus(gripper_name="right::hand", gripper_position=0.5)
    return lbm.PosesAndGrippers(pose_status=[arm], gripper_status=[hand])


def picture(camera, width, height):
    data = lbm.ImageData(height=height, width=width, channels=3, data=bytes(height * width * 3))
    return lbm.CameraImageSet(camera_serial=camera, has_rgb=True, camera_rgb=lbm.CameraImage(image=data))


def ask(name, request, answer):
    call = channel.unary_unary(f"/lbm_policy_interface.{{name}}Service/{{name}}")
    return decode(answer, call(encode(request), timeout=60))


evaluations = []
address = values["POLICY_HOST"] + ":" + values["POLICY_PORT"]
first, end = map(int, values["LAUNCH_DEMONSTRATION_INDICES"].split(":"))
with grpc.insecure_channel(address) as channel:
    ask("GetPolicyMetadata", lbm.GetPolicyMetadataRequest(client_identifier="me"), lbm.GetPolicyMetadataResponse)
    for index in range(first, end):
        client = f"episode {{index}}"
        assert ask("PolicyReset", lbm.PolicyResetRequest(client, index), lbm.PolicyResetResponse).success
        for _ in range(3):
            state = lbm.RobotState(actual=status(), desired=status())
            seen = [picture("front", 40, 30), picture("wrist", 20, 24)]
            seen = lbm.MultiarmObservation(state, seen, True, "lift the lid")
            reply = ask("PolicyStep", lbm.PolicyStepRequest(client, seen), lbm.PolicyStepResponse)
            assert reply.action.pose_status[0].robot_name == "right::arm"
        message = "Traceback" if index == 2 else None
        evaluations.append(
            dict(skill_type="lift_the_lid", scenario_index=index, is_success=index == 1, is_pending=False,
                 total_time=None if message else 0.3, failure_message=message)
        )
os.makedirs(rollouts + "/2026")
budget = int(values["MAX_SAMPLE_SIZE_PER_MODEL"])
with open(rollouts + "/2026/results.json", "w", encoding="utf-8") as file:
    json.dump(dict(max_sample_size_per_model=budget, evaluations=evaluations), file)
"""


def test_the_whole_loop_runs(
    arm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ACTUAL.startswith("robot__actual__poses__right::arm")
    (tmp_path / "docker").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    words = ["--simulator", "lbm", "--checkpoint", str(arm.run), "--tasks", "LiftTheLid", "--episodes", "0:4"]
    words += ["--lbm.image", "my/image", "--lbm.launcher", "/my/launch.sh", "--lbm.gpu", "3", "--name", "mine"]
    words += ["--output", str(tmp_path / "out"), "--device", "cpu", "--max_sample_size", "5", "--lbm.port", "50737"]
    main([*words, "--dry_run"])
    shown = capsys.readouterr().out
    assert f"-v {tmp_path}/out/mine/LiftTheLid/rollouts:/tmp/lbm/rollouts my/image bash /my/launch.sh" in shown
    assert "--gpus device=3" in shown
    assert "-e POLICY_PORT=50737" in shown
    assert not (tmp_path / "out").exists()
    main(words)
    assert "LiftTheLid: 1/3 = 33% [6%, 79%], 1 invalid" in capsys.readouterr().out
    rate = read_summary(tmp_path / "out/mine/summary.json")["LiftTheLid"]
    assert (rate.num_successes, rate.num_trials, rate.num_invalid) == (1, 3, 1)
    # complete results are read again; a second container would fail: it makes a new folder
    main(words)
    with pytest.raises(ValueError, match="ended with code 1 at task LiftTheLid"):
        main([*words[:7], "0:5", *words[8:]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["--lbm.command", "no-such-program"], r"'no-such-program' is not found\. Install it"),
        (["--lbm.command", "evaluate", "--episodes", "3:5"], r"episodes \('3:5'\) must start at 0 for lbm.command"),
        (["--lbm.command", "'evaluate"], "lbm.command ''evaluate' cannot be read"),
        (["--policy", "null"], "policy 'null' takes no checkpoint"),
        (["--simulator", "metaworld", "--dry_run"], "dry_run is for simulator 'lbm'"),
    ],
)
def test_what_cannot_run_is_one_line(arm: Any, tmp_path: Path, values: list[str], message: str) -> None:
    words = ["--simulator", "lbm", "--checkpoint", str(arm.run), "--tasks", "T", "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        main([*words, *values])
    assert not (tmp_path / "out").exists()


def test_an_installed_command_is_told_where_the_policy_is(
    arm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--simulator", "lbm", "--policy_server", "robot:7", "--tasks", "T", "--output", str(tmp_path)]
    main([*words, "--lbm.command", "uv run evaluate", "--episodes", "0:20", "--name", "mine", "--dry_run"])
    shown = capsys.readouterr().out
    assert shown.startswith("uv run evaluate --skill_type T --num_evaluations 20 --num_processes 1")
    assert shown.endswith(f"--output_directory {tmp_path}/mine/T/rollouts --server_uri robot:7\n")


def test_results_of_a_server_are_named_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--simulator", "lbm", "--policy_server", "robot:50051", "--tasks", "T", "--output", str(tmp_path)]
    main([*words, "--lbm.command", "evaluate", "--dry_run"])
    assert f"{tmp_path}/robot_50051/T/rollouts" in capsys.readouterr().out
