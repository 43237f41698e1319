"""The paper's policies have the sizes of its Table 3; they are made on the meta device, without memory."""

from typing import Any

import pytest
import torch

from vla_foundry.config.command_line import parse
from vla_foundry.models import create_model
from vla_foundry.models.action_heads.action_head import HeadWidths, create_action_head
from vla_foundry.params import ModelParams

# of LBM's two arms
WIDTHS = ["--action_dim", "20", "--proprioception_dim", "20"]


def load_preset(name: str, *words: str) -> Any:
    return parse(ModelParams, ["--config_path", f"config_presets/models/{name}.yaml", *WIDTHS, *words], prog="").params


def count(module: Any, *, without: tuple[str, ...] = ()) -> float:
    """Parameters in millions, but for those whose names hold one of `without`."""
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if not any(part in name for part in without)) / 1e6


def test_foundry_vla() -> None:
    params = load_preset("foundry_vla_1.7b", "--vision_language_backbone.vlm.image_token_id", "49190")
    with torch.device("meta"):
        policy: Any = create_model(params)
    assert count(policy) == pytest.approx(1852, abs=1)
    assert count(policy, without=("embeddings", "output.weight")) == pytest.approx(1650, abs=1)
    backbone, head = policy.vision_language_backbone.model, policy.action_head
    assert count(backbone) == pytest.approx(1527.2, abs=0.1)
    assert count(backbone.vit) == pytest.approx(85.7, abs=0.1)
    assert count(head) == pytest.approx(325, abs=0.5)
    # a row for each time, and the map from the states of four layers
    assert count(head.time_encoding) == 1000 * 8192 / 1e6
    assert count(head.condition_encode) == (8192 * 1024 + 1024) / 1e6
    # all that the head holds is used
    assert not any("embeddings" in name for name, _ in head.named_parameters())


def test_the_head_of_foundry_qwen3vla() -> None:
    params = load_preset("foundry_qwen3vla_2.1b")
    assert (params.vision_language_backbone.type, params.vision_language_backbone.num_vlm_layers_to_use) == (
        "vlm_backbone",
        1,
    )
    # the language model of Qwen3-VL-2B is 2048 wide
    widths = HeadWidths(action_dim=20, proprioception_dim=20, conditioning_dim=2048)
    with torch.device("meta"):
        head: Any = create_action_head(params.action_head, widths)
    assert count(head) == pytest.approx(312.5, abs=0.3)
