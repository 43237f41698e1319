"""The same numbers under DDP, FSDP2, accumulation and on one process."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_foundry.params.distributed import DistributedParams
from vla_foundry.run_folder import list_step_folders
from vla_foundry.training.distributed import start_process_group
from vla_foundry.world import World

# name -> changes to the params of tiny_run.py (20 steps, global batch 16, clipping, EMA, two validations)
SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, half the accumulation": {"hparams__per_gpu_batch_size": 4},
    "ddp, activation checkpointing": {"hparams__grad_checkpointing": True},
    "fsdp": {"distributed__fsdp": True},
    "fsdp, resharding and activation checkpointing": {
        "distributed__fsdp": True,
        "distributed__fsdp_reshard_after_forward": True,
        "hparams__grad_checkpointing": True,
    },
    "ddp, single precision": {"hparams__precision": "fp32"},
    "fsdp, single precision": {"distributed__fsdp": True, "hparams__precision": "fp32"},
    "ddp, a spoiled microbatch of one rank": {"spoiled": [16 * 4 + 2]},
    "fsdp, a spoiled microbatch of one rank": {"distributed__fsdp": True, "spoiled": [16 * 4 + 2]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(tiny, folder: Path) -> dict[str, Any]:
    """Each scenario on one process without wrappers."""
    results: dict[str, Any] = {}
    for name, changes in SCENARIOS.items():
        kept = {key: value for key, value in changes.items() if key in ("spoiled", "hparams__precision")}
        same = next((other for other in results if results[other]["changes"] == kept), None)
        if same is None:
            results[name] = tiny.run_scenario({"save_path": str(folder), "name": f"alone {name}", **kept}, World())
            results[name]["changes"] = kept
        else:
            results[name] = results[same]
    return results


@pytest.fixture(scope="module")
def together(alone: dict[str, Any], run_on_two_ranks, folder: Path) -> list[dict[str, Any]]:
    """Each scenario on two ranks, by rank; and one that goes on from the single process's checkpoint."""
    scenarios = {name: {"save_path": str(folder), "name": name, **changes} for name, changes in SCENARIOS.items()}
    scenarios["fsdp, from one process"] = {
        "save_path": str(folder),
        "name": "from one process",
        "distributed__fsdp": True,
        "start": str(folder / "alone ddp" / "checkpoints" / "step_00000010"),
    }
    # a position of rank 1 in the sixth step
    scenarios["stopped"] = {"save_path": str(folder), "name": "stopped", "stop_at": 5 * 16 + 2}
    return run_on_two_ranks(scenarios)


def assert_close(one: dict[str, Any], other: dict[str, Any], tolerance: float, first_step: int = 1) -> None:
    lines = [[line for line in result["lines"] if line["step"] >= first_step] for result in (one, other)]
    assert len(lines[0]) == len(lines[1])
    for mine, theirs in zip(*lines, strict=True):
        for key in ("kind", "step", "targets", "weights"):
            assert mine.get(key) == theirs.get(key)
        for key in ("loss", "grad_norm", "accuracy", "lr"):
            if theirs.get(key) is not None:
                assert mine[key] == pytest.approx(theirs[key], rel=tolerance), f"{key} at step {mine['step']}"
    for key in ("weights", "averages", "moments"):
        assert one[key].keys() == other[key].keys()
        for name, value in other[key].items():
            torch.testing.assert_close(one[key][name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))
    assert one["counters"] == other["counters"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_as_one_process_does(name: str, alone, together) -> None:
    tolerance = 1e-5 if "single precision" in name else 1e-9
    for result in together:
        assert_close(result[name], alone[name], tolerance)


def test_every_global_batch_has_the_same_samples(alone, together) -> None:
    for name in SCENARIOS:
        ranks = [
            chain.from_iterable(result[name]["positions"][: len(alone["ddp"]["positions"])]) for result in together
        ]
        assert set(chain.from_iterable(ranks)) >= set(range(20 * 16)) | set(range(24))
    per_batch = 16 // 2 // 2
    for step in range(10):
        places = slice(step * per_batch, (step + 1) * per_batch)
        samples = [sample for result in together for batch in result["ddp"]["positions"][places] for sample in batch]
        assert sorted(samples) == list(range(step * 16, (step + 1) * 16))


def test_a_checkpoint_of_sharded_ranks_goes_on_in_one_process_and_back(tiny, alone, together, folder: Path) -> None:
    sharded = list_step_folders(folder / "fsdp")[-1]
    assert len(list((sharded / "training_state").iterdir())) == 2
    result = tiny.run_scenario({"save_path": str(folder), "name": "from two ranks", "start": str(sharded)}, World())
    assert_close(result, alone["ddp"], 1e-9, first_step=11)
    assert_close(together[0]["fsdp, from one process"], alone["ddp"], 1e-9, first_step=11)


def test_a_spoiled_microbatch_skips_the_update_on_every_rank(together) -> None:
    for result in together:
        for kind in ("ddp", "fsdp"):
            spoiled = result[f"{kind}, a spoiled microbatch of one rank"]
            assert spoiled["counters"]["skipped"] == 1
            assert spoiled["counters"]["updates"] == 19
            assert spoiled["lines"][4]["loss"] is None


def test_sigterm_of_one_rank_stops_all_at_the_same_step_with_a_checkpoint(together, folder: Path) -> None:
    steps = [result["stopped"]["step"] for result in together]
    assert steps == [7, 7]
    assert [path.name for path in list_step_folders(folder / "stopped")] == ["step_00000007"]


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all(launch, tiny, tmp_path: Path) -> None:
    scenario = {"save_path": str(tmp_path), "fail_at": 5 * 16 + 2, "distributed__fsdp": True}
    (tmp_path / "scenarios.json").write_text(json.dumps({"failing": scenario}), encoding="utf-8")
    done = launch(2, tiny.__file__, str(tmp_path / "scenarios.json"), str(tmp_path / "result"), timeout=60.0)
    assert done.returncode != 0
    assert "this rank fails" in done.stderr


def test_nccl_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        start_process_group(DistributedParams(dist_backend="nccl"), World(world_size=2))
