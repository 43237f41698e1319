"""Image operations: intrinsics follow the pixels, depth stays exact, files that need nothing stay as they are."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from vla_foundry.images.geometry import ImageOperations
from vla_foundry.preprocessing.robotics.converters.converter import ArrayFrames, CameraFrames
from vla_foundry.preprocessing.robotics.episode_shards import encode_frames, rescale_intrinsics

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
