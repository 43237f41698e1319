"""Normalization params: which rule a field gets."""

import pytest

from vla_foundry.params.robotics import FieldNormalizationParams, NormalizationParams

FIELDS = ["left__xyz", "left__rot_6d", "gripper"]


def test_a_field_takes_what_its_entry_leaves_out_from_all_others() -> None:
    params = NormalizationParams(
        method="percentile_1_99",
        epsilon=1e-2,
        centered_norm=True,
        field_configs={"*rot_6d": FieldNormalizationParams(method="std")},
    )
    rules = params.rules(FIELDS, FIELDS)
    assert (rules["left__rot_6d"].method, rules["left__rot_6d"].epsilon) == ("std", 1e-2)
    assert (rules["left__xyz"].method, rules["left__xyz"].centered) == ("percentile_1_99", True)


def test_an_exact_name_wins_over_patterns_whatever_the_order() -> None:
    exact, pattern = FieldNormalizationParams(epsilon=0.1), FieldNormalizationParams(epsilon=0.2)
    for entries in ({"left__xyz": exact, "left*": pattern}, {"left*": pattern, "left__xyz": exact}):
        rules = NormalizationParams(field_configs=entries).rules(FIELDS, FIELDS)
        assert (rules["left__xyz"].epsilon, rules["left__rot_6d"].epsilon) == (0.1, 0.2)


def test_patterns_match_whole_names_not_parts() -> None:
    params = NormalizationParams(field_configs={"xyz": FieldNormalizationParams(epsilon=0.1)})
    with pytest.raises(ValueError, match="field 'xyz' is unknown"):
        params.rules(FIELDS, FIELDS)


def test_patterns_that_disagree_about_a_field_are_an_error() -> None:
    params = NormalizationParams(
        field_configs={
            "left*": FieldNormalizationParams(epsilon=0.1),
            "*xyz": FieldNormalizationParams(epsilon=0.2),
        }
    )
    with pytest.raises(ValueError, match=r"'left\*' and '\*xyz', which disagree about 'left__xyz'"):
        params.rules(FIELDS, FIELDS)


def test_an_entry_for_a_field_that_is_not_used_is_no_error() -> None:
    params = NormalizationParams(field_configs={"gripper": FieldNormalizationParams(epsilon=0.1)})
    assert list(params.rules(["left__xyz"], FIELDS)) == ["left__xyz"]


def test_only_included_fields_are_normalized() -> None:
    rules = NormalizationParams(include_fields=["gripper"]).rules(FIELDS, FIELDS)
    assert [name for name, rule in rules.items() if rule.enabled] == ["gripper"]
    assert not any(rule.enabled for rule in NormalizationParams(enabled=False).rules(FIELDS, FIELDS).values())


@pytest.mark.parametrize("name", ["epsilon", "range_floor", "clip"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be above 0"):
        NormalizationParams(**{name: 0.0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=rf"{name} \(-1\) must be above 0"):
        FieldNormalizationParams(**{name: -1.0})  # pyright: ignore[reportArgumentType]


def test_windows_of_statistics_can_not_be_negative() -> None:
    with pytest.raises(ValueError, match=r"lowdim_past_timesteps \(-1\)"):
        NormalizationParams(lowdim_past_timesteps=-1)
