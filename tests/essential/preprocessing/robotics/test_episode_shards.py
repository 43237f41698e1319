"""A failed episode leaves nothing behind, whatever fails in it and whenever; each failure is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_foundry.preprocessing.robotics.converters.converter import create_converter
from vla_foundry.preprocessing.robotics.episode_shards import ShardJob, write_episode_shard
from vla_foundry.preprocessing.robotics.recipe import create_recipe
from vla_foundry.preprocessing.tasks import Task


@pytest.fixture
def write_shard(rig, tmp_path):
    """A function that writes all episodes of a folder, in order, to one shard; returns its folder and the result."""

    def write(source: Path, name: str, **options: Any) -> tuple[Path, dict[str, Any]]:
        params = rig.RigParams(source_episodes=[str(source)], output_dir=str(tmp_path / name), **options)
        converter = create_converter(params)
        job = ShardJob(recipe=create_recipe(params, converter), folder=str(tmp_path / name))
        refs = converter.discover_episodes()
        return tmp_path / name, write_episode_shard(job, Task(number=0, name="shard 0", weight=1, payload=refs))

    return write


def test_an_episode_that_breaks_off_is_cut_out_of_its_shard(tmp_path, write_episodes, write_shard):
    episodes = write_episodes(tmp_path / "raw", [12, 12, 12])
    episodes["run_1"]["breaks_at"] = np.int64(7)  # after seven frames were written
    np.savez(tmp_path / "raw" / "run_1.npz", **episodes["run_1"])
    broken, result = write_shard(tmp_path / "raw", "broken")
    assert [episode["outcome"] for episode in result["episodes"]] == ["written", "failed", "written"]
    assert result["episodes"][1]["reason"] == "video.mp4: frame 7 can not be decoded."
    (tmp_path / "raw" / "run_1.npz").unlink()
    whole, _ = write_shard(tmp_path / "raw", "whole")
    for name in ("shard_000000.tar", "shard_000000.index.json", "_progress/statistics_000000.npz"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_shard_of_failures_alone_is_not_written(tmp_path, write_episodes, write_shard):
    episodes = write_episodes(tmp_path / "raw", [12])
    episodes["run_0"]["fps"] = np.float64(-1)
    np.savez(tmp_path / "raw" / "run_0.npz", **episodes["run_0"])
    folder, result = write_shard(tmp_path / "raw", "out")
    assert result["entry"] is None
    assert not list(folder.glob("shard_*"))


def test_an_error_that_no_converter_foresaw_is_named_too(tmp_path, write_episodes, write_shard, monkeypatch, rig):
    write_episodes(tmp_path / "raw", [12, 12])
    read = rig.RigConverter.read_episode

    def fail(self, ref):
        return read(self, ref) if ref.episode_id == "run_1" else {}["state"]

    monkeypatch.setattr(rig.RigConverter, "read_episode", fail)
    _, result = write_shard(tmp_path / "raw", "out")
    assert result["episodes"][0]["reason"] == "KeyError: 'state'"
    assert result["episodes"][1]["outcome"] == "written"


def test_trouble_of_the_machine_is_no_failure_of_the_episode(tmp_path, write_episodes, write_shard, monkeypatch, rig):
    write_episodes(tmp_path / "raw", [12])

    def fail(self, ref):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rig.RigConverter, "read_episode", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_shard(tmp_path / "raw", "out")


def break_episode(folder: Path, episodes: dict[str, Any], name: str) -> None:
    episodes[name]["field|robot__action__poses__arm::hand__xyz"][3, 1] = np.nan
    np.savez(folder / f"{name}.npz", **episodes[name])


def test_a_failure_stops_the_job_and_names_the_episode(tmp_path, write_episodes, preprocess):
    break_episode(tmp_path / "raw", write_episodes(tmp_path / "raw", [12, 12, 12]), "run_1")
    with pytest.raises(
        ValueError, match=r"1 of 3 episodes failed, the first run_1 .*holds nan at frame 3, column 1.*0.33"
    ):
        preprocess(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [episode["episode"] for episode in report["failed_episodes"]] == ["run_1"]
    assert report["failed_episodes"][0]["source"] == "raw/run_1.npz"


@pytest.mark.parametrize("layout", ["episodes", "samples"])
def test_failures_that_are_allowed_are_left_out_and_reported(layout, tmp_path, write_episodes, preprocess, read_tars):
    break_episode(tmp_path / "raw", write_episodes(tmp_path / "raw", [12, 12, 12]), "run_1")
    folder = preprocess(tmp_path / "raw", tmp_path / "out", layout=layout, max_failed_fraction=0.34)
    assert {key.rpartition("_t")[0] or key for key in read_tars(folder)} == {"run_0", "run_2"}
    (tmp_path / "raw" / "run_1.npz").unlink()
    others = preprocess(tmp_path / "raw", tmp_path / "others", layout=layout)
    found, expected = (json.loads((place / "stats.json").read_text(encoding="utf-8")) for place in (folder, others))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name]["count"] == values["count"]
        for key in ("mean", "std", "min", "max", "percentile_5_per_timestep"):
            np.testing.assert_allclose(found[name][key], values[key], atol=1e-12, err_msg=f"{name} {key}")


def test_values_that_are_not_finite_are_left_out_if_asked(tmp_path, write_episodes, preprocess, read_tars):
    break_episode(tmp_path / "raw", write_episodes(tmp_path / "raw", [12, 12]), "run_0")
    folder = preprocess(tmp_path / "raw", tmp_path / "out", fail_on_nan=False)
    assert read_tars(folder).keys() == {"run_1"}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["left_out_episodes"] == [{"episode": "run_0", "source": "raw/run_0.npz", "reason": "not finite"}]


def test_what_failed_is_tried_again_when_it_was_mended(tmp_path, write_episodes, preprocess, read_tars):
    episodes = write_episodes(tmp_path / "raw", [12, 12])
    episodes["run_0"]["breaks_at"] = np.int64(3)
    np.savez(tmp_path / "raw" / "run_0.npz", **episodes["run_0"])
    with pytest.raises(ValueError, match="1 of 2 episodes failed"):
        preprocess(tmp_path / "raw", tmp_path / "out", layout="samples")
    episodes["run_0"]["breaks_at"] = np.int64(-1)  # the same size: nothing tells that the file has changed
    np.savez(tmp_path / "raw" / "run_0.npz", **episodes["run_0"])
    mended = preprocess(tmp_path / "raw", tmp_path / "out", layout="samples")
    fresh = preprocess(tmp_path / "raw", tmp_path / "fresh", layout="samples")
    for path in fresh.glob("*.tar"):
        assert (mended / path.name).read_bytes() == path.read_bytes()


def test_a_dataset_without_samples_is_refused(tmp_path, write_episodes, preprocess):
    write_episodes(tmp_path / "raw", [3])
    with pytest.raises(ValueError, match="gave no sample: no samples"):
        preprocess(tmp_path / "raw", tmp_path / "out", max_padding_left=0, max_padding_right=0)
