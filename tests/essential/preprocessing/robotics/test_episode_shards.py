"""A failed episode leaves nothing behind, whatever fails in it and whenever; each failure is named."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vla_foundry.images.geometry import ImageOperations
from vla_foundry.preprocessing.robotics import robotics_job
from vla_foundry.preprocessing.robotics.converters.converter import ArrayFrames, CameraFrames, create_converter
from vla_foundry.preprocessing.robotics.episode_shards import (
    ShardJob,
    encode_frames,
    rescale_intrinsics,
    write_episode_shard,
)
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
    assert str(tmp_path) not in json.dumps(report)


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


@pytest.mark.parametrize("layout", ["episodes", "samples"])
def test_what_was_made_of_files_that_were_edited_since_is_made_again(
    layout, tmp_path, write_episodes, preprocess, monkeypatch, capsys
):
    episodes = write_episodes(tmp_path / "raw", [12, 12])
    with monkeypatch.context() as patch:
        patch.setattr(robotics_job.OutputFolder, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            preprocess(tmp_path / "raw", tmp_path / "out", layout=layout)
    edited = {name: values + 1 if values.dtype == np.float32 else values for name, values in episodes["run_0"].items()}
    np.savez(tmp_path / "raw" / "run_0.npz", **edited)  # the same size
    resumed = preprocess(tmp_path / "raw", tmp_path / "out", layout=layout)
    assert "Source files were modified since the job was begun" in capsys.readouterr().out
    fresh = preprocess(tmp_path / "raw", tmp_path / "fresh", layout=layout)
    for path in fresh.glob("*.tar"):
        assert (resumed / path.name).read_bytes() == path.read_bytes()


def interrupt(*arguments: object, **named: object) -> None:
    raise KeyboardInterrupt


def test_a_dataset_without_samples_is_refused(tmp_path, write_episodes, preprocess):
    write_episodes(tmp_path / "raw", [3])
    with pytest.raises(ValueError, match="gave no sample: no samples"):
        preprocess(tmp_path / "raw", tmp_path / "out", max_padding_left=0, max_padding_right=0)


INTRINSICS = np.array([[90.0, 0.0, 61.0], [0.0, 95.0, 47.0], [0.0, 0.0, 1.0]])
WIDTH, HEIGHT = 120, 96


def operations(turns: int = 0, size: tuple[int, int] | None = None, method: str = "center_crop") -> ImageOperations:
    return ImageOperations(turns=turns, size=size, method=method, jpeg_quality=95)  # pyright: ignore[reportArgumentType]


def draw_point(point: np.ndarray) -> np.ndarray:
    """A black picture with a soft white dot where the camera sees the point."""
    x, y, depth = INTRINSICS @ point
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    dot = 255 * np.exp(-((rows - y / depth) ** 2 + (columns - x / depth) ** 2) / (2 * 2.5**2))
    return np.repeat(dot.astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("method", ["center_crop", "resize_no_crop", "resize_fit"])
@pytest.mark.parametrize(("turns", "size"), [(0, None), (1, None), (2, (64, 64)), (3, (50, 80)), (0, (81, 60))])
def test_a_point_in_space_is_found_where_the_intrinsics_say(turns, size, method):
    point = np.array([0.06, -0.04, 1.1])
    frames = ArrayFrames(draw_point(point)[None])
    done = operations(turns, size, method)
    (data,) = encode_frames("front", frames, done, np.array([0]))
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(float)
    assert size is None or picture.shape == size
    picture[picture < 25] = 0
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]]
    found = np.array([(columns * picture).sum(), (rows * picture).sum()]) / picture.sum()
    x, y, depth = rescale_intrinsics(INTRINSICS, frames, done) @ point
    np.testing.assert_allclose(found, [x / depth, y / depth], atol=0.15)


def test_intrinsics_of_every_frame_are_rescaled_alike():
    frames = ArrayFrames(np.zeros((2, HEIGHT, WIDTH, 3), np.uint8))
    many = rescale_intrinsics(np.stack([INTRINSICS, 2 * INTRINSICS]), frames, operations(1, (32, 32)))
    np.testing.assert_array_equal(many[0], rescale_intrinsics(INTRINSICS, frames, operations(1, (32, 32))))


def test_depth_is_turned_and_resized_by_its_nearest_pixels():
    depth = np.random.default_rng(0).integers(0, 65536, (1, 8, 12), dtype=np.uint16)
    (data,) = encode_frames("depth", ArrayFrames(depth), operations(1, (6, 4)), np.array([0]))
    picture = np.asarray(Image.open(io.BytesIO(data)))
    assert picture.shape == (6, 4)
    turned = np.rot90(depth[0], -1)  # (12, 8)
    np.testing.assert_array_equal(picture, turned[1::2, 1::2])


def test_depth_as_recorded_is_stored_without_loss():
    depth = np.random.default_rng(0).integers(0, 65536, (3, 8, 12), dtype=np.uint16)
    for data, expected in zip(encode_frames("d", ArrayFrames(depth), operations(), np.arange(3)), depth, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)


def frames_of(images: np.ndarray | list[bytes], num_frames: int | None = None) -> CameraFrames:
    """Images, or their files, of 20 x 16 pixels."""
    return CameraFrames(read=lambda: iter(images), size=(20, 16), num_frames=num_frames or len(images), origin="run 3")


def to_file(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def test_files_that_need_no_change_are_kept():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 20, 3), dtype=np.uint8)
    files = [to_file(image, "JPEG") for image in images]
    frames = frames_of(files)
    assert list(encode_frames("a", frames, operations(0, (16, 20)), np.arange(3))) == files
    small = list(encode_frames("a", frames, operations(0, (8, 10)), np.arange(3)))
    assert [Image.open(io.BytesIO(data)).size for data in small] == [(10, 8)] * 3


def test_a_kept_file_that_can_not_be_decoded_is_found():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 20, 3), dtype=np.uint8)
    files = [to_file(image, "JPEG") for image in images]
    files[1] = files[1][: len(files[1]) // 2]
    with pytest.raises(ValueError, match=r"run 3: image 1: JPEG .* is broken"):
        list(encode_frames("a", frames_of(files), operations(), np.arange(3)))


def test_a_file_with_an_exif_orientation_is_stored_upright():
    image = np.zeros((20, 16, 3), np.uint8)  # as the sensor reads it; upright it is 20 wide and 16 high
    image[:10] = (200, 40, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, exif=exif)
    (data,) = encode_frames("a", frames_of([buffer.getvalue()]), operations(), np.arange(1))
    stored = Image.open(io.BytesIO(data))
    assert (stored.size, stored.getexif().get(0x0112, 1)) == ((20, 16), 1)
    expected = np.rot90(image, -1).astype(int)
    assert np.abs(np.asarray(stored) - expected).mean() < 5


def test_kept_files_that_are_no_jpeg_become_some():
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 20, 3), dtype=np.uint8)
    (data,) = encode_frames("a", frames_of([to_file(images[0], "PNG")]), operations(), np.arange(1))
    assert data.startswith(b"\xff\xd8")


def test_a_frame_that_is_shown_twice_is_encoded_once(monkeypatch):
    frames = frames_of(np.random.default_rng(0).integers(0, 256, (4, 16, 20, 3), dtype=np.uint8))
    calls = itertools.count()
    encode = ImageOperations.encode
    monkeypatch.setattr(ImageOperations, "encode", lambda self, frame: (next(calls), encode(self, frame))[1])
    files = list(encode_frames("a", frames, operations(), np.array([0, 0, 2, 2, 2])))
    assert next(calls) == 2
    assert files[0] == files[1] != files[2] == files[3] == files[4]


@pytest.mark.parametrize(("said", "there", "message"), [(5, 3, "ends after 3 of 5"), (3, 5, "has 5 frames, not 3")])
def test_missing_and_surplus_frames_are_found(said, there, message):
    with pytest.raises(ValueError, match=f"camera 'a' {message}"):
        list(encode_frames("a", frames_of(np.zeros((there, 16, 20, 3), np.uint8), said), operations(), np.arange(said)))


def test_a_frame_of_another_size_is_found():
    frames = ArrayFrames(np.zeros((2, 8, 8, 3), np.uint8))
    frames.size = (9, 8)
    with pytest.raises(ValueError, match=r"the recording: image 0 is 8 x 8 pixels, expected 9 x 8"):
        list(encode_frames("a", frames, operations(), np.arange(2)))


def test_a_frame_of_another_type_is_found():
    frames = ArrayFrames(np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"image 0 is float32 \(8, 8, 3\), expected uint8 \(8, 8, 3\)"):
        list(encode_frames("a", frames, operations(), np.arange(2)))


def test_a_job_turns_and_resizes_and_says_so(tmp_path, rig, write_episodes, preprocess, read_tars):
    write_episodes(tmp_path / "raw", [12])
    folder = preprocess(tmp_path / "raw", tmp_path / "out", camera_rotations={"Front": 1}, resize_images_size=[20, 16])
    members = read_tars(folder)["run_0"]
    assert members["episode.json"]["cameras"]["Front"] == {
        "original_size": [32, 24],
        "size": [20, 16],
        "extension": "jpg",
    }
    assert Image.open(io.BytesIO(members["front.000000.jpg"])).size == (20, 16)
    done = operations(1, (16, 20))
    frames = ArrayFrames(np.zeros((1, 24, 32, 3), np.uint8))
    lowdim = members["lowdim.npz"]
    expected = rescale_intrinsics(lowdim["original_intrinsics.Front"], frames, done)
    np.testing.assert_array_equal(lowdim["rescaled_intrinsics.Front"], expected)
