"""Derivation in the order that a root declares, checks after it, and the print of what came of it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from vla_foundry.config.loading import load_params
from vla_foundry.config.resolve import format_resolved, require_resolved, resolve, resolve_known
from vla_foundry.config.schema import BaseParams, Derived, Unavailable
from vla_foundry.config.tree import Origin

Write = Callable[[str, str], str]


@dataclass(frozen=True, kw_only=True)
class WheelParams(BaseParams):
    """A part."""

    radius: float | None = None

    def derive(self, root: Any, facts: Any) -> dict[str, Derived]:
        return {} if self.radius is not None else {"radius": Derived(facts / 2, "half the fact")}


@dataclass(frozen=True, kw_only=True)
class FrameParams(BaseParams):
    """Derived first, and once more when the load is known."""

    height: float | None = None
    weight: float | None = None
    wheels: dict[str, WheelParams] = field(default_factory=dict)

    def derive(self, root: Any, facts: Any) -> dict[str, Derived]:
        derived = {} if self.height is not None else {"height": Derived(facts, "the facts")}
        if self.weight is None:
            load = root.load.weight
            derived["weight"] = Derived(Unavailable("load.weight") if load is None else load / 10, "load.weight")
        return derived


@dataclass(frozen=True, kw_only=True)
class LoadParams(BaseParams):
    """Follows the frame."""

    weight: float | None = None

    def derive(self, root: Any, facts: Any) -> dict[str, Derived]:
        return {} if self.weight is not None else {"weight": Derived(root.frame.height * 50, "frame.height")}

    def check(self, root: Any, facts: Any, path: str) -> list[str]:
        if self.weight is not None and self.weight > 500:
            raise ValueError(f"{path}.weight ({self.weight:g}) must be at most 500.")
        return [f"{path} is checked"]


@dataclass(frozen=True, kw_only=True)
class CartParams(BaseParams):
    """A root."""

    derivation_order = ("frame", "load", "frame")

    frame: FrameParams = field(default_factory=FrameParams)
    load: LoadParams = field(default_factory=LoadParams)
    total: float | None = None

    def derive(self, root: Any, facts: Any) -> dict[str, Derived]:
        return {"total": Derived(root.frame.weight + root.load.weight, "frame and load")}

    def check(self, root: Any, facts: Any, path: str) -> list[str]:
        return ["the cart is checked"]


CART = CartParams(frame=FrameParams(wheels={"left": WheelParams(), "right": WheelParams(radius=3.0)}))


def test_sections_follow_each_other_in_the_order_that_the_root_declares() -> None:
    resolved = resolve_known(CART, 2.0)
    assert (resolved.params.frame.height, resolved.params.load.weight, resolved.params.frame.weight) == (
        2.0,
        100.0,
        10.0,
    )
    assert resolved.params.total == 110.0
    assert {name: wheel.radius for name, wheel in resolved.params.frame.wheels.items()} == {"left": 1.0, "right": 3.0}
    assert resolved.unresolved == {}
    assert resolved.sources["frame.wheels.left.radius"] == "half the fact"
    assert resolved.notices == ["load is checked", "the cart is checked"]
    assert CART.frame.height is None
    assert resolve(resolved.params, 2.0) == resolved.params


def test_what_is_not_known_is_left_open_and_an_error_where_it_is_needed() -> None:
    resolved = resolve_known(WagonParams(), None)
    assert resolved.unresolved == {"frame.height": "a ruler"}
    with pytest.raises(ValueError, match=r"^frame\.height cannot be resolved: it needs a ruler\."):
        require_resolved(resolved)


@dataclass(frozen=True, kw_only=True)
class RulerParams(BaseParams):
    """A section that needs a fact."""

    height: float | None = None

    def derive(self, root: Any, facts: Any) -> dict[str, Derived]:
        return {"height": Derived(Unavailable("a ruler"), "nothing")}


@dataclass(frozen=True, kw_only=True)
class WagonParams(BaseParams):
    """A root."""

    derivation_order = ("frame",)
    frame: RulerParams = field(default_factory=RulerParams)


def test_an_error_of_a_check_names_the_path() -> None:
    with pytest.raises(ValueError, match=r"^load\.weight \(501\) must be at most 500\."):
        resolve(replace(CART, load=LoadParams(weight=501.0)), 2.0)


def test_the_print_names_every_origin_and_loads_to_the_same_params(write: Write) -> None:
    resolved = resolve_known(CART, 2.0)
    text = format_resolved(resolved, {"frame.wheels.right.radius": Origin("cart.yaml", 4)})
    lines = [line.strip().split(" # ") for line in text.splitlines() if " # " in line]
    assert [comment for value, comment in lines if value.startswith("radius: 3.0")] == ["cart.yaml:4"]
    assert [comment for value, comment in lines if value.startswith("total: 110.0")] == ["resolved from frame and load"]
    assert load_params(CartParams, write("cart.yaml", text)) == resolved.params
