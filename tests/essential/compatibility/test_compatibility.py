"""Files that earlier versions wrote are read to the same values, train on and act the same; see README.md."""

import importlib.util
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vla_foundry.cli import main
from vla_foundry.params import ModelParams, dump_params, load_experiment_params_from_yaml, load_params_from_yaml
from vla_foundry.run_folder import find_checkpoint

FOLDER = Path(__file__).parent
RUNS = ("llm", "vlm", "flow", "regression", "ddpm", "imported_options")
POLICIES = RUNS[2:]
# keys that may be missing today, if they had this value; see the migrations
GONE: dict[str, Any] = {
    "attn_name": "torch_attn",
    "model.action_head.final_norm": True,
    "model.action_head.time_encoding": "mlp",
    "model.action_head.noise.clamp_range": None,
    "model.action_head.noise.num_timesteps": None,
    "model.action_head.noise.sampling_time_shift": 0.0,
}
# (run, key) -> its value today
CHANGED = {
    ("flow", "model.action_head.time_conditioning"): "adaln_zero",
    ("regression", "model.type"): "regression_policy",
    ("imported_options", "model.action_head.type"): "legacy_flow_transformer",
    ("imported_options", "model.action_head.noise.type"): "legacy_flow",
}


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"compatibility_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The script that wrote the files."""
    return load_module(FOLDER / "make.py")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of version 0.1.0."""
    folder = tmp_path_factory.mktemp("compatibility") / "files"
    with tarfile.open(FOLDER / "files_0.1.0.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(unpacked: Path) -> dict[str, Any]:
    """What version 0.1.0 made of them."""
    return json.loads((unpacked / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def files(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the files as the working directory; one thread, as they were written with."""
    shutil.copytree(unpacked, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "files"
    torch.set_num_threads(num_threads)


def leaves_of(tree: Any, path: str = "") -> dict[str, Any]:
    """Every value that is not a mapping, by dotted key."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {key: leaf for name in tree for key, leaf in leaves_of(tree[name], f"{path}.{name}".strip(".")).items()}


@pytest.mark.parametrize("name", RUNS)
def test_configs_load_to_equal_values(name: str, files: Path) -> None:
    written = leaves_of(yaml.safe_load((files / f"runs/{name}/config.yaml").read_text(encoding="utf-8")))
    params = load_experiment_params_from_yaml(f"runs/{name}/config.yaml")
    found = leaves_of(yaml.safe_load(dump_params(params)))
    for key, value in written.items():
        if key in found:
            assert found[key] == CHANGED.get((name, key), value), key
        else:
            assert [old for suffix, old in GONE.items() if key.endswith(suffix)] == [value], key
    assert load_params_from_yaml(ModelParams, f"runs/{name}/config_model.yaml") == params.model


@pytest.mark.parametrize("name", RUNS)
def test_samples_are_read_to_equal_values(name: str, files: Path, make: ModuleType, expected: dict[str, Any]) -> None:
    found = make.read_samples(name)
    assert set(expected["samples"][name]) <= set(found)
    for key, value in expected["samples"][name].items():
        if key in ("actions", "proprioception"):
            np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-6, err_msg=key)
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("name", RUNS)
def test_runs_go_on_with_the_losses_they_had(
    name: str, files: Path, make: ModuleType, expected: dict[str, Any]
) -> None:
    metrics = files / "runs" / name / "metrics.jsonl"
    before = metrics.read_text(encoding="utf-8")
    assert find_checkpoint(files / "runs" / name).name == "step_00000002"
    main(["train", "--config_path", f"runs/{name}/config.yaml", "--resume", "auto"])
    after = metrics.read_text(encoding="utf-8")
    assert after.startswith(before)
    losses = make.read_losses([json.loads(line) for line in after.splitlines()])
    # the last digits depend on the processor
    assert losses == pytest.approx(expected["losses"][name], rel=1e-6)
    assert find_checkpoint(files / "runs" / name).name == "step_00000004"


@pytest.mark.parametrize("name", POLICIES)
def test_policies_act_as_they_did(name: str, files: Path, make: ModuleType, expected: dict[str, Any]) -> None:
    found = make.act(name)
    assert [list(actions) for actions in found] == [list(actions) for actions in expected["actions"][name]]
    for actions, those in zip(found, expected["actions"][name], strict=True):
        for key, value in those.items():
            np.testing.assert_allclose(actions[key], value, rtol=0, atol=1e-5, err_msg=key)


def test_statistics_merge_and_are_computed_as_they_were(files: Path) -> None:
    written = json.loads((files / "robot_episodes/stats.json").read_text(encoding="utf-8"))
    main(["stats", "robot_episodes", "--num_workers", "0", "--output", "computed.json"])
    computed = json.loads((files / "computed.json").read_text(encoding="utf-8"))
    merged_words = ["--merge", "[robot_episodes, robot_samples/stats.json]", "--output", "merged.json"]
    main(["stats", "robot_episodes", *merged_words])
    merged = json.loads((files / "merged.json").read_text(encoding="utf-8"))
    assert set(computed) == set(merged) == set(written)
    for name, values in written.items():
        for key in ("mean", "std", "min", "max", "mean_per_timestep", "percentile_5", "percentile_95"):
            np.testing.assert_allclose(computed[name][key], values[key], rtol=1e-9, atol=1e-12, err_msg=name)
        assert merged[name]["count"] == [2 * count for count in values["count"]]
        np.testing.assert_allclose(merged[name]["mean"], values["mean"], rtol=1e-9, atol=1e-12, err_msg=name)


def test_shards_verify(files: Path) -> None:
    for folder in ("text", "captions", "robot_episodes", "robot_samples"):
        main(["manifest", "verify", folder])


def test_an_evaluation_goes_on(files: Path, make: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent / "evaluation"))
    monkeypatch.setattr("vla_foundry.config.command_line._named", [])
    paths = sorted(files.glob("evaluation/random/*/rollouts/*/results.json"))
    before = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    assert [len(values["evaluations"]) for values in before] == [2, 2]
    main(["evaluate", *make.EVALUATION.split(), "--episodes", "0:4"])
    assert sorted(files.glob("evaluation/random/*/rollouts/*/results.json")) == paths
    for path, values in zip(paths, before, strict=True):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["evaluations"][:2] == values["evaluations"]
        assert [episode["outcome"] is not None for episode in found["evaluations"]] == [True] * 4
        assert found.keys() == values.keys()


def test_the_files_name_no_machine(unpacked: Path) -> None:
    for path in unpacked.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(word in content for word in (b"/root", b"/home/", b"/tmp/", b"/work")), path
