"""The action spec is read back as it was written, and what is wrong with it is named."""

import json

import pytest

from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import (
    CameraDescription,
    DatasetSpec,
    FieldDescription,
    GripperRange,
    format_spec,
    parse_spec,
)

SPEC = DatasetSpec(
    layout="episodes",
    fps=12.5,
    past_lowdim_steps=1,
    future_lowdim_steps=14,
    image_indices=(-1, 0),
    padding_strategy="copy",
    cameras={
        "top": CameraDescription(size=(64, 48), original_size=(640, 480)),
        "depth": CameraDescription(size=(64, 48), original_size=None, is_depth=True),
    },
    fields={
        "robot__action__poses__left::panda__xyz": FieldDescription(
            shape=(3,), dtype="float64", unit="m", frame="base", role="action"
        ),
        "robot__action__poses__left::panda__rot_6d": FieldDescription(
            shape=(6,), rotation="rot_6d_rows", role="action"
        ),
        "robot__action__grippers__left::panda_hand": FieldDescription(
            shape=(1,), gripper=GripperRange(open=0.1, closed=0.0), role="action", is_discrete=True
        ),
        "delta": FieldDescription(shape=(7,), representation="delta", role="action"),
        "joints": FieldDescription(shape=(2,), names=("elbow", "wrist")),
    },
    pose_groups=(
        PoseGroup(
            name="left",
            position_key="robot__action__poses__left::panda__xyz",
            rotation_key="robot__action__poses__left::panda__rot_6d",
        ),
    ),
    language_types=("original", "randomized"),
)


def test_a_spec_is_read_back():
    assert parse_spec(format_spec(SPEC), "here") == SPEC


def test_columns_have_as_many_names_as_there_are_or_none():
    values = json.loads(format_spec(SPEC))
    assert "names" not in values["fields"]["delta"]
    values["fields"]["joints"]["names"] = ["elbow"]
    with pytest.raises(ValueError, match=r"fields\.joints has 2 columns, but 1 names"):
        parse_spec(json.dumps(values), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "not a robotics spec of version 1"),
        ({"layout": "frames"}, "layout must be one of episodes, samples, got 'frames'"),
        ({"fps": 0}, r"fps \(0\) must be above 0"),
        ({"fields": {"a": {"shape": [3], "representation": "rel"}}}, r"fields\.a must be one of absolute"),
        ({"fields": {"a": {}}}, "lacks the key 'shape'"),
        ({"cameras": {"a": {"size": 3}}}, "is not a robotics spec"),
        ({"cameras": {"a": {"size": [8]}}}, "here: .*unpack"),
        ({"cameras": {"a": {"size": [8, -8]}}}, "here: size must be a whole number from 1 to 1,000,000, got -8"),
        ({"fields": {"a": {"shape": [1, 2]}}}, "here: .*unpack"),
        ({"fields": {"a": {"shape": ["3"]}}}, r"here: fields\.a\.shape must be a whole number"),
        ({"past_lowdim_steps": 1.5}, "here: past_lowdim_steps must be a whole number"),
        ({"future_lowdim_steps": float("inf")}, "here: 'future_lowdim_steps' must be a finite number"),
        ({"image_indices": "a"}, "here: image_indices must be a whole number"),
        ({"fps": float("inf")}, "here: 'fps' must be a finite number"),
        ({"fps": "20"}, "here: fps must be a number"),
        ({"padding_strategy": [1]}, "here: padding_strategy must be one of copy, zero, reflect, got"),
        ({"language_types": [None]}, "here: language_types must be text, got None"),
        ({"cameras": {"a": {"size": [8, 8], "is_depth": 1}}}, "here: is_depth must be one of True, False, got 1"),
        (
            {"fields": {"a": {"shape": [3], "dtype": "object"}}},
            r"here: fields\.a\.dtype must be one of float32, float64",
        ),
        ({"fields": {"a": {"shape": [3], "unit": 5}}}, r"here: fields\.a\.unit must be text, got 5"),
        ({"fields": {"a": {"shape": [3], "rotation": True}}}, r"here: fields\.a\.rotation must be text, got True"),
        ({"fields": {"a": {"shape": [3], "is_discrete": "no"}}}, r"here: fields\.a\.is_discrete must be one of True"),
        (
            {"fields": {"a": {"shape": [1], "gripper": {"open": "1", "closed": 0}}}},
            r"here: fields\.a\.gripper\.open must be a number",
        ),
        (
            {"pose_groups": [{"name": "a", "position_key": "b", "rotation_key": 6}]},
            r"here: pose_groups\[0\]\.rotation_key must be text, got 6",
        ),
        ({"pose_groups": [{"name": "a"}]}, "needs the keys name, position_key, rotation_key"),
    ],
)
def test_a_broken_spec_is_named(change, message):
    values = json.loads(format_spec(SPEC)) | change
    with pytest.raises(ValueError, match=message):
        parse_spec(json.dumps(values), "here")


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_what_is_no_spec_is_named(text):
    with pytest.raises(ValueError, match=r"^here is no"):
        parse_spec(text, "here")


def test_a_missing_key_is_named():
    values = json.loads(format_spec(SPEC))
    del values["image_indices"]
    with pytest.raises(ValueError, match="here lacks the key 'image_indices'"):
        parse_spec(json.dumps(values), "here")
