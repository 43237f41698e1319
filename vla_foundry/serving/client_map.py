"""Turn the observations of websocket clients into the policy's fields, and its actions into their vectors.

A client map names the columns of the client's vectors and what they mean on both sides. What can be converted exactly
is: rotation formats and frames, scales, the range and sign of grippers, mirrored pictures. Anything else is refused by
name before an episode begins.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch

from vla_foundry.client.messages import CameraInfo, FieldInfo, Image, Metadata, raw_image
from vla_foundry.config.yaml_source import find_config
from vla_foundry.images.codec import image_from_array, image_to_array
from vla_foundry.images.geometry import resize_depth, scale_image
from vla_foundry.params.commands.preprocessing_robotics import GripperParams
from vla_foundry.params.commands.serving import ClientMapParams, ClientPartParams, PartMeaning
from vla_foundry.params.experiment import load_params_from_yaml
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.rotations import matrix_to_rotation, rotation_to_matrix, rotation_width
from vla_foundry.robotics.spec import DatasetSpec

Convert = Callable[[np.ndarray], np.ndarray]
_FIELD = re.compile(r"(?P<name>.+?)(\[(?P<first>\d{1,6}):(?P<end>\d{1,6})\])?")


@dataclass(frozen=True)
class _Part:
    """Columns of a client's vector, and columns of the policy's field that hold the same."""

    params: ClientPartParams
    field: str
    # columns of the field
    first: int
    end: int
    convert: Convert


class ClientMap:
    """Converts between a client and the policy.

    Args:
        params: the map.
        metadata: what the policy observes and commands.
        spec: the dataset spec; None: unknown.
        origin: the map's file, for messages.

    Raises:
        ValueError: the map does not fit the policy; the message names the field and what differs.
    """

    def __init__(
        self,
        params: ClientMapParams,
        metadata: Metadata,
        spec: DatasetSpec | None = None,
        *,
        origin: str = "client map",
    ) -> None:
        self.params = params
        self._origin = origin
        self._spec = spec
        self._widths = {field.name: field.width for field in metadata.fields}
        self._state = [self._create_part(part, metadata.fields, is_action=False) for part in params.state]
        self._actions = [self._create_part(part, metadata.actions, is_action=True) for part in params.actions]
        self._action_width = max(part.columns[1] for part in params.actions) if params.actions else 0
        # (height, width); 0: any
        self._sizes = {camera.name: (camera.height, camera.width) for camera in metadata.cameras}
        self._check_cameras(metadata.cameras)
        self._check_complete(self._state, metadata.fields, "state", "the policy observes")
        self._check_complete(self._actions, metadata.actions, "actions", "the policy commands")
        covered = sorted(column for part in params.actions for column in range(*part.columns))
        if covered != list(range(self._action_width)):
            raise ValueError(f"{origin}: the columns of actions must cover 0 .. {self._action_width}, each once.")

    def read_images(self, images: Mapping[Any, Any]) -> list[Image]:
        """Return the client's pictures under the policy's names.

        Raises:
            ValueError: one is missing or malformed.
        """
        missing = [name for name in self.params.cameras.values() if name not in images]
        if missing:
            raise ValueError(
                f"the observation lacks the image '{missing[0]}'; it has {', '.join(map(str, images)) or 'none'}."
            )
        return [to_image(camera, images[name]) for camera, name in self.params.cameras.items()]

    def adapt_image(self, camera: str, pixels: np.ndarray) -> np.ndarray:
        """Return a decoded picture, uint8 (H, W, 3), or depth as the policy's camera would have taken it."""
        if camera in self.params.mirrored:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        size = self._sizes.get(camera, (0, 0)) if camera in self.params.scaled else (0, 0)
        if not all(size):
            return pixels
        if pixels.ndim == 2:
            return resize_depth(torch.from_numpy(pixels), size, method="resize_no_crop")[0].numpy()
        return image_to_array(scale_image(image_from_array(pixels), size))

    def read_state(self, observation: Mapping[Any, Any]) -> dict[str, np.ndarray]:
        """Return the policy's fields from the client's vectors.

        Raises:
            ValueError: a vector is missing or too short.
        """
        fields = {field: np.zeros(self._widths[field]) for field in {part.field for part in self._state}}
        for part in self._state:
            key, (first, end) = part.params.key, part.params.columns
            vector = np.asarray(observation[key]) if key in observation else None
            if vector is None or vector.ndim != 1 or len(vector) < end or vector.dtype.kind not in "iuf":
                found = "is missing" if vector is None else f"is {vector.dtype} {vector.shape}"
                raise ValueError(f"the observation's '{key}' {found}, but {end} numbers are needed for '{part.field}'.")
            fields[part.field][part.first : part.end] = part.convert(vector[first:end].astype(np.float64))
        return fields

    def write_actions(self, actions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the client's vectors, (..., width), of actions {field: (..., C)}."""
        first = next(iter(actions.values()))
        vectors = np.zeros((*first.shape[:-1], self._action_width), np.result_type(*actions.values()))
        for part in self._actions:
            vectors[..., slice(*part.params.columns)] = part.convert(actions[part.field][..., part.first : part.end])
        return vectors

    def describe_actions(self) -> dict[str, dict[str, Any]]:
        """Return the parts of the action vector in the words of the vla-eval harness."""
        described = {}
        for number, part in enumerate(self.params.actions):
            name = part.name or f"part_{number}"
            described[name] = {"name": name, "dims": part.columns[1] - part.columns[0], "format": _format_of(part)}
        return described

    def _create_part(self, params: ClientPartParams, known: Sequence[FieldInfo], *, is_action: bool) -> _Part:
        where = f"{self._origin}: {'actions' if is_action else 'state'}: field '{params.field}'"
        match = _FIELD.fullmatch(params.field)
        name = match["name"] if match else params.field
        widths = {field.name: field.width for field in known}
        if name not in widths:
            what = "The policy's action field" if is_action else "The policy's field"
            raise ValueError(f"{self._origin}: {unknown_name_message(what, name, list(widths))}")
        first, end = (int(match["first"]), int(match["end"])) if match and match["first"] else (0, widths[name])
        if not 0 <= first < end <= widths[name]:
            raise ValueError(f"{where} has {widths[name]} columns.")
        theirs, ours = params, self._meaning_of(where, name, params.own)
        for side, meaning, width in (
            ("the client's", theirs, params.columns[1] - params.columns[0]),
            ("the policy's", ours, end - first),
        ):
            try:
                wanted = None if meaning.rotation is None else rotation_width(meaning.rotation)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if wanted not in (None, width):
                raise ValueError(
                    f"{where}: {side} {width} columns cannot be a rotation as {meaning.rotation} ({wanted})."
                )
        pair = (ours, theirs) if is_action else (theirs, ours)
        if ours.rotation is None and params.columns[1] - params.columns[0] != end - first:
            raise ValueError(f"{where}: {end - first} columns cannot be {params.columns[1] - params.columns[0]}.")
        turn = None if params.turn is None else np.reshape(params.turn, (3, 3))
        if turn is not None and not np.allclose((turn @ turn.T, np.linalg.det(turn) * np.eye(3)), np.eye(3), atol=1e-6):
            raise ValueError(f"{where}: turn is not a rotation matrix.")
        # back to the client
        turn = turn.T if turn is not None and is_action else turn
        return _Part(params, name, first, end, _create_conversion(where, *pair, turn))

    def _meaning_of(self, where: str, name: str, own: PartMeaning) -> PartMeaning:
        """Return what the policy's numbers mean: what the spec says, and the map where the spec does not.

        Raises:
            ValueError: they contradict each other.
        """
        described = None if self._spec is None else self._spec.fields.get(name)
        if described is None:
            return own
        gripper = described.gripper
        # absolute is what a spec says that says nothing
        said = {
            "representation": "delta" if described.representation == "delta" else None,
            "rotation": described.rotation,
            "gripper": None if gripper is None else GripperParams(open=gripper.open, closed=gripper.closed),
        }
        for key, value in said.items():
            if value is not None and getattr(own, key) not in (None, value):
                raise ValueError(f"{where}: its {key} is {value} in the spec, but {getattr(own, key)} under `own`.")
        given = {key: value if value is not None else getattr(own, key) for key, value in said.items()}
        given["representation"] = given["representation"] or "absolute"
        return PartMeaning(**given, scale=own.scale)

    def _check_cameras(self, cameras: Sequence[CameraInfo]) -> None:
        names = [camera.name for camera in cameras]
        for camera in self.params.cameras:
            if names and camera not in names:
                raise ValueError(f"{self._origin}: {unknown_name_message('The camera', camera, names)}")
        missing = [name for name in names if name not in self.params.cameras]
        if missing:
            raise ValueError(f"{self._origin}: cameras lacks '{missing[0]}', which the policy looks through.")

    def _check_complete(self, parts: Sequence[_Part], known: Sequence[FieldInfo], key: str, what: str) -> None:
        for field in known:
            covered = {column for part in parts if part.field == field.name for column in range(part.first, part.end)}
            missing = set(range(field.width)) - covered
            if missing:
                raise ValueError(f"{self._origin}: {key} lacks column {min(missing)} of '{field.name}', which {what}.")


def load_client_map(path: str, metadata: Metadata, spec: DatasetSpec | None) -> ClientMap:
    """Load a client map: a path, or a preset (`client_maps/libero.yaml`).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a client map, or does not fit the policy.
    """
    return ClientMap(load_params_from_yaml(ClientMapParams, find_config(path)), metadata, spec, origin=path)


class OwnNames(ClientMap):
    """The map of clients that use the policy's own names; the fields of an action are joined in their order.

    Args:
        metadata: what the policy observes and commands.
        instruction: the client's key of the instruction.
    """

    def __init__(self, metadata: Metadata, *, instruction: str) -> None:
        self.params = ClientMapParams(actions=[], instruction=instruction)
        self._metadata = metadata

    def read_images(self, images: Mapping[Any, Any]) -> list[Image]:
        """Return all pictures."""
        known = [camera.name for camera in self._metadata.cameras]
        return [
            to_image(name, value)
            for name, value in images.items()
            if isinstance(name, str)
            and (name in known or isinstance(value, Image) or (isinstance(value, np.ndarray) and value.ndim == 3))
        ]

    def read_state(self, observation: Mapping[Any, Any]) -> dict[str, np.ndarray]:
        """Return all vectors of numbers; the policy says what it lacks."""
        return {
            name: value
            for name, value in observation.items()
            if isinstance(name, str) and isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf"
        }

    def write_actions(self, actions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the fields of actions, joined: (..., width)."""
        return np.concatenate(list(actions.values()), axis=-1)

    def describe_actions(self) -> dict[str, dict[str, Any]]:
        """Return the fields of an action in the words of the vla-eval harness."""
        return {
            field.name: {"name": field.name, "dims": field.width, "format": "raw"} for field in self._metadata.actions
        }


def _create_conversion(where: str, source: PartMeaning, target: PartMeaning, turn: np.ndarray | None) -> Convert:
    """Return the exact conversion from one meaning to another.

    Args:
        where: the part, for messages.
        source: what the numbers mean.
        target: what they shall mean.
        turn: multiplied to a rotation's matrix, from the right; None: nothing.

    Raises:
        ValueError: there is none; the message says what differs.
    """
    for name in ("representation", "rotation", "gripper"):
        one, other = getattr(source, name), getattr(target, name)
        is_known = one is not None and other is not None
        differ = one != other if name == "representation" else not is_known
        if (is_known or name != "representation") and differ and one != other:
            raise ValueError(
                f"{where}: its {name} is {one or 'unknown'} on one side and {other or 'unknown'} on the other, which "
                "cannot be converted. If the spec does not say what the policy's numbers mean, say it under `own`."
            )
    steps: list[Convert] = []
    if source.scale != 1:
        steps.append(lambda values: values * source.scale)
    if (
        source.rotation is not None
        and target.rotation is not None
        and not (turn is None and source.rotation == target.rotation)
    ):
        given, wanted, matrix = source.rotation, target.rotation, np.eye(3) if turn is None else turn
        steps.append(lambda values: matrix_to_rotation(rotation_to_matrix(values, given, field=where) @ matrix, wanted))
    if source.gripper is not None and target.gripper is not None and source.gripper != target.gripper:
        before, after = source.gripper, target.gripper
        scale = (after.closed - after.open) / (before.closed - before.open)
        steps.append(lambda values: after.open + (values - before.open) * scale)
    if target.scale != 1:
        steps.append(lambda values: values / target.scale)
    return lambda values: reduce(lambda found, step: step(found), steps, values)


def _format_of(part: ClientPartParams) -> str:
    """Return vla-eval's name of a convention."""
    if part.gripper is not None:
        ends = (part.gripper.open, part.gripper.closed)
        known: dict[tuple[float, float], str] = {
            (-1, 1): "binary_close_positive",
            (1, -1): "binary_close_negative",
            (1, 0): "continuous_01",
            (0, 1): "binary_close_01",
        }
        return known.get(ends, "raw")
    if part.rotation is not None:
        return part.rotation
    return {"delta": "delta_xyz", "absolute": "absolute_xyz", None: "raw"}[part.representation]


def to_image(camera: str, value: Any) -> Image:
    """Return a decoded picture as a message: a client's array, or an encoded picture that is one already.

    Raises:
        ValueError: it is neither uint8 (H, W, 1, 3 or 4) nor depth, see `raw_image`.
    """
    if isinstance(value, Image):
        return Image(camera=camera, encoding=value.encoding, height=value.height, width=value.width, data=value.data)
    pixels = np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[2] in (1, 4):
        pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]
    return raw_image(camera, pixels)
