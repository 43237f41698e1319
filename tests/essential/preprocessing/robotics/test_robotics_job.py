"""Recordings become a dataset: both layouts, splits, failures, resuming, remote output."""

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from vla_foundry.preprocessing.manifest import build_manifest, verify_dataset
from vla_foundry.robotics.spec import parse_spec
from vla_foundry.storage.uri import list_relative, read_bytes

PAST, FUTURE = 2, 5
LENGTHS = [14, 9, 11]


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_episodes):
    return tmp_path_factory.mktemp("raw")


@pytest.fixture(scope="module")
def episodes(source, write_episodes):
    return write_episodes(source, LENGTHS)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, source, episodes, preprocess) -> dict[str, Path]:
    """The same recordings in both layouts."""
    folder = tmp_path_factory.mktemp("datasets")
    options = {"max_padding_left": 1, "max_padding_right": 3, "image_indices": [-2, 0, 3], "stride": 2}
    return {
        layout: preprocess(source, folder / layout, layout=layout, samples_per_shard=5, **options)
        for layout in ("episodes", "samples")
    }


def transform(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """A 4 x 4 transform from a position and the first two rows of a rotation matrix."""
    first, second = rotation[:3], rotation[3:]
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([first, second, np.cross(first, second)])
    matrix[:3, 3] = position
    return matrix


def expected_window(rig, arrays: dict[str, Any], anchor: int) -> dict[str, np.ndarray]:
    """The window around an anchor, one step at a time."""
    length = len(arrays["timestamps"])
    steps = [min(max(anchor + offset, 0), length - 1) for offset in range(-PAST, FUTURE + 1)]
    window = {
        name.removeprefix("field|"): np.stack([array[step] for step in steps])
        for name, array in arrays.items()
        if name.startswith("field|")
    }
    reference = transform(window[rig.ACTUAL_XYZ][PAST], window[rig.ACTUAL_ROTATION][PAST])
    relative = [
        np.linalg.inv(reference) @ transform(xyz, rotation)
        for xyz, rotation in zip(window[rig.ACTION_XYZ], window[rig.ACTION_ROTATION], strict=True)
    ]
    window[f"{rig.ACTION_XYZ}_relative"] = np.stack([matrix[:3, 3] for matrix in relative])
    window[f"{rig.ACTION_ROTATION}_relative"] = np.stack([matrix[:2, :3].reshape(6) for matrix in relative])
    inside = [0 <= anchor + offset < length for offset in range(-PAST, FUTURE + 1)]
    window["past_mask"] = np.array([is_in and step < PAST for step, is_in in enumerate(inside)])
    window["future_mask"] = np.array([is_in and step >= PAST for step, is_in in enumerate(inside)])
    return window


def expected_anchors(length: int) -> list[int]:
    return [t for t in range(0, length, 2) if PAST - t <= 1 and t + FUTURE - (length - 1) <= 3]


def test_samples_hold_what_an_independent_reader_cuts_from_the_recordings(rig, episodes, datasets, read_tars):
    samples = read_tars(datasets["samples"])
    expected = {
        f"{name}_t{t:06d}" for name, arrays in episodes.items() for t in expected_anchors(len(arrays["timestamps"]))
    }
    assert samples.keys() == expected
    for key, members in samples.items():
        name, _, anchor = key.rpartition("_t")
        window = expected_window(rig, episodes[name], int(anchor))
        lowdim = members["lowdim.npz"]
        assert window.keys() <= lowdim.keys()
        for field, values in window.items():
            assert lowdim[field].dtype == values.dtype
            np.testing.assert_allclose(lowdim[field], values, atol=1e-12, err_msg=field)


def test_episodes_hold_every_frame_once_and_the_recorded_numbers(rig, episodes, datasets, read_tars):
    blocks = read_tars(datasets["episodes"])
    assert blocks.keys() == episodes.keys()
    for name, arrays in episodes.items():
        info, lowdim, length = blocks[name]["episode.json"], blocks[name]["lowdim.npz"], len(arrays["timestamps"])
        assert info["anchors"] == expected_anchors(length)
        for key, values in arrays.items():
            if key.startswith("field|"):
                np.testing.assert_array_equal(lowdim[key.removeprefix("field|")], values)
        np.testing.assert_array_equal(lowdim["timestamp"], arrays["timestamps"])
        frames = {
            f"{camera.lower()}.{t:06d}.{'png' if camera == 'depth' else 'jpg'}"
            for camera in rig.CAMERAS
            for t in range(length)
        }
        assert frames == blocks[name].keys() - {"episode.json", "lowdim.npz"}


def test_both_layouts_hold_the_same_pictures(rig, episodes, datasets, read_tars):
    blocks, samples = read_tars(datasets["episodes"]), read_tars(datasets["samples"])
    for key, members in samples.items():
        name, _, anchor = key.rpartition("_t")
        length = len(episodes[name]["timestamps"])
        for offset in (-2, 0, 3):
            frame = min(max(int(anchor) + offset, 0), length - 1)
            for camera in rig.CAMERAS:
                ending = "png" if camera == "depth" else "jpg"
                data = members[f"{camera.lower()}_t{offset}.{ending}"]
                assert data == blocks[name][f"{camera.lower()}.{frame:06d}.{ending}"]
                picture = np.asarray(Image.open(io.BytesIO(data))).astype(int)
                assert np.abs(picture - episodes[name][f"images|{camera}"][frame]).mean() < 3
                if camera == "depth":
                    np.testing.assert_array_equal(picture, episodes[name]["images|depth"][frame])


def test_samples_have_the_published_members(datasets, read_tars):
    members = read_tars(datasets["samples"])["run_0_t000002"]
    images = [f"{camera}_t{offset}" for offset in (-2, 0, 3) for camera in ("front", "wrist.left", "depth")]
    endings = [f"{name}.{'png' if 'depth' in name else 'jpg'}" for name in images]
    assert list(members) == [*endings, "lowdim.npz", "metadata.json", "language_instructions.json"]
    assert members["language_instructions.json"] == {"original": ["drop it: begin"]}
    expected = {
        "episode_id": "run_0", "anchor_timestep": 2, "anchor_relative_idx": PAST, "image_timesteps": [0, 2, 5],
        "lowdim_start_timestep": 0, "lowdim_end_timestep": 7, "past_padding": 0, "future_padding": 0,
        "camera_names": ["Front", "wrist.left", "depth"], "original_episode_length": 14, "is_padded": False,
        "original_image_sizes": {"Front": [32, 24], "wrist.left": [32, 24], "depth": [32, 24]}, "operator": "A",
    }  # fmt: skip
    assert {key: members["metadata.json"][key] for key in expected} == expected
    assert members["lowdim.npz"]["original_intrinsics.Front"].shape == (8, 3, 3)
    assert members["lowdim.npz"]["extrinsics.Front"].shape == (8, 4, 4)


def test_samples_are_shuffled_over_the_whole_dataset(datasets):
    keys = [
        sample[0]
        for path in sorted(datasets["samples"].glob("*.index.json"))
        for sample in json.loads(path.read_text(encoding="utf-8"))["samples"]
    ]
    assert keys != sorted(keys)
    first_shard = json.loads((datasets["samples"] / "shard_000000.index.json").read_text(encoding="utf-8"))["samples"]
    assert len({key.rpartition("_t")[0] for key, _ in first_shard}) > 1


@pytest.mark.parametrize("layout", ["episodes", "samples"])
def test_what_lies_beside_the_shards(layout, rig, datasets):
    folder = datasets[layout]
    spec = parse_spec((folder / "robotics.json").read_text(encoding="utf-8"), "robotics.json")
    assert spec.layout == layout
    assert list(spec.cameras) == list(rig.CAMERAS)
    assert spec.cameras["depth"].is_depth
    assert spec.fields[rig.GRIPPER].gripper == rig.FIELDS[rig.GRIPPER].gripper
    assert spec.fields[f"{rig.ACTION_XYZ}_relative"].representation == "relative"
    assert spec.language_types == ("original",)
    config = yaml.safe_load((folder / "preprocessing_config.yaml").read_text(encoding="utf-8"))
    assert config["camera_names"] == list(rig.CAMERAS)
    assert (config["past_lowdim_steps"], config["future_lowdim_steps"]) == (PAST, FUTURE)
    assert config["image_indices"] == [-2, 0, 3]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["episodes"] == report["written"] == len(LENGTHS)
    num_samples = sum(len(expected_anchors(length)) for length in LENGTHS)
    assert report["samples"] == num_samples
    assert report["dropped_samples"] == {
        "padding": sum(-(-length // 2) for length in LENGTHS) - num_samples,
        "still": 0,
    }
    assert {"read", "images", "write", "statistics"} <= report["seconds"].keys()
    assert verify_dataset(str(folder)) == []
    assert not (folder / "_progress").exists()


@pytest.mark.parametrize("layout", ["episodes", "samples"])
def test_nothing_says_who_made_it_or_where(layout, datasets, source):
    import getpass
    import socket

    for path in datasets[layout].iterdir():
        if path.suffix in (".json", ".yaml", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            assert str(source.parent) not in text, path
            assert socket.gethostname() not in text, path
            assert f"/{getpass.getuser()}/" not in text, path


def test_a_lost_index_and_manifest_are_made_again(tmp_path, source, episodes, preprocess):
    folder = preprocess(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in [*folder.glob("*.index.json"), folder / "manifest.jsonl"]:
        path.unlink()
    build_manifest(str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_verify_names_what_is_wrong_with_an_episode(tmp_path, source, episodes, preprocess):
    folder = preprocess(source, tmp_path / "out")
    path = folder / "shard_000000.tar"
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x03\x04") + 200  # within the numbers of the first episode
    data[place] ^= 0xFF
    path.write_bytes(data)
    faults = verify_dataset(str(folder))
    assert any("SHA-256" in fault for fault in faults)
    assert any("lowdim.npz" in fault and "damaged" in fault for fault in faults), faults


def without_seconds(folder: Path | str) -> dict[str, bytes]:
    """{name: content} of a dataset, but for the seconds that stages took and the commit of the code."""
    files = {name: read_bytes(f"{folder}/{name}") for name in list_relative(str(folder))}
    for name, key in (("report", "seconds"), ("provenance", "git_commit"), ("processing_metadata", "git_info")):
        values = json.loads(files[f"{name}.json"])
        values.pop(key)
        files[f"{name}.json"] = json.dumps(values).encode()
    return files


def test_remote_output_has_the_same_bytes(tmp_path, source, episodes, preprocess, s3_bucket):
    options = {"layout": "samples", "max_episodes_to_process": 1}
    local = without_seconds(preprocess(source, tmp_path / "out", **options))
    remote = without_seconds(preprocess(source, f"{s3_bucket}/out", **options))
    for name in ("preprocessing_config.yaml", "processing_metadata.json"):  # they name the output
        assert local.pop(name) != remote.pop(name)
    assert remote == local


@pytest.mark.slow
def test_ray_writes_the_same_bytes_as_this_process(tmp_path, source, episodes, preprocess, ray_cluster):
    options = {"layout": "samples", "samples_per_shard": 5}
    here = without_seconds(preprocess(source, tmp_path / "here" / "out", **options))
    on_ray = without_seconds(
        preprocess(source, tmp_path / "ray" / "out", num_workers=2, ray_address=ray_cluster, **options)
    )
    assert here.pop("preprocessing_config.yaml") != on_ray.pop("preprocessing_config.yaml")  # it names the workers
    assert here == on_ray


def test_a_finished_dataset_is_left_alone_and_another_configuration_is_refused(
    tmp_path, source, episodes, preprocess, capsys
):
    folder = preprocess(source, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    preprocess(source, folder)
    assert "is complete; nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match=r"--output_dir .* was made with params.stride 1 \(now 2\)"):
        preprocess(source, folder, stride=2)
    preprocess(source, folder, stride=2, overwrite=True, compute_statistics=False)
    assert not (folder / "stats.json").exists()
    assert verify_dataset(str(folder)) == []


def test_validation_episodes_make_a_dataset_of_their_own(tmp_path, source, episodes, preprocess, read_tars):
    folder = preprocess(source, tmp_path / "out", validation_episodes=["run_1"])
    assert read_tars(folder / "train").keys() == {"run_0", "run_2"}
    assert read_tars(folder / "validation").keys() == {"run_1"}
    assert not (folder / "manifest.jsonl").exists()
    with pytest.raises(ValueError, match="holds other files"):
        preprocess(source, folder)


def test_only_the_first_episodes_are_read(tmp_path, source, episodes, preprocess, read_tars):
    assert read_tars(preprocess(source, tmp_path / "out", max_episodes_to_process=2)).keys() == {"run_0", "run_1"}


def test_output_and_source_must_be_apart(source, episodes, preprocess):
    with pytest.raises(ValueError, match="one contains the other"):
        preprocess(source, source / "out")


def test_episodes_of_different_rates_are_refused(tmp_path, write_episodes, preprocess):
    write_episodes(tmp_path / "raw", [12])
    arrays = write_episodes(tmp_path / "other", [12, 12], fps=20.0)
    np.savez(tmp_path / "raw" / "run_1.npz", **arrays["run_1"])
    with pytest.raises(ValueError, match=r"20 frames per second.*--target_fps 10"):
        preprocess(tmp_path / "raw", tmp_path / "out")
    preprocess(tmp_path / "raw", tmp_path / "resampled", target_fps=10.0)
    assert verify_dataset(str(tmp_path / "resampled")) == []


def test_images_of_different_sizes_are_refused(tmp_path, write_episodes, preprocess):
    write_episodes(tmp_path / "raw", [12])
    arrays = write_episodes(tmp_path / "other", [12, 12], size=(30, 30))
    np.savez(tmp_path / "raw" / "run_1.npz", **arrays["run_1"])
    with pytest.raises(ValueError, match=r"camera 'Front' has .* pixels in episode .*--resize_images_size"):
        preprocess(tmp_path / "raw", tmp_path / "out")
    folder = preprocess(tmp_path / "raw", tmp_path / "resized", resize_images_size=[16, 16])
    spec = parse_spec((folder / "robotics.json").read_text(encoding="utf-8"), "")
    assert spec.cameras["Front"].size == (16, 16)
    assert spec.cameras["Front"].original_size is None


RIG = Path(__file__).with_name("rig_converter.py")
KILLED_LENGTHS = [12] * 12


@pytest.fixture(scope="module")
def killed_source(tmp_path_factory, write_episodes) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_episodes(folder, KILLED_LENGTHS)
    return folder


@pytest.fixture(scope="module")
def processes() -> Iterator[BaseContext]:
    """Starts processes that have imported what a job needs, so that they are at work at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RIG.parent))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "rig_converter", "vla_foundry.preprocessing.robotics.robotics_job"])
        yield context


def job_options(killed_source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return {
        "source_episodes": [str(killed_source)],
        "output_dir": str(output),
        "num_workers": 0,
        "past_lowdim_steps": 2,
        "future_lowdim_steps": 3,
        "samples_per_shard": 10,
        "seconds_per_frame": 0.002,
        **options,
    }


def dataset_files(folder: Path) -> dict[str, bytes]:
    """{path: content} of all that is in a dataset, but for the seconds that stages took and the commit of the code."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, key in (("report", "seconds"), ("provenance", "git_commit"), ("processing_metadata", "git_info")):
        values = json.loads(files[f"{name}.json"])
        values.pop(key)
        files[f"{name}.json"] = json.dumps(values).encode()
    return files


def count_done(output: Path) -> int:
    return len(list(output.glob("_progress/task_*.json")))


def wait_for(is_time: Callable[[], bool], is_alive: Callable[[], bool]) -> None:
    stop = time.monotonic() + 180
    while not is_time():
        assert is_alive(), "the process ended before it could be killed"
        assert time.monotonic() < stop
        time.sleep(0.0005)


def kill_when_done(process: Any, output: Path, *, num_tasks: int, seconds: float) -> None:
    """Kill a job some seconds after so many of its tasks are done, and make sure that it was at work."""
    wait_for(lambda: (output / "_progress").exists() and count_done(output) >= num_tasks, process.is_alive)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # some of it is there, and it is not finished
    assert (output / "_progress" / "plan.json").exists()
    assert not (output / "manifest.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["episodes", "samples"])
def test_five_kills_at_random_moments_change_no_byte(layout, tmp_path, rig, killed_source, processes):
    chosen, moments = random.Random(f"20261121 {layout}"), set()
    started = time.monotonic()
    rig.run_job(job_options(killed_source, tmp_path / "expected" / "out", layout=layout))
    expected = dataset_files(tmp_path / "expected" / "out")
    num_shards = sum(name.endswith(".tar") for name in expected)
    num_tasks = num_shards if layout == "episodes" else len(KILLED_LENGTHS) + num_shards
    seconds_per_task = (time.monotonic() - started) / num_tasks
    for number in range(5):
        output = tmp_path / str(number) / "out"
        options = job_options(killed_source, output, layout=layout)
        process = processes.Process(target=rig.run_job, args=(options,))
        process.start()
        # after some tasks, and some way into the next
        seconds = chosen.uniform(0, 0.7 * seconds_per_task)
        kill_when_done(process, output, num_tasks=chosen.randrange(num_tasks), seconds=seconds)
        moments.add(count_done(output))
        rig.run_job(options)
        assert dataset_files(output) == expected
    assert len(moments) >= 3, moments


@pytest.mark.slow
def test_a_kill_on_ray_changes_no_byte(tmp_path, rig, killed_source):
    """The whole command, which starts Ray itself and finds its plug-in in the working directory."""
    rig.run_job(job_options(killed_source, tmp_path / "expected" / "out"))
    (tmp_path / "rig_converter.py").write_text(RIG.read_text(encoding="utf-8"), encoding="utf-8")
    output = tmp_path / "killed" / "out"
    options = job_options(killed_source, output, num_workers=2, seconds_per_frame=0.002)
    options["source_episodes"] = killed_source
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "vla_foundry.cli", "preprocess", "robotics", "--plugins", "rig_converter"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen:
        return subprocess.Popen([*command, "--type", "rig", *words], cwd=tmp_path, env=environment)

    process = start()
    try:
        wait_for(lambda: count_done(output) >= 3, lambda: process.poll() is None)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 <= count_done(output) < len(KILLED_LENGTHS)
    assert not (output / "manifest.jsonl").exists()
    again = start()
    try:
        assert again.wait(timeout=300) == 0
    finally:
        again.kill()
    found, expected = dataset_files(output), dataset_files(tmp_path / "expected" / "out")
    assert found.pop("preprocessing_config.yaml") != expected.pop("preprocessing_config.yaml")  # it names the workers
    assert found == expected
