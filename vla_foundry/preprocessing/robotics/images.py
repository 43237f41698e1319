"""Turn, resize and encode the frames of a camera, one at a time, and say where their pixels went."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int64

from vla_foundry.images.codec import decode_image, encode_jpeg
from vla_foundry.images.resize import ImageOperations
from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.preprocessing.robotics.converters.base import CameraFrames
from vla_foundry.robotics.episode_blocks import EpisodeCamera

_JPEG = b"\xff\xd8\xff"


def choose_operations(params: RoboticsPreprocessParams, camera: str) -> ImageOperations:
    """Return the operations that the params ask for on the images of a camera."""
    size = params.resize_images_size
    return ImageOperations(
        turns=(params.camera_rotations or {}).get(camera, 0) % 4,
        size=None if size is None else (size[1], size[0]),
        method=params.image_resizing_method,
        jpeg_quality=params.jpeg_quality,
    )


def describe_camera(frames: CameraFrames, operations: ImageOperations) -> EpisodeCamera:
    """What is stored of a camera."""
    width, height = frames.size
    stored = operations.pixel_map((height, width)).target_size
    return EpisodeCamera(
        original_size=(width, height), size=(stored[1], stored[0]), extension="png" if frames.is_depth else "jpg"
    )


def rescale_intrinsics(
    intrinsics: Float[np.ndarray, "*L 3 3"], frames: CameraFrames, operations: ImageOperations
) -> Float[np.ndarray, "*L 3 3"]:
    """Return the matrices that project points of the same camera frame into the stored image.

    After a quarter turn they are not upper triangular, because the camera frame stays where it is: so extrinsics hold
    for the recorded and for the stored image alike.
    """
    width, height = frames.size
    return operations.pixel_map((height, width)).map_intrinsics(intrinsics.astype(np.float64))


def encode_frames(
    name: str, frames: CameraFrames, operations: ImageOperations, sources: Int64[np.ndarray, " N"]
) -> Iterator[bytes]:
    """Yield N encoded images; each recorded frame is encoded once at most, and none is kept.

    Args:
        name: of the camera, for messages.
        sources: the recorded frame that each image is of, ascending; one may stand more than once, or not at all.

    Raises:
        ValueError: a frame can not be decoded, has another size, or frames are missing.
    """
    width, height = frames.size
    files = frames.encoded() if operations.keeps((height, width)) and not frames.is_depth else None
    recorded = enumerate(iter(frames) if files is None else files)
    number, data = -1, b""
    for source in sources.tolist():
        while number < source:
            found = next(recorded, None)
            if found is None:
                raise ValueError(f"camera '{name}' ends after {number + 1} of {frames.num_frames} frames.")
            number, frame = found
            if number == source:
                data = _encode(name, number, frame, frames, operations)
        yield data
    num_found = number + 1 + sum(1 for _ in recorded)
    if num_found != frames.num_frames:
        raise ValueError(f"camera '{name}' has {num_found} frames, not {frames.num_frames} as it says.")


def _encode(
    name: str, number: int, frame: np.ndarray | bytes, frames: CameraFrames, operations: ImageOperations
) -> bytes:
    width, height = frames.size
    if isinstance(frame, bytes):
        try:
            image = decode_image(frame)  # so that what training can not decode is found here
        except ValueError as error:
            raise ValueError(f"camera '{name}', frame {number}: {error}") from None
        if tuple(image.shape[1:]) != (height, width):
            size = f"{image.shape[2]} x {image.shape[1]} pixels, not {width} x {height}"
            raise ValueError(f"camera '{name}', frame {number} has {size}.")
        return frame if frame.startswith(_JPEG) else encode_jpeg(image, quality=operations.jpeg_quality)
    shape, dtype = ((height, width), "uint16") if frames.is_depth else ((height, width, 3), "uint8")
    if frame.shape != shape or str(frame.dtype) != dtype:
        raise ValueError(f"camera '{name}', frame {number} is {frame.dtype} {frame.shape}, expected {dtype} {shape}.")
    return operations.encode(frame)
