"""What a client's numbers become, and back; what cannot be converted is refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vla_foundry.client.messages import RAW, CameraInfo, FieldInfo, Metadata, decode_raw_image
from vla_foundry.params.commands.preprocessing_robotics import GripperParams
from vla_foundry.params.commands.serving import ClientMapParams, ClientPartParams, PartMeaning
from vla_foundry.robotics.rotations import matrix_to_rotation, rotation_to_matrix
from vla_foundry.robotics.spec import CameraDescription, DatasetSpec, FieldDescription, GripperRange
from vla_foundry.serving.client_map import ClientMap, OwnNames, load_client_map

FIELDS = {
    "place": FieldDescription(shape=(3,)),
    "turn": FieldDescription(shape=(6,), rotation="rot_6d_rows"),
    "move": FieldDescription(shape=(3,), representation="delta", role="action"),
    "twist": FieldDescription(shape=(4,), rotation="quaternion_xyzw", representation="delta", role="action"),
    "grip": FieldDescription(shape=(1,), role="action", gripper=GripperRange(open=0.08, closed=0.0)),
}
SPEC = DatasetSpec(
    layout="episodes",
    fps=10.0,
    past_lowdim_steps=0,
    future_lowdim_steps=0,
    image_indices=(0,),
    padding_strategy="copy",
    cameras={"front": CameraDescription(size=(8, 8), original_size=None)},
    fields=FIELDS,
)
METADATA = Metadata(
    cameras=[CameraInfo("front")],
    fields=[FieldInfo(name, FIELDS[name].width) for name in ("place", "turn")],
    actions=[FieldInfo(name, FIELDS[name].width) for name in ("move", "twist", "grip")],
)
CLOSE_POSITIVE = GripperParams(open=-1.0, closed=1.0)


def state(**changes: Any) -> list[ClientPartParams]:
    place = {"field": "place", "columns": (0, 3)}
    return [
        ClientPartParams(**place | changes),
        ClientPartParams(field="turn", columns=(3, 6), rotation="axis_angle", representation="absolute"),
    ]


def actions(**changes: Any) -> list[ClientPartParams]:
    grip = {"name": "gripper", "field": "grip", "columns": (6, 7), "gripper": CLOSE_POSITIVE}
    return [
        ClientPartParams(name="position", field="move", columns=(0, 3), representation="delta"),
        ClientPartParams(name="rotation", field="twist", columns=(3, 6), rotation="euler_xyz", representation="delta"),
        ClientPartParams(**grip | changes),
    ]


def create(**changes: Any) -> ClientMap:
    given = {"cameras": {"front": "agentview"}, "state": state(), "actions": actions()}
    return ClientMap(ClientMapParams(**given | changes), METADATA, SPEC)


def test_rotations_and_grippers_are_converted() -> None:
    found = create()
    turn = rotation_to_matrix(np.array([0.3, -0.2, 0.1]), "axis_angle")
    vector = np.array([1.0, 2.0, 3.0, 0.3, -0.2, 0.1, 9.0], np.float64)
    fields = found.read_state({"states": vector})
    assert fields["place"].tolist() == [1.0, 2.0, 3.0]
    np.testing.assert_allclose(fields["turn"], matrix_to_rotation(turn, "rot_6d_rows"), atol=1e-12)

    with pytest.raises(ValueError, match="client map: state: field 'turn' is not a rotation: a value is not finite"):
        found.read_state({"states": np.full(6, np.nan)})

    chunk = {
        "move": np.array([[0.1, 0.2, 0.3]] * 2, np.float32),
        "twist": np.stack([matrix_to_rotation(turn, "quaternion_xyzw")] * 2),
        "grip": np.array([[0.08], [0.02]]),
    }
    written = found.write_actions(chunk)
    assert written.shape == (2, 7)
    # the widest of the fields'
    assert written.dtype == np.float64
    np.testing.assert_allclose(written[0, 3:6], matrix_to_rotation(turn, "euler_xyz"), atol=1e-6)
    np.testing.assert_allclose(written[:, 6], [-1.0, 0.5], atol=1e-6)
    assert {name: part["format"] for name, part in found.describe_actions().items()} == {
        "position": "delta_xyz",
        "rotation": "euler_xyz",
        "gripper": "binary_close_positive",
    }


def test_images_of_other_shapes() -> None:
    found = create()
    (image,) = found.read_images({"agentview": np.full((4, 5, 4), 7, np.uint8)})
    assert (image.camera, image.encoding, image.height, image.width, len(image.data)) == ("front", RAW, 4, 5, 60)
    with pytest.raises(ValueError, match="lacks the image 'agentview'; it has wrist"):
        found.read_images({"wrist": np.zeros((4, 5, 3), np.uint8)})
    for wrong in (np.zeros((4, 5), np.uint8), np.zeros((4, 5, 2), np.uint8), np.zeros((4, 5, 3)), "text", None):
        with pytest.raises(ValueError, match="the image of camera 'front' is"):
            found.read_images({"agentview": wrong})


@pytest.mark.parametrize("vector", [np.zeros(5), np.zeros((6, 1)), np.array(["a"] * 6), 3.0, "text", [None] * 6])
def test_a_state_that_is_not_numbers_is_refused(vector: Any) -> None:
    with pytest.raises(
        ValueError, match=r"the observation's 'states' is .*, but [36] numbers are needed for '(place|turn)'"
    ):
        create().read_state({"states": vector})
    with pytest.raises(ValueError, match="'states' is missing"):
        create().read_state({})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"actions": actions(gripper=None)}, "field 'grip': its gripper is .* on one side and unknown on the other"),
        ({"actions": actions(field="grap")}, "action field 'grap' is unknown"),
        ({"actions": actions(columns=(7, 8))}, "the columns of actions must cover 0 .. 8, each once"),
        ({"actions": actions(columns=(6, 8))}, "1 columns cannot be 2"),
        ({"actions": actions()[:2]}, "actions lacks column 0 of 'grip', which the policy commands"),
        ({"state": state()[:1]}, "state lacks column 0 of 'turn', which the policy observes"),
        ({"state": state(field="place[0:2]", columns=(0, 2))}, "state lacks column 2 of 'place'"),
        ({"state": state(field="place[2:5]")}, r"field 'place\[2:5\]' has 3 columns"),
        ({"state": state(representation="delta")}, "its representation is delta on one side and absolute on the other"),
        ({"state": state(rotation="axis_angle")}, "its rotation is axis_angle on one side and unknown on the other"),
        ({"state": state(rotation="quaternion_xyzw")}, "3 columns cannot be a rotation as quaternion_xyzw"),
        ({"state": state(rotation="euler_xzz")}, "field 'place': rotation format 'euler_xzz' is unknown"),
        (
            {"actions": actions(own=PartMeaning(gripper=GripperParams(open=0.0, closed=0.08)))},
            "field 'grip': its gripper is .* in the spec, but .* under `own`",
        ),
        ({"cameras": {}}, "cameras lacks 'front', which the policy looks through"),
        ({"cameras": {"front": "a", "back": "b"}}, "camera 'back' is unknown"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=f"client map: .*{fault}"):
        create(**changes)


def test_a_meaning_may_be_given_where_the_spec_has_none() -> None:
    spec = DatasetSpec(**{**vars(SPEC), "fields": {"grip": FieldDescription(shape=(1,), role="action")}})
    metadata = Metadata(actions=[FieldInfo("grip", 1)])
    part = {"field": "grip", "columns": (0, 1), "gripper": CLOSE_POSITIVE}
    own = PartMeaning(gripper=GripperParams(open=1.0, closed=0.0))
    found = ClientMap(ClientMapParams(actions=[ClientPartParams(**part, own=own)]), metadata, spec)
    np.testing.assert_array_equal(found.write_actions({"grip": np.array([0.25])}), [0.5])
    with pytest.raises(ValueError, match="say it under `own`"):
        ClientMap(ClientMapParams(actions=[ClientPartParams(**part)]), metadata, spec)
    for meaning in ({"gripper": CLOSE_POSITIVE}, {"rotation": "quaternion_xyzw"}):
        with pytest.raises(
            ValueError, match=r"scale \(2\) is for distances and angles, not (a gripper|quaternion_xyzw)"
        ):
            PartMeaning(scale=2.0, **meaning)
    with pytest.raises(ValueError, match="open and closed must differ, both are 1"):
        GripperParams(open=1.0, closed=1.0)


def test_without_a_map_the_names_are_the_policys() -> None:
    found = OwnNames(METADATA, instruction="prompt")
    picture = np.zeros((4, 5, 3), np.uint8)
    given = {"place": np.arange(3.0), "turn": np.arange(6, dtype=np.int64), "front": picture, "prompt": "go", "n": 3}
    assert {name: values.tolist() for name, values in found.read_state(given).items()} == {
        "place": [0, 1, 2],
        "turn": [0, 1, 2, 3, 4, 5],
    }
    assert [image.camera for image in found.read_images(given)] == ["front"]
    written = found.write_actions({"move": np.ones(3), "twist": np.zeros(4), "grip": np.full(1, 2.0)})
    assert written.tolist() == [1, 1, 1, 0, 0, 0, 0, 2]


def read_libero_spec() -> tuple[Metadata, DatasetSpec]:
    """The spec of a policy that was trained on LIBERO's files by way of field_maps/libero.yaml."""
    fields = yaml.safe_load(Path("config_presets/field_maps/libero.yaml").read_text(encoding="utf-8"))["fields"]
    widths = {"xyz": 3, "xyz_delta": 3, "axis_angle": 3, "axis_angle_delta": 3}
    described = {}
    for name, field in fields.items():
        gripper = field.get("gripper")
        described[name] = FieldDescription(
            shape=(widths.get(name.rpartition("__")[2], 1 if "action" in name else 2),),
            representation=field.get("representation", "absolute"),
            rotation=field.get("rotation"),
            gripper=None if gripper is None else GripperRange(**{end: float(value) for end, value in gripper.items()}),
        )
    observed = [name for name in described if "__actual__" in name and "joint" not in name]
    metadata = Metadata(
        cameras=[CameraInfo("agentview"), CameraInfo("eye_in_hand")],
        fields=[FieldInfo(name, described[name].width) for name in observed],
        actions=[FieldInfo(name, described[name].width) for name in described if "__action__" in name],
    )
    return metadata, DatasetSpec(**{**vars(SPEC), "fields": described})


def test_the_map_of_libero_fits_its_field_map() -> None:
    found = load_client_map("client_maps/libero.yaml", *read_libero_spec())
    state = np.arange(8.0) / 10
    fields = found.read_state({"states": state.astype(np.float32)})
    assert np.concatenate(list(map(fields.get, sorted(fields)))).size == 8
    actions = {
        "robot__action__poses__right::panda__xyz_delta": np.array([1.0, 2.0, 3.0]),
        "robot__action__poses__right::panda__axis_angle_delta": np.array([4.0, 5.0, 6.0]),
        "robot__action__grippers__right::panda_hand": np.array([-1.0]),
    }
    # the same numbers: nothing is scaled or turned
    assert found.write_actions(actions).tolist() == [1, 2, 3, 4, 5, 6, -1]
    # the harness's picture of a bottom-up one, and preprocessing's
    raw = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for camera in ("agentview", "eye_in_hand"):
        np.testing.assert_array_equal(found.adapt_image(camera, raw[::-1, ::-1]), raw[::-1])
    assert found.params.observation_params["quat_no_antipodal"]


def test_pictures_of_another_size_are_scaled_if_the_map_says_so() -> None:
    cameras = [CameraInfo("front", 3, 2)]
    picture = np.repeat(np.repeat(np.arange(18, dtype=np.uint8).reshape(2, 3, 3), 4, axis=0), 4, axis=1)
    metadata = Metadata(cameras=cameras, fields=METADATA.fields, actions=METADATA.actions)
    for scaled, shape in (([], (8, 12, 3)), (["front"], (2, 3, 3))):
        params = ClientMapParams(cameras={"front": "a"}, scaled=scaled, state=state(), actions=actions())
        client_map = ClientMap(params, metadata, SPEC)
        assert client_map.adapt_image("front", picture).shape == shape
        depth = decode_raw_image(client_map.read_images({"a": picture[..., 0].astype(np.uint16)})[0])
        expected = picture[:: 8 // shape[0], :: 12 // shape[1], 0]
        np.testing.assert_array_equal(client_map.adapt_image("front", depth), expected)
    with pytest.raises(ValueError, match="mirrored and scaled name 'back', which is none of cameras"):
        ClientMapParams(cameras={"front": "a"}, mirrored=["back"], actions=[])


def test_scales_and_frames_of_the_hand_are_converted_both_ways() -> None:
    turn = rotation_to_matrix(np.array([0.0, 0.5, 0.0]), "axis_angle")
    given = {"field": "turn", "columns": (0, 3), "rotation": "axis_angle", "representation": "absolute"}
    part = ClientPartParams(**given, turn=tuple(turn.ravel().tolist()), scale=0.5)
    metadata = Metadata(fields=METADATA.fields[1:], actions=METADATA.fields[1:])
    found = ClientMap(ClientMapParams(state=[part], actions=[part]), metadata, SPEC)
    vector = np.array([0.2, -0.4, 0.8])
    expected = rotation_to_matrix(vector / 2, "axis_angle") @ turn
    fields = found.read_state({"states": vector})
    np.testing.assert_allclose(rotation_to_matrix(fields["turn"], "rot_6d_rows"), expected, atol=1e-12)
    np.testing.assert_allclose(found.write_actions(fields), vector, atol=1e-9)
    mirror = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    for changes, fault in (
        ({"turn": (1.0,) * 9}, "turn is not a rotation"),
        ({"turn": mirror}, "turn is not a rotation"),
        ({"turn": (1.0,) * 8}, "turn is a matrix of 9 numbers"),
        ({"representation": "delta"}, "turn is a matrix of 9 numbers, for parts with a rotation and representation"),
        ({"scale": 0.0}, r"scale \(0\) must be above 0"),
    ):
        with pytest.raises(ValueError, match=fault):
            ClientMap(ClientMapParams(state=[replace(part, **changes)], actions=[]), metadata, SPEC)


@pytest.mark.parametrize(("name", "width"), [("simpler", 7), ("calvin", 8)])
def test_the_maps_of_other_benchmarks_fit_lerobot_datasets(name: str, width: int) -> None:
    images = {"simpler": ["image_0"], "calvin": ["rgb_static", "rgb_gripper"]}[name]
    metadata = Metadata(
        cameras=[CameraInfo(f"observation.images.{image}") for image in images],
        fields=[FieldInfo("observation.state", width)],
        actions=[FieldInfo("action", 7)],
    )
    spec = DatasetSpec(
        **{
            **vars(SPEC),
            "fields": {
                "observation.state": FieldDescription(shape=(width,)),
                "action": FieldDescription(shape=(7,), role="action"),
            },
        }
    )
    found = load_client_map(f"client_maps/{name}.yaml", metadata, spec)
    # a hand that points down, as Bridge measures it: no rotation
    half = np.sqrt(0.5)
    fields = found.read_state({"states": np.array([0.1, 0.2, 0.3, half, 0.0, half, 0.0, 1.0])})
    kept = {"simpler": [0.1, 0.2, 0.3, 0, 0, 0, 1], "calvin": [0.1, 0.2, 0.3, half, 0, half, 0, 1]}
    np.testing.assert_allclose(fields["observation.state"], kept[name], atol=1e-9)
    written = found.write_actions({"action": np.array([0.5, 0.0, 0.0, 0.0, 0.0, 0.4, 1.0])})
    # CALVIN's files scale; to open is 1 on both sides
    np.testing.assert_allclose(
        written, {"simpler": [0.5, 0, 0, 0, 0, 0.4, 1], "calvin": [0.01, 0, 0, 0, 0, 0.02, 1]}[name]
    )
