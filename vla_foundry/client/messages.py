"""The messages of our own policy service (policy.proto), and arrays, images and actions as messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_foundry.client.observation import to_millimetres
from vla_foundry.client.wire import Numbers, wire

SERVICE = "vla_foundry.policy.v1.PolicyService"
PROTOCOL_VERSION = 1
# bytes of the largest message
MAX_MESSAGE_BYTES = 64 << 20
# metadata key of the token
TOKEN_KEY = "authorization"
RAW, JPEG, PNG = 0, 1, 2


@dataclass
class Array:
    """Numbers of a field, as float64 or float32: {name: (C,)}, or (rows, C) row by row."""

    name: str = wire(1, "string")
    doubles: Numbers = wire(2, "double", repeated=True)
    floats: Numbers = wire(3, "float", repeated=True)
    # 0: (C,)
    rows: int = wire(4, "uint32")


@dataclass
class Image:
    """A picture of a camera: RGB, rows from the top."""

    camera: str = wire(1, "string")
    # RAW: uint8 (height, width, 3) in `data`, or of a depth camera uint16 (height, width), millimetres, lowest byte
    # first; else a JPEG or PNG file
    encoding: int = wire(2, "enum")
    height: int = wire(3, "uint32")
    width: int = wire(4, "uint32")
    data: bytes = wire(5, "bytes")


@dataclass
class CameraInfo:
    """A camera that the policy looks through; 0: any size."""

    name: str = wire(1, "string")
    width: int = wire(2, "uint32")
    height: int = wire(3, "uint32")


@dataclass
class FieldInfo:
    """A field of the observation or the action; empty text: unknown."""

    name: str = wire(1, "string")
    width: int = wire(2, "uint32")
    dtype: str = wire(3, "string")
    unit: str = wire(4, "string")
    rotation: str = wire(5, "string")
    representation: str = wire(6, "string")
    columns: Sequence[str] = wire(7, "string", repeated=True)


@dataclass
class MetadataRequest:
    """Asks for Metadata."""

    client: str = wire(1, "string")


@dataclass
class Metadata:
    """What the policy observes and commands."""

    name: str = wire(1, "string")
    protocol_version: int = wire(2, "uint32")
    # frames per second of the data; 0: unknown
    fps: float = wire(3, "double")
    cameras: Sequence[CameraInfo] = wire(4, CameraInfo, repeated=True)
    fields: Sequence[FieldInfo] = wire(5, FieldInfo, repeated=True)
    actions: Sequence[FieldInfo] = wire(6, FieldInfo, repeated=True)
    # predicted steps of a chunk, and how many of them are executed
    chunk_steps: int = wire(7, "uint32")
    open_loop_steps: int = wire(8, "uint32")
    follows_instructions: bool = wire(9, "bool")
    # the dataset spec (robotics.json); empty: none
    spec_json: str = wire(10, "string")
    # whatever else identifies the policy, such as weights_sha256
    info: Mapping[str, str] = wire(11, "map")
    # how many steps the policy looks back
    steps_back: int = wire(12, "uint32")
    # which steps' images it looks at, 0: the current one, -1: the one before
    image_indices: Numbers = wire(13, "int32", repeated=True)
    # what Predict can do: async, realtime; empty: Act only
    executions: Sequence[str] = wire(14, "string", repeated=True)


@dataclass
class CheckRobotRequest:
    """Asks whether the policy fits a robot."""

    client: str = wire(1, "string")
    robot: str = wire(2, "string")
    # the robot's spec, as robotics.json
    spec_json: str = wire(3, "string")


@dataclass
class ResetRequest:
    """Begins an episode of a client, and forgets its previous one."""

    client: str = wire(1, "string")
    seed: int = wire(2, "uint64")


@dataclass
class ForgetRequest:
    """Ends a client's session."""

    client: str = wire(1, "string")


@dataclass
class Empty:
    """Nothing to say."""


@dataclass
class ActRequest:
    """An observation; the answer is the action for it."""

    client: str = wire(1, "string")
    # number of the control step in the episode, from 0 on; steps left out count as skipped
    step: int = wire(2, "uint64")
    images: Sequence[Image] = wire(3, Image, repeated=True)
    fields: Sequence[Array] = wire(4, Array, repeated=True)
    instruction: str = wire(5, "string")


@dataclass
class ActResponse:
    """The action for an observation."""

    actions: Sequence[Array] = wire(1, Array, repeated=True)
    # the next observation must hold images
    needs_images: bool = wire(2, "bool")
    # milliseconds that the request waited, and that the policy took
    queue_ms: float = wire(3, "double")
    policy_ms: float = wire(4, "double")


@dataclass
class Step:
    """What a robot observed at a control step, and what it did then."""

    images: Sequence[Image] = wire(1, Image, repeated=True)
    fields: Sequence[Array] = wire(2, Array, repeated=True)
    actions: Sequence[Array] = wire(3, Array, repeated=True)


@dataclass
class PredictRequest:
    """The latest steps of a robot that keeps its own chunks; the answer is a chunk for the last one."""

    client: str = wire(1, "string")
    # number of the last step in the episode, from 0 on
    step: int = wire(2, "uint64")
    # oldest first, as far as the policy looks back; the last one has no actions
    steps: Sequence[Step] = wire(3, Step, repeated=True)
    instruction: str = wire(4, "string")
    # what is left of the robot's chunk from this step on, for the new one to go on from; empty: it need not
    rest: Sequence[Array] = wire(5, Array, repeated=True)
    # how many of these actions will run before the answer is there
    delay_steps: int = wire(6, "uint32")


@dataclass
class PredictResponse:
    """A chunk: the actions from the request's step on."""

    actions: Sequence[Array] = wire(1, Array, repeated=True)
    # milliseconds that the request waited, and that the policy took
    queue_ms: float = wire(2, "double")
    policy_ms: float = wire(3, "double")


# method -> request and response
METHODS: dict[str, tuple[type, type]] = {
    "GetMetadata": (MetadataRequest, Metadata),
    "CheckRobot": (CheckRobotRequest, Empty),
    "Reset": (ResetRequest, Empty),
    "Forget": (ForgetRequest, Empty),
    "Act": (ActRequest, ActResponse),
    "Predict": (PredictRequest, PredictResponse),
}


def write_arrays(values: Mapping[str, np.ndarray], *, ndim: int = 1) -> list[Array]:
    """Return numbers as messages; float32 and float64 lose nothing.

    Args:
        values: {name: (C,)}.
        ndim: 2: {name: (rows, C)}.

    Raises:
        ValueError: a field is not an array of numbers, or has another number of dimensions.
    """
    arrays = []
    for name, given in values.items():
        numbers = np.asarray(given)
        if numbers.ndim != ndim or numbers.dtype.kind not in "biuf":
            shape = "(C,)" if ndim == 1 else "(rows, C)"
            raise ValueError(
                f"field '{name}' must be an array {shape} of numbers, got {numbers.dtype} {numbers.shape}."
            )
        flat = {"floats" if numbers.dtype == np.float32 else "doubles": numbers.ravel()}
        arrays.append(Array(name=name, rows=len(numbers) if ndim == 2 else 0, **flat))
    return arrays


def read_arrays(arrays: Sequence[Array], *, ndim: int = 1) -> dict[str, np.ndarray]:
    """Return the numbers of messages: {name: (C,)}; ndim 2: {name: (rows, C)}.

    Raises:
        ValueError: the numbers do not fill the rows.
    """
    found = {}
    for array in arrays:
        numbers = np.asarray(array.floats if len(array.floats) else array.doubles)
        if (array.rows > 0) != (ndim == 2) or (array.rows and (not len(numbers) or len(numbers) % array.rows)):
            raise ValueError(f"field '{array.name}' has {len(numbers)} numbers, which do not fill {array.rows} rows.")
        found[array.name] = numbers.reshape(array.rows, -1) if array.rows else numbers
    return found


def join_rows(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return actions, {field: (C,)} each, as {field: (rows, C)}."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def split_rows(fields: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return the rows of {field: (rows, C)}, the inverse of join_rows.

    Raises:
        ValueError: the fields have different numbers of rows, or none.
    """
    counts = {values.shape[0] if values.ndim == 2 else 0 for values in fields.values()}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"the fields {', '.join(fields)} must have the same number of rows.")
    return [{name: values[row] for name, values in fields.items()} for row in range(*counts)] if counts else []


def raw_image(camera: str, image: np.ndarray) -> Image:
    """Return a picture, uint8 (H, W, 3), or depth, as a message without compression.

    Depth is uint16 (H, W) in millimetres, or float32 (H, W) in metres.

    Raises:
        ValueError: it has another shape or type.
    """
    image = np.asarray(image)
    if image.ndim == 2 and image.dtype in (np.uint16, np.float32):
        depth = (image if image.dtype == np.uint16 else to_millimetres(image)).astype("<u2")
        return Image(camera=camera, encoding=RAW, height=depth.shape[0], width=depth.shape[1], data=depth.tobytes())
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image of camera '{camera}' is {image.dtype} {image.shape}, not uint8 (H, W, 3).")
    return Image(camera=camera, encoding=RAW, height=image.shape[0], width=image.shape[1], data=image.tobytes())


def decode_raw_image(image: Image) -> np.ndarray:
    """Return the picture of a message without compression: uint8 (H, W, 3), or depth, uint16 (H, W).

    Raises:
        ValueError: the data has another size.
    """
    num_pixels = image.height * image.width
    if len(image.data) == 2 * num_pixels and image.data:
        return np.frombuffer(image.data, dtype="<u2").astype(np.uint16).reshape(image.height, image.width)
    if len(image.data) != 3 * num_pixels or not image.data:
        raise ValueError(
            f"the image of camera '{image.camera}' has {len(image.data)} bytes, not {image.height} x {image.width} x 3."
        )
    return np.frombuffer(image.data, dtype=np.uint8).reshape(image.height, image.width, 3)
