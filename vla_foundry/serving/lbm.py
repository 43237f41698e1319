"""The services that the LBM simulator calls (gRPC package `lbm_policy_interface`): its messages, and what they mean.

The field `robot__actual__poses__right::panda__xyz` of LBM's data is the position of robot `right::panda` in the
observation's part `actual`; actions are sent as poses and grippers. A rotation is a row-major matrix there, and its
first two rows (`rot_6d`) here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_foundry.client.messages import JPEG, PNG, RAW, Image
from vla_foundry.client.wire import Numbers, wire
from vla_foundry.robotics.rotations import rotation_to_matrix

PACKAGE = "lbm_policy_interface"
# its compression -> our encoding
_ENCODINGS = {0: RAW, 1: JPEG, 2: PNG}
_UINT8 = 0
_JOINTS = ("joint_position", "joint_velocity", "joint_torque", "joint_torque_external")
_ACTION = "robot__action__"


@dataclass
class RigidTransform:
    """A pose: translation (3,) in metres, and a row-major rotation matrix (9,)."""

    translation: Numbers = wire(1, "double", repeated=True)
    rotation: Numbers = wire(2, "double", repeated=True)


@dataclass
class RobotPoseStatus:
    """The state of one arm."""

    robot_name: str = wire(1, "string")
    pose: RigidTransform | None = wire(2, RigidTransform)
    joint_position: Numbers = wire(5, "double", repeated=True)
    joint_velocity: Numbers = wire(6, "double", repeated=True)
    joint_torque: Numbers = wire(7, "double", repeated=True)
    joint_torque_external: Numbers = wire(8, "double", repeated=True)


@dataclass
class RobotGripperStatus:
    """The opening of one gripper."""

    gripper_name: str = wire(1, "string")
    gripper_position: float = wire(2, "double")


@dataclass
class PosesAndGrippers:
    """Arms and grippers."""

    pose_status: Sequence[RobotPoseStatus] = wire(1, RobotPoseStatus, repeated=True)
    gripper_status: Sequence[RobotGripperStatus] = wire(2, RobotGripperStatus, repeated=True)


@dataclass
class RobotState:
    """Where the arms are, and where they are wanted."""

    actual: PosesAndGrippers | None = wire(1, PosesAndGrippers)
    desired: PosesAndGrippers | None = wire(2, PosesAndGrippers)


@dataclass
class ImageData:
    """Pixels; `dtype` and `compression` are enums, 0: uint8 and none."""

    height: int = wire(1, "uint32")
    width: int = wire(2, "uint32")
    channels: int = wire(3, "uint32")
    data: bytes = wire(4, "bytes")
    dtype: int = wire(5, "enum")
    compression: int = wire(6, "enum")


@dataclass
class CameraImage:
    """A picture, without its calibration."""

    image: ImageData | None = wire(1, ImageData)


@dataclass
class CameraImageSet:
    """The pictures of a camera."""

    camera_serial: str = wire(1, "string")
    has_rgb: bool = wire(2, "bool")
    camera_rgb: CameraImage | None = wire(5, CameraImage)


@dataclass
class MultiarmObservation:
    """What the simulator senses."""

    robot: RobotState | None = wire(1, RobotState)
    visuo: Sequence[CameraImageSet] = wire(2, CameraImageSet, repeated=True)
    use_language_instruction: bool = wire(4, "bool")
    language_instruction: str = wire(5, "string")


@dataclass
class PolicyStepRequest:
    """An observation of a client."""

    client_identifier: str = wire(1, "string")
    observation: MultiarmObservation | None = wire(2, MultiarmObservation)


@dataclass
class PolicyStepResponse:
    """The action for it."""

    success: bool = wire(1, "bool")
    action: PosesAndGrippers | None = wire(2, PosesAndGrippers)


@dataclass
class PolicyResetRequest:
    """Begins an episode of a client."""

    client_identifier: str = wire(1, "string")
    seed: int = wire(2, "uint32")


@dataclass
class PolicyResetResponse:
    """Whether it has begun."""

    success: bool = wire(1, "bool")


@dataclass
class GetPolicyMetadataRequest:
    """Asks for the metadata."""

    client_identifier: str = wire(1, "string")


@dataclass
class PolicyMetadata:
    """What the policy is."""

    name: str = wire(1, "string")
    skill_type: str = wire(2, "string")
    checkpoint_path: str = wire(3, "string")
    git_repo: str = wire(4, "string")
    git_sha: str = wire(5, "string")
    # YAML
    raw_policy_config: str = wire(6, "string")
    is_language_conditioned: bool = wire(7, "bool")
    runtime_information: Mapping[str, str] = wire(8, "map")


@dataclass
class GetPolicyMetadataResponse:
    """The metadata."""

    success: bool = wire(1, "bool")
    policy_metadata: PolicyMetadata | None = wire(2, PolicyMetadata)


def read_observation(observation: MultiarmObservation) -> tuple[list[Image], dict[str, np.ndarray], str]:
    """Return the pictures, fields and instruction of an observation.

    Raises:
        ValueError: a pose or a picture is malformed; the message names it.
    """
    fields: dict[str, np.ndarray] = {}
    state = observation.robot or RobotState()
    for kind, part in (("actual", state.actual), ("desired", state.desired)):
        for arm in part.pose_status if part is not None else ():
            fields |= _read_arm(f"robot__{kind}__", arm)
        for gripper in part.gripper_status if part is not None else ():
            fields[f"robot__{kind}__grippers__{gripper.gripper_name}"] = np.array([gripper.gripper_position])
    # the simulator does not say what was commanded; the published policies take the actual pose for it
    fields |= {
        name: values
        for actual, values in list(fields.items())
        if (name := actual.replace("robot__actual__", _ACTION, 1)) not in fields
    }
    images = [_read_image(each) for each in observation.visuo if each.has_rgb]
    return images, fields, observation.language_instruction if observation.use_language_instruction else ""


def _read_arm(prefix: str, arm: RobotPoseStatus) -> dict[str, np.ndarray]:
    fields = {}
    if arm.pose is not None:
        position, rotation = np.asarray(arm.pose.translation), np.asarray(arm.pose.rotation)
        if position.shape != (3,) or rotation.shape != (9,):
            raise ValueError(
                f"the pose of {arm.robot_name} has {position.size} and {rotation.size} numbers, not 3 and 9."
            )
        fields[f"{prefix}poses__{arm.robot_name}__xyz"] = position
        fields[f"{prefix}poses__{arm.robot_name}__rot_6d"] = rotation[:6]
    for name in _JOINTS:
        if len(getattr(arm, name)):
            fields[f"{prefix}{name}__{arm.robot_name}"] = np.asarray(getattr(arm, name))
    return fields


def _read_image(found: CameraImageSet) -> Image:
    image = None if found.camera_rgb is None else found.camera_rgb.image
    if image is None or image.compression not in _ENCODINGS:
        raise ValueError(f"camera '{found.camera_serial}' gives no image, or one of an unknown compression.")
    if image.compression == 0 and (image.dtype, image.channels) != (_UINT8, 3):
        raise ValueError(f"camera '{found.camera_serial}' gives {image.channels} channels or not uint8: RGB is needed.")
    return Image(
        camera=found.camera_serial,
        encoding=_ENCODINGS[image.compression],
        height=image.height,
        width=image.width,
        data=image.data,
    )


def write_action(action: Mapping[str, np.ndarray]) -> PosesAndGrippers:
    """Return an action, {field: (C,)}, as poses and grippers.

    Raises:
        ValueError: a field is neither a pose nor a gripper of LBM's data, or is half a pose.
    """
    poses: dict[str, RigidTransform] = {}
    grippers = []
    for name, values in action.items():
        kind, _, rest = name.removeprefix(_ACTION).partition("__")
        robot, _, part = rest.rpartition("__")
        if kind == "grippers":
            grippers.append(RobotGripperStatus(gripper_name=rest, gripper_position=float(values[0])))
        elif kind == "poses" and part == "xyz":
            poses.setdefault(robot, RigidTransform()).translation = values.tolist()
        elif kind == "poses" and part == "rot_6d":
            matrix = rotation_to_matrix(values.astype(np.float64), "rot_6d_rows")
            poses.setdefault(robot, RigidTransform()).rotation = matrix.reshape(9).tolist()
        else:
            raise ValueError(f"action field '{name}' is neither a pose nor a gripper of the LBM simulator.")
    half = next((robot for robot, pose in poses.items() if not (len(pose.translation) and len(pose.rotation))), None)
    if half is not None:
        raise ValueError(f"the policy commands half a pose of {half}: the LBM simulator needs its xyz and its rot_6d.")
    arms = [RobotPoseStatus(robot_name=robot, pose=pose) for robot, pose in poses.items()]
    return PosesAndGrippers(pose_status=arms, gripper_status=grippers)


def check_actions(names: Sequence[str]) -> None:
    """Check that actions of these fields can be sent.

    Raises:
        ValueError: they cannot; see `write_action`.
    """
    write_action({name: np.eye(3).reshape(9)[: 6 if name.endswith("rot_6d") else 3] for name in names})
