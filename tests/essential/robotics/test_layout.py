"""Fields side by side in one array."""

import numpy as np
import pytest

from vla_foundry.robotics.layout import FieldLayout


def test_a_layout_puts_fields_side_by_side_and_takes_them_apart() -> None:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(5, 3)), "b": rng.normal(size=(5, 1)), "c": rng.normal(size=(5, 6))}
    layout = FieldLayout.create(["c", "a"], {name: array.shape[-1] for name, array in arrays.items()})
    whole = layout.concatenate(arrays)
    assert whole.shape == (5, layout.width) == (5, 9)
    assert np.array_equal(whole[:, :6], arrays["c"])
    parts = layout.split(whole)
    assert list(parts) == ["c", "a"]
    assert all(np.array_equal(parts[name], arrays[name]) for name in parts)


def test_a_layout_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"data.action_fields 'grippr' is unknown. Did you mean 'gripper'"):
        FieldLayout.create(["grippr"], {"gripper": 1}, what="data.action_fields")
    with pytest.raises(ValueError, match="lists 'a' twice"):
        FieldLayout.create(["a", "a"], {"a": 1})
    with pytest.raises(ValueError, match="'a' has 2 columns, expected 3"):
        FieldLayout(("a",), (3,)).concatenate({"a": np.zeros((4, 2))})
