"""Robot data params against what datasets hold, every contradiction in one line; and which rule normalizes a field."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config.schema import Unavailable
from vla_foundry.params.data.robotics import FieldNormalizationParams, NormalizationParams, RoboticsDataParams
from vla_foundry.params.experiment import load_params_from_yaml
from vla_foundry.params.facts import DatasetFacts
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import CameraDescription, DatasetSpec, FieldDescription, NamedSpec

POSE = "robot__{}__poses__left::panda__{}"
XYZ, ROTATION = POSE.format("action", "xyz"), POSE.format("action", "rot_6d")
RELATIVE = f"{XYZ}_relative"


def describe(width: int, **values: Any) -> FieldDescription:
    return FieldDescription(shape=(width,), **values)


def create_spec(**changes: Any) -> DatasetSpec:
    fields = {"gripper": describe(1)}
    for source in ("action", "actual"):
        fields[POSE.format(source, "xyz")] = describe(3, unit="m")
        fields[POSE.format(source, "rot_6d")] = describe(6, rotation="rot_6d_rows")
    camera = CameraDescription(size=(16, 12), original_size=None)
    spec = DatasetSpec(
        layout="episodes",
        fps=10.0,
        past_lowdim_steps=1,
        future_lowdim_steps=3,
        image_indices=(-1, 0),
        padding_strategy="copy",
        cameras={"scene": camera, "wrist": camera},
        fields=fields,
        pose_groups=(PoseGroup(name="left", position_key=XYZ, rotation_key=ROTATION),),
        language_types=("original",),
    )
    return replace(spec, **changes)


def complete(params: RoboticsDataParams, *specs: DatasetSpec) -> RoboticsDataParams:
    datasets = [
        DatasetFacts(manifest=name, num_samples=9, provenance={}, robotics=spec)
        for name, spec in zip("abc", specs, strict=False)
    ]
    values = {name: derived.value for name, derived in params.derive_from_data(datasets).items()}
    return replace(params, **({"use_language": True} | values))


def check(*specs: DatasetSpec, run: DatasetSpec | None = None, **values: Any) -> list[str]:
    settings: dict[str, Any] = {"action_fields": [RELATIVE, "gripper"], "proprioception_fields": ["gripper"]}
    params = complete(RoboticsDataParams(**(settings | values)), *specs)
    named = [NamedSpec(name, spec) for name, spec in zip("abc", specs, strict=False)]
    return params.check_specs(named, None if run is None else NamedSpec("run", run))


def with_fields(**fields: FieldDescription) -> DatasetSpec:
    spec = create_spec()
    return replace(spec, fields={**spec.fields, **fields})


def test_what_is_not_given_follows_from_the_data() -> None:
    params = complete(RoboticsDataParams(action_fields=[RELATIVE, "gripper"]), create_spec())
    assert params.camera_names == ["scene", "wrist"]
    assert params.image_names == ["scene_t-1", "wrist_t-1", "scene_t0", "wrist_t0"]
    assert (params.lowdim_past_timesteps, params.lowdim_future_timesteps) == (1, 3)
    assert (params.action_dim, params.proprioception_dim) == (4, 0)
    assert params.parse_groups() == create_spec().pose_groups
    assert check(create_spec(), create_spec()) == []


def test_what_only_remote_data_tell_stays_open() -> None:
    dataset = DatasetFacts(
        manifest="s3://a/manifest.jsonl", num_samples=Unavailable("it"), provenance={}, robotics=Unavailable("it")
    )
    derived = RoboticsDataParams(action_fields=["gripper"]).derive_from_data([dataset])
    assert derived["action_dim"].value == Unavailable("it")


def test_zero_steps_are_given_steps() -> None:
    params = complete(RoboticsDataParams(action_fields=["gripper"], lowdim_past_timesteps=0), create_spec())
    assert (params.window.past, params.window.future) == (0, 3)
    assert params.normalization_window == params.window


SAMPLES = create_spec(layout="samples")
OTHER_ORDER = create_spec(cameras=dict(reversed(create_spec().cameras.items())))
IN_COLUMNS = with_fields(**{ROTATION: describe(6, rotation="rot_6d_columns")})
METRES = describe(1, unit="m")
ARM, SWAPPED = (with_fields(arm=describe(2, names=names)) for names in (("a", "b"), ("b", "a")))
OTHER_SPELLING = with_fields(arm=describe(2, names=("arm_a", "arm_b")))
TWO_TOPS = create_spec(cameras={name: create_spec().cameras["scene"] for name in ("left.top", "right.top")})


@pytest.mark.parametrize(
    ("specs", "values", "message"),
    [
        ([create_spec()], {"camera_names": ["wirst"]}, r"camera 'wirst' is unknown\. Did you mean 'wrist'"),
        ([TWO_TOPS], {"camera_names": ["top"]}, r"'top' can be left\.top or right\.top of a\. Give the whole name"),
        ([create_spec(), OTHER_ORDER], {}, r"camera_names is \[scene, wrist\] in a and \[wrist, scene\] in b"),
        ([SAMPLES], {"image_indices": [-2, 0]}, r"image_indices has -2, but a holds images at -1, 0"),
        ([SAMPLES], {"lowdim_past_timesteps": 2}, r"lowdim_past_timesteps \(2\) is more than a holds \(1\)"),
        ([SAMPLES], {"lowdim_future_timesteps": 4}, r"lowdim_future_timesteps \(4\) is more than a holds \(3\)"),
        ([create_spec()], {"action_fields": ["griper"]}, r"field 'griper' is unknown\. Did you mean 'gripper'"),
        (
            [create_spec()],
            {"action_fields": [RELATIVE + "_relative"]},
            r"would be the relative of '.*xyz_relative', which is already relative in a",
        ),
        (
            [with_fields(**{XYZ: describe(3, representation="relative")})],
            {},
            r"would be the relative of 'robot__action__poses__left::panda__xyz', which is already relative in a",
        ),
        (
            [with_fields(**{RELATIVE: describe(3, representation="relative")})],
            {"action_fields": [RELATIVE + "_relative"]},
            r"would be the relative of '.*xyz_relative', which is already relative in a",
        ),
        ([create_spec(pose_groups=())], {}, r"needs a pose group that holds '.*xyz'; a has the groups none"),
        (
            [create_spec()],
            {"pose_groups": [{"name": "p", "position_key": XYZ, "rotation_key": ROTATION,
                              "rotation_format": "rot_6d_columns"}]},
            r"pose group p says that '.*rot_6d' is rot_6d_columns, but a says rot_6d_rows",
        ),
        ([create_spec(), create_spec(fps=20.0)], {}, r"a has 10 frames a second and b 20"),
        (
            [create_spec(), IN_COLUMNS],
            {"action_fields": [ROTATION]},
            r"its rotation is rot_6d_rows in a, and rot_6d_columns in b",
        ),
        (
            [create_spec(), with_fields(gripper=METRES), with_fields(gripper=describe(1, unit="rad"))],
            {"action_fields": ["gripper"]},
            r"field 'gripper': its unit is m in b, and rad in c",
        ),
        ([ARM, SWAPPED], {"action_fields": ["arm"]}, r"field 'arm': its columns are a, b in a, and b, a in b\. Put"),
        ([create_spec(), with_fields(gripper=describe(2))], {}, r"'gripper' has 1 and 2 columns in different data"),
        ([create_spec()], {"action_dim": 7}, r"action_dim \(7\) must equal the 4 columns of data\.action_fields"),
        ([create_spec()], {"proprioception_dim": 7}, r"proprioception_dim \(7\) must equal the 1 columns"),
        (
            [create_spec()],
            {"language_instruction_types": ["verbose"]},
            r"types is verbose, but a has only original",
        ),
        ([create_spec(language_types=())], {}, r"types is original, but a has no instructions\. .*empty list"),
    ],
)  # fmt: skip
def test_a_contradiction_is_one_line(specs: list[DatasetSpec], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check(*specs, **values)
    assert "\n" not in str(error.value)


def test_a_short_name_is_enough_where_only_one_camera_has_it() -> None:
    cameras = {f"observation.images.{name}": camera for name, camera in create_spec().cameras.items()}
    assert check(create_spec(cameras=cameras), camera_names=["wrist"]) == []
    with pytest.raises(ValueError, match=r"'wrist' and 'observation\.images\.wrist' are both"):
        check(create_spec(cameras=cameras), camera_names=["wrist", "observation.images.wrist"])


def test_depth_is_no_picture() -> None:
    depth = CameraDescription(size=(16, 12), original_size=None, is_depth=True)
    spec = create_spec(cameras={"depth": depth, **create_spec().cameras})
    assert complete(RoboticsDataParams(action_fields=["gripper"]), spec).camera_names == ["scene", "wrist"]
    with pytest.raises(ValueError, match="'depth' of a holds depth"):
        check(spec, camera_names=["depth"])
    with_range = RoboticsDataParams(action_fields=["gripper"], depth_cameras={"depth": (0.1, 2.0)})
    assert complete(with_range, spec).camera_names == ["depth", "scene", "wrist"]
    assert check(spec, camera_names=["depth"], depth_cameras={"depth": (0.1, 2.0)}) == []
    with pytest.raises(ValueError, match="'scene' of a holds colours"):
        check(spec, camera_names=["scene"], depth_cameras={"scene": (0.1, 2.0)})
    with pytest.raises(ValueError, match=r"depth_cameras\.depth must be \[near, far\] in metres, got \[2\.0, 2\.0\]"):
        RoboticsDataParams(depth_cameras={"depth": (2.0, 2.0)})


def test_the_run_that_a_model_starts_from_must_mean_the_same() -> None:
    with pytest.raises(
        ValueError, match=r"the model comes from run, which was trained on wrist, scene\. Use that order"
    ):
        check(create_spec(), run=OTHER_ORDER)
    with pytest.raises(ValueError, match=r"run has 5 frames a second and a 10"):
        check(create_spec(), run=create_spec(fps=5.0))
    with pytest.raises(ValueError, match=r"field 'gripper': its unit is mm in run, and m in a"):
        check(with_fields(gripper=describe(1, unit="m")), run=with_fields(gripper=describe(1, unit="mm")))
    assert check(create_spec(), run=create_spec(fps=None)) == []
    assert check(ARM, run=OTHER_SPELLING, action_fields=["arm"]) == []
    with pytest.raises(ValueError, match=r"field 'arm': its columns are b, a in run, and a, b in a"):
        check(ARM, run=SWAPPED, action_fields=["arm"])


def test_contradictions_can_be_accepted_and_are_then_said() -> None:
    notices = check(create_spec(), create_spec(fps=20.0), accept_contradictions=True)
    assert len(notices) == 1
    assert "10 frames a second and b 20" in notices[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_indices": [0, -1]}, r"image_indices \[0, -1\] must ascend"),
        ({"image_indices": [0, 0]}, r"image_indices \[0, 0\] must ascend"),
        ({"camera_names": ["a", "a"]}, "camera_names lists 'a' twice"),
        ({"action_fields": ["a", "a"]}, "action_fields lists 'a' twice"),
        ({"mask_padded_images": True}, "pad_missing_images is false"),
        ({"lowdim_past_timesteps": -1}, r"lowdim_past_timesteps \(-1\)"),
        ({"prompts": ["<image>{caption}"]}, "may only have the field {instruction}"),
        ({"prompts": []}, "prompts is empty"),
        ({"dataset_statistics": ["a"]}, "dataset_statistics has 1 entries and dataset_manifest has 0"),
        ({"pose_groups": [{"name": "p", "position_key": RELATIVE, "rotation_key": "r"}]}, "already relative"),
    ],
)
def test_a_wrong_value_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RoboticsDataParams(**values)
    assert "\n" not in str(error.value)


def test_a_published_config_loads(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(
        "type: robotics\nimage_names: [a_t0]\ntactile_fields: []\nuse_point_cloud: false\n"
        "camera_names: [a]\nimage_indices: [0]\naction_fields: [x]\nlowdim_past_timesteps: 0\n"
        "pose_groups:\n- {name: p, position_key: x, rotation_key: y}\n"
        "normalization:\n  method: percentile_1_99\n  field_configs:\n    x: {method: std, epsilon: 1e-1}\n",
        encoding="utf-8",
    )
    params = load_params_from_yaml(RoboticsDataParams, str(tmp_path / "data.yaml"))
    assert params.image_names == ["a_t0"]
    assert params.normalization.field_configs["x"].epsilon == 0.1
    assert params.parse_groups() == (PoseGroup(name="p", position_key="x", rotation_key="y"),)


@pytest.mark.parametrize(
    ("name", "num_cameras"), [("lbm_data_params", None), ("lbm_4_cameras", 4), ("lbm_6_cameras", 6)]
)
def test_the_presets_of_lbm_load(name: str, num_cameras: int | None) -> None:
    params = load_params_from_yaml(RoboticsDataParams, f"config_presets/data/lbm/{name}.yaml")
    assert (None if params.camera_names is None else len(params.camera_names)) == num_cameras
    assert (params.window.num_steps, params.normalization.epsilon) == (16, 0.01)
    assert [field.replace("action", "actual").removesuffix("_relative") for field in params.action_fields] == (
        params.proprioception_fields
    )


NORMALIZED = ["left__xyz", "left__rot_6d", "gripper"]


def test_a_field_takes_what_its_entry_leaves_out_from_all_others() -> None:
    params = NormalizationParams(
        method="percentile_1_99",
        epsilon=1e-2,
        centered_norm=True,
        field_configs={"*rot_6d": FieldNormalizationParams(method="std")},
    )
    rules = params.rules(NORMALIZED, NORMALIZED)
    assert (rules["left__rot_6d"].method, rules["left__rot_6d"].epsilon) == ("std", 1e-2)
    assert (rules["left__xyz"].method, rules["left__xyz"].centered) == ("percentile_1_99", True)


def test_an_exact_name_wins_over_patterns_whatever_the_order() -> None:
    exact, pattern = FieldNormalizationParams(epsilon=0.1), FieldNormalizationParams(epsilon=0.2)
    for entries in ({"left__xyz": exact, "left*": pattern}, {"left*": pattern, "left__xyz": exact}):
        rules = NormalizationParams(field_configs=entries).rules(NORMALIZED, NORMALIZED)
        assert (rules["left__xyz"].epsilon, rules["left__rot_6d"].epsilon) == (0.1, 0.2)


def test_patterns_match_whole_names_not_parts() -> None:
    params = NormalizationParams(field_configs={"xyz": FieldNormalizationParams(epsilon=0.1)})
    with pytest.raises(ValueError, match="field 'xyz' is unknown"):
        params.rules(NORMALIZED, NORMALIZED)


def test_patterns_that_disagree_about_a_field_are_an_error() -> None:
    params = NormalizationParams(
        field_configs={
            "left*": FieldNormalizationParams(epsilon=0.1),
            "*xyz": FieldNormalizationParams(epsilon=0.2),
        }
    )
    with pytest.raises(ValueError, match=r"'left\*' and '\*xyz', which disagree about 'left__xyz'"):
        params.rules(NORMALIZED, NORMALIZED)


def test_an_entry_for_a_field_that_is_not_used_is_no_error() -> None:
    params = NormalizationParams(field_configs={"gripper": FieldNormalizationParams(epsilon=0.1)})
    assert list(params.rules(["left__xyz"], NORMALIZED)) == ["left__xyz"]


def test_only_included_fields_are_normalized() -> None:
    rules = NormalizationParams(include_fields=["gripper"]).rules(NORMALIZED, NORMALIZED)
    assert [name for name, rule in rules.items() if rule.enabled] == ["gripper"]
    assert not any(rule.enabled for rule in NormalizationParams(enabled=False).rules(NORMALIZED, NORMALIZED).values())


@pytest.mark.parametrize("name", ["epsilon", "range_floor", "clip"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be above 0"):
        NormalizationParams(**{name: 0.0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=rf"{name} \(-1\) must be above 0"):
        FieldNormalizationParams(**{name: -1.0})  # pyright: ignore[reportArgumentType]


def test_windows_of_statistics_can_not_be_negative() -> None:
    with pytest.raises(ValueError, match=r"lowdim_past_timesteps \(-1\)"):
        NormalizationParams(lowdim_past_timesteps=-1)
