"""Models are found by name, added from outside, and importing their package is cheap."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

from vla_foundry.models import create_model, register_model
from vla_foundry.models.registry import BATCH_HANDLERS, MODELS
from vla_foundry.params.models.roles import ModelParams, register_model_params


def test_importing_models_needs_no_torch() -> None:
    code = "import sys, vla_foundry.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_from_outside_is_created_by_its_name() -> None:
    @register_model_params("test_registry_model")
    @dataclass(frozen=True, kw_only=True)
    class OutsideParams(ModelParams):
        width: int = 3

    calls: list[bool] = []

    @register_model("test_registry_model")
    def create_outside(params: OutsideParams, load_pretrained: bool = True) -> nn.Module:
        calls.append(load_pretrained)
        return nn.Linear(params.width, 1)

    model: Any = create_model(OutsideParams(width=5, freeze=True))
    assert model.in_features == 5
    assert not model.weight.requires_grad
    create_model(OutsideParams(), load_pretrained=False)
    assert calls == [True, False]


def test_a_type_without_a_model_is_named() -> None:
    @register_model_params("test_registry_nameless")
    @dataclass(frozen=True, kw_only=True)
    class NamelessParams(ModelParams):
        pass

    with pytest.raises(ValueError, match=r"model\.type 'test_registry_nameless' is unknown.*transformer_hf"):
        create_model(NamelessParams())


def test_every_model_that_comes_with_the_package_can_be_imported() -> None:
    assert {"transformer", "transformer_hf"} <= set(MODELS.names())
    for name in ("transformer", "transformer_hf"):
        assert callable(MODELS.get(name))
        assert callable(BATCH_HANDLERS.get(name))
