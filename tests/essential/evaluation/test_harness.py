"""`evaluate harness`, with a stand-in for the harness; tests/dependencies runs the published one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.essential.inference.conftest import arm as arm
from vla_foundry.evaluation.evaluate import main
from vla_foundry.evaluation.harness import find_harness, name_folders, read_aggregates
from vla_foundry.evaluation.results import find_results, read_results, read_summary

EPISODES: list[dict[str, Any]] = [
    {"episode_id": 0, "metrics": {"success": True}, "steps": 7},
    {"episode_id": 1, "metrics": {"success": False}, "steps": 9},
    {"episode_id": 2, "metrics": {"success": False}, "failure_reason": "timeout", "failure_detail": "no reply"},
]
AGGREGATE: dict[str, Any] = {
    "benchmark": "toy",
    "harness_version": "0.8.0",
    "config": {"seed": 0},
    "tasks": [{"task": "lift the lid/now", "episodes": EPISODES}],
}
STAND_IN = """
import json, sys
from websockets.sync.client import connect
import msgpack
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
with connect(words["--server-url"], compression=None) as connection:
    hello = {"type": "hello", "payload": {"protocol_version": 1}, "seq": 1, "timestamp": 0.0}
    connection.send(msgpack.packb(hello))
    assert msgpack.unpackb(connection.recv())["payload"]["model_server"] == "mine"
given = json.load(open(words["--config"], encoding="utf-8"))
if given:
    with open(words["--output-dir"] + "/toy_aggregate.json", "w", encoding="utf-8") as file:
        json.dump(given, file)
sys.exit(0 if given else 3)
"""


def test_outcomes_come_in_our_layout(arm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    config = tmp_path / "benchmark.yaml"
    config.write_text(json.dumps(AGGREGATE), encoding="utf-8")
    words = ["harness", "--checkpoint", str(arm.run), "--benchmark_config", str(config), "--name", "mine"]
    words += ["--output", str(tmp_path / "out"), "--device", "cpu"]
    command = f"{sys.executable} {tmp_path / 'stand_in.py'}"
    main([*words, "--harness_command", command])
    assert "lift the lid/now: 1/2 = 50%" in capsys.readouterr().out
    found = find_results(tmp_path / "out/mine/lift_the_lid_now")
    assert found is not None
    episodes, settings = read_results(found)
    assert [episode.outcome for episode in episodes] == ["success", "failure", "invalid"]
    assert episodes[2].failure_message == "timeout: no reply"
    assert settings["benchmark"] == "toy"
    assert len(settings["weights_sha256"]) == 64
    assert read_summary(tmp_path / "out/mine/summary.json")["lift the lid/now"].num_invalid == 1
    for given, fault in (({}, "code 3 and left no results"), (AGGREGATE | {"tasks": []}, "code 0 and ran no episode")):
        config.write_text(json.dumps(given), encoding="utf-8")
        with pytest.raises(ValueError, match=f"ended with {fault}"):
            main([*words, "--harness_command", command])
    (tmp_path / "no_program").write_bytes(b"\0")
    (tmp_path / "no_program").chmod(0o755)
    with pytest.raises(ValueError, match=r"harness_command .*no_program cannot be run: Exec format error"):
        main([*words, "--harness_command", str(tmp_path / "no_program")])
    # both before the checkpoint is loaded
    with pytest.raises(ValueError, match=r"harness_command 'no-such-harness' is not found. Install"):
        main([*words, "--harness_command", "no-such-harness"])
    with pytest.raises(FileNotFoundError, match=r"nothing.yaml does not exist"):
        main([*words, "--harness_command", command, "--benchmark_config", str(tmp_path / "nothing.yaml")])


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": [{"task": "a", "episodes": [{"episode_id": 0, "metrics": {}}]}]},
        {"tasks": [{"task": "a", "episodes": [{"episode_id": 0, "metrics": {"success": "yes"}}]}]},
        {"tasks": [{"task": 5, "episodes": EPISODES}]},
        {"tasks": [{"task": "a", "episodes": [EPISODES[0] | {"episode_id": "first"}]}]},
        {"tasks": [{"task": "a", "episodes": [EPISODES[0] | {"steps": "many"}]}]},
        {"tasks": None},
    ],
)
def test_a_broken_result_file_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "toy_aggregate.json"
    file.write_text(json.dumps(AGGREGATE | change), encoding="utf-8")
    with pytest.raises(ValueError, match=r"toy_aggregate.json is not a result file of the harness"):
        read_aggregates([file])


def test_no_episode_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "toy_aggregate.json"
    twice = [{"task": "a", "episodes": [episode]} for episode in EPISODES]
    file.write_text(json.dumps(AGGREGATE | {"tasks": twice}), encoding="utf-8")
    assert [episode.seed for episode in read_aggregates([file])["a"][0]] == [0, 1, 2]
    # names that make the same folder, also where case does not count
    tasks = [
        "lift the lid",
        "lift the lid.",
        "Lift_the_lid",
        "lift the lid 2",
        *("x" * 200 + end for end in "ab"),
        "..",
    ]
    expected = ["lift_the_lid", "lift_the_lid_2", "Lift_the_lid_3", "lift_the_lid_2_2", "x" * 120, "x" * 120 + "_2"]
    assert name_folders(tasks) == [*expected, "task"]


def test_the_command_is_words() -> None:
    assert find_harness(f"{sys.executable} -m vla_eval") == [sys.executable, "-m", "vla_eval"]
    with pytest.raises(ValueError, match="harness_command '\"vla' cannot be read: No closing quotation"):
        find_harness('"vla')
