"""Slots that hold one of several types: which one it is, and what becomes of another type's keys."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from vla_foundry.config.command_line import Parsed, parse
from vla_foundry.config.loading import dump_params, load_params
from vla_foundry.config.schema import BaseParams, ChoiceParams, register_choice

Write = Callable[[str, str], str]


@dataclass(frozen=True, kw_only=True)
class ModelParams(ChoiceParams):
    """Role: any model."""

    _choice_registry = {}
    choice_path = "model.type"
    checkpoint_key = "resume_from_checkpoint"

    resume_from_checkpoint: str | None = None
    resume_weights_only: bool = False
    freeze: bool = False


@dataclass(frozen=True, kw_only=True)
class LanguageModelParams(ModelParams):
    """Role: what reads text."""

    _choice_registry = {}
    native_type = "transformer"


@register_choice("transformer")
@dataclass(frozen=True, kw_only=True)
class TransformerParams(LanguageModelParams):
    """Our own reader."""

    hidden_dim: int = 96
    n_layers: int = 8
    n_heads: int = 4


@register_choice("transformer_hf")
@dataclass(frozen=True, kw_only=True)
class TransformerHFParams(LanguageModelParams):
    """A reader from elsewhere."""

    hf_pretrained: str


@dataclass(frozen=True, kw_only=True)
class DataParams(ChoiceParams):
    """Role: any data."""

    _choice_registry = {}
    choice_path = "data.type"


@dataclass(frozen=True, kw_only=True)
class EyeParams(ModelParams):
    """Role: what looks at images."""

    _choice_registry = {}
    native_type = "test_eye"


@register_choice("test_eye")
@dataclass(frozen=True, kw_only=True)
class NativeEyeParams(EyeParams):
    """Our own."""

    width: int = 8
    patch_size: int = 4


@register_choice("test_eye_hf")
@dataclass(frozen=True, kw_only=True)
class BorrowedEyeParams(EyeParams):
    """One from elsewhere."""

    hf_pretrained: str
    width: int = 16


@dataclass(frozen=True, kw_only=True)
class ToolParams(ModelParams):
    """Role without a native type."""

    _choice_registry = {}


@register_choice("test_hammer")
@dataclass(frozen=True, kw_only=True)
class HammerParams(ToolParams):
    """For nails."""

    weight: float = 1.0


@register_choice("test_saw")
@dataclass(frozen=True, kw_only=True)
class SawParams(ToolParams):
    """For boards; it may hold another tool."""

    teeth: int = 30
    spare: ToolParams | None = None


@register_choice("test_robot")
@dataclass(frozen=True, kw_only=True)
class RobotParams(ModelParams):
    """A model with slots of several roles."""

    eye: EyeParams = field(default_factory=NativeEyeParams)
    brain: LanguageModelParams = field(default_factory=TransformerParams)
    tool: ToolParams | None = None
    tools: dict[str, ToolParams] = field(default_factory=dict)
    spare_eyes: list[EyeParams] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FactoryParams(BaseParams):
    """Root of these tests."""

    model: ModelParams


def read(*words: str) -> Parsed:
    return parse(FactoryParams, list(words), prog="test")


def robot(*words: str) -> RobotParams:
    return read("--model.type", "test_robot", *words).params.model


def test_the_given_type_wins() -> None:
    eye = robot("--model.eye.type", "test_eye_hf", "--model.eye.hf_pretrained", "x").eye
    assert eye == BorrowedEyeParams(hf_pretrained="x")


def test_without_a_type_it_is_that_of_the_checkpoint(write: Write) -> None:
    write("run/config_model.yaml", "type: test_eye_hf\nhf_pretrained: y\n")
    step = write("run/checkpoints/step_00000001/model.safetensors", "")
    parsed = read(
        "--model.type", "test_robot", "--model.eye.resume_from_checkpoint", step, "--model.eye.hf_pretrained", "x"
    )
    assert parsed.params.model.eye.type == "test_eye_hf"
    assert "resume_from_checkpoint" in str(parsed.origins["model.eye.type"])
    # also where only shared keys are given, and the native type would do
    assert robot("--model.eye.type", "test_eye", "--model.eye.resume_from_checkpoint", step).eye.type == "test_eye"
    with pytest.raises(ValueError, match=r"^model\.eye\.hf_pretrained is missing"):
        robot("--model.eye.resume_from_checkpoint", step)


def test_a_remote_checkpoint_is_not_read_for_a_type_and_that_is_said() -> None:
    parsed = read("--model.type", "test_robot", "--model.eye.resume_from_checkpoint", "s3://bucket/run")
    assert parsed.params.model.eye.type == "test_eye"
    (notice,) = parsed.notices
    assert notice.startswith(
        "model.eye.type is assumed to be 'test_eye': the remote config of s3://bucket/run is not read"
    )


def test_without_a_checkpoint_it_is_the_only_type_with_all_given_keys() -> None:
    parsed = read("--model.type", "test_robot", "--model.eye.hf_pretrained", "x", "--model.eye.width", "3")
    assert parsed.params.model.eye == BorrowedEyeParams(hf_pretrained="x", width=3)
    assert str(parsed.origins["model.eye.type"]) == "the only type with the keys hf_pretrained, width"
    assert robot("--model.tool.teeth", "5").tool == SawParams(teeth=5)


def test_otherwise_it_is_the_native_type() -> None:
    assert robot("--model.eye.width", "3").eye == NativeEyeParams(width=3)
    assert robot().eye == NativeEyeParams()
    assert robot("--model.brain.hidden_dim", "8").brain == TransformerParams(hidden_dim=8)


def test_a_slot_without_a_native_type_asks_for_one() -> None:
    message = r"^model\.tool\.type is missing\. Choose one of: test_hammer, test_saw \(--model\.tool\.type NAME\)\.$"
    with pytest.raises(ValueError, match=message):
        robot("--model.tool.freeze", "true")
    with pytest.raises(ValueError, match=r"^model\.type is missing\. Choose one of: "):
        read()


def test_a_type_of_another_role_is_unknown() -> None:
    message = r"^model\.eye\.type 'transformer' is unknown\..* Registered: test_eye, test_eye_hf\.$"
    with pytest.raises(ValueError, match=message):
        robot("--model.eye.type", "transformer")


def test_a_key_of_another_type_says_which_type_has_it() -> None:
    message = r"^model\.eye\.patch_size is unknown for model\.eye\.type 'test_eye_hf'; test_eye has it"
    with pytest.raises(ValueError, match=message):
        robot("--model.eye.type", "test_eye_hf", "--model.eye.hf_pretrained", "x", "--model.eye.patch_size", "2")


def test_changing_the_type_over_a_preset_drops_the_old_types_own_keys_with_a_notice(write: Write) -> None:
    preset = write("robot.yaml", "type: test_robot\neye: {type: test_eye, width: 5, patch_size: 2}\n")
    flags = ["--model.eye.type", "test_eye_hf", "--model.eye.hf_pretrained", "x"]
    for words in ([*flags, "--model", f"include {preset}"], ["--model", f"include {preset}", *flags]):
        parsed = read(*words)
        assert parsed.params.model.eye == BorrowedEyeParams(hf_pretrained="x", width=5)
        assert parsed.notices == [
            "model.eye.type is now 'test_eye_hf' (command line): dropped model.eye.patch_size, "
            "which belong to another type."
        ]


def test_what_is_given_beside_the_new_type_is_never_dropped(write: Write) -> None:
    preset = write("robot.yaml", "type: test_robot\neye: {type: test_eye, width: 5, patch_size: 2}\n")
    with pytest.raises(ValueError, match=r"^model\.eye\.patch_size is unknown for model\.eye\.type 'test_eye_hf'"):
        read("--model", f"include {preset}", "--model.eye", "{type: test_eye_hf, hf_pretrained: x, patch_size: 3}")


def test_flags_of_one_command_line_are_never_dropped_in_whatever_order() -> None:
    pairs = (
        ("--model.eye.patch_size", "2"),
        ("--model.eye.hf_pretrained", "x"),
        ("--model.eye.type", "test_eye_hf"),
        ("--model.type", "test_robot"),
    )
    for order in itertools.permutations(pairs):
        with pytest.raises(ValueError, match=r"^model\.eye\.patch_size is unknown for model\.eye\.type 'test_eye_hf'"):
            read(*(word for pair in order for word in pair))


def test_a_typing_error_in_a_preset_is_not_dropped_with_the_old_type(write: Write) -> None:
    preset = write("robot.yaml", "type: test_robot\neye: {type: test_eye, wdith: 5}\n")
    with pytest.raises(ValueError, match=r"robot\.yaml:2: model\.eye\.wdith is unknown"):
        read("--model", f"include {preset}", "--model.eye.type", "test_eye_hf", "--model.eye.hf_pretrained", "x")


def test_a_whole_model_can_change_its_type_over_a_preset(write: Write) -> None:
    preset = write("robot.yaml", "type: test_robot\neye: {width: 5}\ntool: {teeth: 3}\nfreeze: true\n")
    parsed = read("--model", f"include {preset}", "--model.type", "test_hammer")
    assert parsed.params.model == HammerParams(freeze=True)
    assert parsed.notices[0].endswith("dropped model.eye, model.tool, which belong to another type.")


def test_slots_in_dicts_lists_and_slots_of_their_own_role_round_trip(write: Write) -> None:
    params = robot(
        *("--model.tool", "{teeth: 4, spare: {type: test_saw, spare: {weight: 2}}}"),
        *("--model.tools", "{left: {weight: 1e1}, right: {teeth: 2}}"),
        *("--model.spare_eyes", "[{width: 1}, {hf_pretrained: z}]"),
    )
    assert params.tool == SawParams(teeth=4, spare=SawParams(spare=HammerParams(weight=2.0)))
    assert params.tools == {"left": HammerParams(weight=10.0), "right": SawParams(teeth=2)}
    assert params.spare_eyes == [NativeEyeParams(width=1), BorrowedEyeParams(hf_pretrained="z")]
    assert load_params(ModelParams, write("model.yaml", dump_params(params))) == params


def test_an_empty_optional_slot_is_null(write: Write) -> None:
    preset = write("robot.yaml", "type: test_robot\ntool: {teeth: 3}\n")
    assert read("--model", f"include {preset}", "--model.tool", "null").params.model.tool is None


def test_two_types_of_one_name_are_an_error_within_a_role_and_not_across_kinds() -> None:
    with pytest.raises(ValueError, match=r"^model\.type 'test_eye' is registered twice"):

        @register_choice("test_eye")
        @dataclass(frozen=True, kw_only=True)
        class OtherEyeParams(EyeParams):
            """Another one."""

    @register_choice("test_eye")
    @dataclass(frozen=True, kw_only=True)
    class EyeDataParams(DataParams):
        """Data may have the name of a model."""

    assert EyeDataParams().type == "test_eye"
