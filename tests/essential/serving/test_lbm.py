"""The LBM simulator's services: messages written here byte by byte from the protocol's field numbers."""

import struct
from typing import Any

import grpc
import numpy as np
import pytest

from tests.essential.inference.test_policy import ACTUAL, GRIPPER, observe
from tests.essential.serving.conftest import serve
from vla_foundry.client.wire import decode, encode
from vla_foundry.inference import Policy
from vla_foundry.robotics.rotations import rotation_to_matrix
from vla_foundry.serving import lbm
from vla_foundry.serving.policies import Served

Part = tuple[int, Any]


def message(*parts: Part) -> bytes:
    """A message from its fields: bytes and text with their length, numbers as varints, lists as packed doubles."""
    data = b""
    for number, value in parts:
        if isinstance(value, int):
            data += varint(number << 3) + varint(value)
            continue
        if isinstance(value, float):
            data += varint(number << 3 | 1) + struct.pack("<d", value)
            continue
        if isinstance(value, list):
            value = struct.pack(f"<{len(value)}d", *value)
        value = value.encode() if isinstance(value, str) else value
        data += varint(number << 3 | 2) + varint(len(value)) + value
    return data


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


def pose_message(xyz: list[float], matrix: list[float]) -> bytes:
    return message((1, xyz), (2, matrix))


def image_set(camera: str, image: np.ndarray, *, dtype: int = 0, compression: int = 0) -> bytes:
    height, width, channels = image.shape
    parts: list[Part] = [(1, height), (2, width), (3, channels), (4, image.tobytes())]
    parts += [(5, dtype)] if dtype else []
    parts += [(6, compression)] if compression else []
    # has_rgb, camera_rgb.image, and a calibration that is not read
    return message((1, camera), (2, 1), (5, message((1, message(*parts)), (2, message((1, height))))))


def step_message(client: str, recording: Any, frame: int, **image_options: Any) -> bytes:
    given = observe(recording, frame)
    matrix = rotation_to_matrix(given.fields[f"{ACTUAL}__rot_6d"], "rot_6d_rows").reshape(9).tolist()
    arm = message(
        (1, "right::arm"),
        (2, pose_message(given.fields[f"{ACTUAL}__xyz"].tolist(), matrix)),
        (3, message((1, [0.0] * 3))),
        (5, [0.1] * 7),
    )
    actual = message((1, arm), (2, message((1, "right::hand"), (2, 0.5))), (3, message((1, 12))))
    desired = message((1, arm))
    pictures = {name: image for name, image in given.images.items() if name != "depth"}  # the policy needs none
    images = [(2, image_set(name, image, **image_options)) for name, image in pictures.items()]
    observation = message((1, message((1, actual), (2, desired), (3, 1))), *images, (3, 1), (4, 1), (5, "lift the lid"))
    return message((1, client), (2, observation))


def test_an_observation_is_read_from_its_bytes(arm: Any) -> None:
    recording = arm.recordings[0]
    request = decode(lbm.PolicyStepRequest, step_message("a1", recording, 3))
    assert request.client_identifier == "a1"
    images, fields, instruction = lbm.read_observation(request.observation)
    given = observe(recording, 3)
    assert instruction == "lift the lid"
    assert [image.camera for image in images] == ["front", "wrist"]
    assert images[0].data == given.images["front"].tobytes()
    assert (images[0].height, images[0].width) == (30, 40)
    assert fields["robot__actual__grippers__right::hand"].tolist() == [0.5]
    assert fields["robot__actual__joint_position__right::arm"].tolist() == [0.1] * 7
    for kind in ("actual", "desired", "action"):
        name = f"robot__{kind}__poses__right::arm"
        assert fields[f"{name}__xyz"].tolist() == given.fields[f"{ACTUAL}__xyz"].tolist()
        np.testing.assert_allclose(fields[f"{name}__rot_6d"], given.fields[f"{ACTUAL}__rot_6d"], atol=1e-12)


def test_an_action_is_written_as_its_bytes() -> None:
    turn = rotation_to_matrix(np.array([0.1, 0.2, 0.3]), "axis_angle")
    action = {
        "robot__action__poses__right::panda__xyz": np.array([1.0, 2.0, 3.0]),
        "robot__action__poses__right::panda__rot_6d": turn.reshape(9)[:6],
        "robot__action__grippers__right::panda_hand": np.array([0.25], np.float32),
    }
    found = encode(lbm.PolicyStepResponse(success=True, action=lbm.write_action(action)))
    written = decode(lbm.PolicyStepResponse, found).action.pose_status[0].pose.rotation.tolist()
    np.testing.assert_allclose(written, turn.reshape(9), atol=1e-12)
    arm = message((1, "right::panda"), (2, pose_message([1.0, 2.0, 3.0], written)))
    gripper = message((1, "right::panda_hand"), (2, 0.25))
    assert found == message((1, 1), (2, message((1, arm), (2, gripper))))


def test_the_simulator_is_answered_as_in_this_process(arm: Any, served: Served) -> None:
    recording = arm.recordings[0]
    with serve(served) as ports, grpc.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        call = {
            name: channel.unary_unary(f"/lbm_policy_interface.{name}Service/{name}")
            for name in ("PolicyStep", "PolicyReset", "GetPolicyMetadata")
        }
        metadata = decode(lbm.GetPolicyMetadataResponse, call["GetPolicyMetadata"](message((1, "a1"))))
        assert metadata.success
        assert metadata.policy_metadata.name == "arm"
        assert metadata.policy_metadata.skill_type == "LanguageConditionedManipulation"
        assert call["PolicyReset"](message((1, "a1"), (2, 7))) == message((1, 1))
        found = [call["PolicyStep"](step_message("a1", recording, frame)) for frame in range(5)]
        with pytest.raises(grpc.RpcError) as error:
            call["PolicyStep"](step_message("a1", recording, 5, compression=9))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details() == "client a1: camera 'front' gives no image, or one of an unknown compression."
        with pytest.raises(grpc.RpcError) as error:
            call["PolicyStep"](step_message("a2", recording, 0))
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    policy = Policy.from_run(str(arm.run), device="cpu")
    policy.reset(7)
    for frame, answer in enumerate(found):
        request = decode(lbm.PolicyStepRequest, step_message("a1", recording, frame))
        _, fields, _ = lbm.read_observation(request.observation)
        expected = policy.act(observe(recording, frame, fields=fields))
        assert answer == encode(lbm.PolicyStepResponse(success=True, action=lbm.write_action(expected)))
        gripper = decode(lbm.PolicyStepResponse, answer).action.gripper_status[0]
        assert gripper.gripper_name == "right::hand"
        assert gripper.gripper_position == float(expected[GRIPPER][0])


def test_actions_that_the_simulator_does_not_know_are_refused() -> None:
    lbm.check_actions(["robot__action__poses__a__xyz", "robot__action__poses__a__rot_6d", "robot__action__grippers__g"])
    with pytest.raises(ValueError, match="'action' is neither a pose nor a gripper"):
        lbm.check_actions(["action"])
    for part in ("xyz", "rot_6d"):
        with pytest.raises(
            ValueError, match="commands half a pose of a: the LBM simulator needs its xyz and its rot_6d"
        ):
            lbm.check_actions([f"robot__action__poses__a__{part}"])
