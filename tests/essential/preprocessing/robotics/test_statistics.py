import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_foundry.cli import main
from vla_foundry.params.commands.preprocessing_robotics import StatsParams
from vla_foundry.preprocessing.robotics.statistics import compute_statistics
from vla_foundry.robotics.statistics import FieldStatistics
from vla_foundry.robotics.statistics_format import parse_statistics

# more shards than are merged at once, so that there are two rounds of merging
LENGTHS = [9, 12, 7, 15, 10, 8, 11, 13, 9, 14]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stats")


@pytest.fixture(scope="module")
def recordings(folder: Path, write_episodes: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    return write_episodes(folder / "recordings", LENGTHS)


@pytest.fixture(scope="module")
def dataset(folder: Path, recordings: dict[str, Any], preprocess: Callable[..., Path]) -> Path:
    return preprocess(folder / "recordings", folder / "dataset", camera_names=["Front"])


@pytest.fixture(scope="module")
def samples(folder: Path, recordings: dict[str, Any], preprocess: Callable[..., Path]) -> Path:
    return preprocess(folder / "recordings", folder / "samples", camera_names=["Front"], layout="samples")


def read(path: Path) -> dict[str, FieldStatistics]:
    return parse_statistics(path.read_text(encoding="utf-8"), str(path))


def recompute(dataset: Path, **options: Any) -> Path:
    """Recompute beside a dataset, in this process."""
    output = Path(options.pop("output", dataset.parent / "recomputed.json"))
    options = {"num_workers": 0, "overwrite": True, **options}
    compute_statistics(StatsParams(folder=str(dataset), output=str(output), **options))
    return output


def test_recomputed_statistics_are_those_of_preprocessing_to_the_byte(dataset, tmp_path):
    assert len((dataset / "manifest.jsonl").read_text(encoding="utf-8").splitlines()) > 8
    output = recompute(dataset, output=tmp_path / "again.json")
    assert output.read_bytes() == (dataset / "stats.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.json"]


@pytest.mark.slow
def test_ray_gives_the_same_bytes_as_this_process(dataset, tmp_path, ray_cluster):
    output = recompute(dataset, output=tmp_path / "again.json", num_workers=2, ray_address=ray_cluster)
    assert output.read_bytes() == (dataset / "stats.json").read_bytes()


def test_the_other_layout_has_the_same_statistics(dataset, samples):
    found, expected = read(recompute(samples)), read(dataset / "stats.json")
    assert found.keys() == expected.keys()
    for name, statistics in expected.items():
        assert (found[name].count == statistics.count).all()
        np.testing.assert_allclose(found[name].mean_per_timestep, statistics.mean_per_timestep, atol=1e-10)
        np.testing.assert_allclose(found[name].std_per_timestep, statistics.std_per_timestep, atol=1e-10)
        np.testing.assert_allclose(found[name].percentiles[5], statistics.percentiles[5], atol=1e-10)


def test_another_window_is_that_of_data_preprocessed_with_it(folder, recordings, preprocess, tmp_path):
    options = {"camera_names": ["Front"], "max_padding_left": 99, "max_padding_right": 99}
    narrow = preprocess(folder / "recordings", tmp_path / "narrow", **options)
    wide = preprocess(folder / "recordings", tmp_path / "wide", past_lowdim_steps=4, future_lowdim_steps=9, **options)
    output = recompute(narrow, past_lowdim_steps=4, future_lowdim_steps=9)
    assert output.read_bytes() == (wide / "stats.json").read_bytes()
    assert output.read_bytes() != (narrow / "stats.json").read_bytes()


def test_an_independent_reader_finds_the_same_mean_and_percentiles(dataset, recordings, rig):
    found = read(dataset / "stats.json")[rig.ACTION_XYZ]
    rows = []
    for arrays in recordings.values():
        values = arrays[f"field|{rig.ACTION_XYZ}"]
        last = len(values) - 1
        for anchor in range(len(values)):
            if anchor >= 1 and anchor + 5 - last <= 7:  # the limits on padding
                steps = np.arange(anchor - 2, anchor + 6)
                row = values[np.clip(steps, 0, last)].copy()
                row[(steps < 0) | (steps > last)] = np.nan
                rows.append(row)
    windows = np.stack(rows)
    np.testing.assert_allclose(found.mean_per_timestep, np.nanmean(windows, axis=0), atol=1e-12)
    assert (found.count == (~np.isnan(windows[..., 0])).sum(axis=0)).all()
    expected = np.nanpercentile(windows.reshape(-1, 3), 95, axis=0)
    np.testing.assert_allclose(found.percentiles[95], expected, atol=1e-9)


def test_images_are_not_decoded(dataset, tmp_path):
    broken = shutil.copytree(dataset, tmp_path / "broken")
    for path in broken.glob("*.tar"):
        with tarfile.open(path) as tar:
            spans = [(member.offset_data, member.size) for member in tar if member.name.endswith(".jpg")]
        assert spans
        with path.open("r+b") as file:
            for offset, size in spans:
                file.seek(offset)
                file.write(bytes(size))
    assert recompute(broken).read_bytes() == (dataset / "stats.json").read_bytes()


def test_shards_without_an_index_are_read(dataset, tmp_path):
    foreign = shutil.copytree(dataset, tmp_path / "foreign")
    for path in foreign.glob("*.index.json"):
        path.unlink()
    assert recompute(foreign).read_bytes() == (dataset / "stats.json").read_bytes()


def test_old_statistics_stay_unless_they_are_to_be_replaced(dataset, tmp_path, capsys):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (copy / "stats.json").write_text("old", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["stats", str(copy), "--num_workers", "0"])
    assert stopped.value.code == 2
    assert "stats.json exists. Replace it with --overwrite true" in capsys.readouterr().err
    assert (copy / "stats.json").read_text(encoding="utf-8") == "old"
    main(["stats", str(copy), "--num_workers", "0", "--overwrite"])
    assert (copy / "stats.json").read_bytes() == (dataset / "stats.json").read_bytes()


def test_a_broken_shard_is_named_and_leaves_the_old_statistics(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    shard = sorted(copy.glob("*.tar"))[3]
    content = shard.read_bytes()
    place = content.index(b"PK\3\4")  # the first array of the first lowdim.npz
    shard.write_bytes(content[: place + 200] + b"\xff" * 64 + content[place + 264 :])
    with pytest.raises(ValueError, match=rf"{shard.name}: .*(damaged|header)"):
        recompute(copy, output=copy / "stats.json")
    assert (copy / "stats.json").read_bytes() == (dataset / "stats.json").read_bytes()
    assert not (copy / "stats.json.parts").exists()


def test_merged_statistics_are_those_of_all_episodes_together(folder, dataset, preprocess, tmp_path):
    for name, part in (("a", LENGTHS[:4]), ("b", LENGTHS[4:])):
        (tmp_path / f"recordings_{name}").mkdir()
        start = 0 if name == "a" else 4
        for seed in range(start, start + len(part)):
            shutil.copy(folder / "recordings" / f"run_{seed}.npz", tmp_path / f"recordings_{name}")
        preprocess(tmp_path / f"recordings_{name}", tmp_path / name, camera_names=["Front"])
    parts = [str(tmp_path / "a"), str(tmp_path / "b")]
    compute_statistics(StatsParams(folder=str(tmp_path / "both"), merge=parts))
    compute_statistics(StatsParams(folder=str(tmp_path / "reversed"), merge=[f"{parts[1]}/stats.json", parts[0]]))
    expected = read(dataset / "stats.json")
    for merged in (read(tmp_path / "both" / "stats.json"), read(tmp_path / "reversed" / "stats.json")):
        assert merged.keys() == expected.keys()
        for name, statistics in expected.items():
            assert (merged[name].count == statistics.count).all()
            np.testing.assert_allclose(merged[name].mean_per_timestep, statistics.mean_per_timestep, atol=1e-10)
            np.testing.assert_allclose(merged[name].std_per_timestep, statistics.std_per_timestep, atol=1e-10)


def test_datasets_that_contradict_each_other_are_not_merged(dataset, tmp_path):
    other = shutil.copytree(dataset, tmp_path / "other")
    spec = json.loads((other / "robotics.json").read_text(encoding="utf-8"))
    (other / "robotics.json").write_text(json.dumps(spec | {"fps": 2 * spec["fps"]}), encoding="utf-8")
    params = {"folder": str(tmp_path / "both"), "merge": [str(dataset), str(other)]}
    with pytest.raises(ValueError, match=r"10 frames a second .* 20: .*--accept_contradictions true"):
        compute_statistics(StatsParams(**params))
    compute_statistics(StatsParams(**params, accept_contradictions=True))
    assert (tmp_path / "both" / "stats.json").exists()


def test_a_larger_window_than_stored_samples_hold_is_refused(samples):
    with pytest.raises(ValueError, match="is larger than the stored one"):
        recompute(samples, future_lowdim_steps=20)


def test_remote_datasets_are_read_and_written(dataset, s3_bucket):
    from vla_foundry.storage.uri import list_relative, read_bytes, upload

    remote = f"{s3_bucket}/dataset"
    for path in dataset.iterdir():
        if path.name != "stats.json":
            upload(str(path), f"{remote}/{path.name}")
    compute_statistics(StatsParams(folder=remote, num_workers=0))
    assert read_bytes(f"{remote}/stats.json") == (dataset / "stats.json").read_bytes()
    assert not [name for name in list_relative(remote) if "parts" in name]
