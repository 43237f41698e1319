"""A published policy gives its recorded velocities, loss and sampled actions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vla_foundry.models import create_model, load_model_checkpoint
from vla_foundry.models.action_heads.action_head import ActionWindow, reduce_loss
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.models.backbones.vlm_foundry import prepare_observation
from vla_foundry.params import ModelParams, load_params_from_yaml

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class Published:
    """The policy with what was recorded of it."""

    def __init__(self, source: Path) -> None:
        self.inputs = load_file(source / "inputs.safetensors")
        self.outputs = load_file(source / "outputs.safetensors")
        self.meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
        # the loading snippet of the paper
        self.params: Any = load_params_from_yaml(ModelParams, str(source / "config_model.yaml"))
        self.model: Any = create_model(self.params)
        load_model_checkpoint(self.model, str(source / "checkpoints" / "checkpoint_1.pt"))
        self.model.eval()
        self.head = self.model.action_head

    def condition(self) -> Conditioning:
        # padding was read there like text, so it is given as text
        batch = {"input_ids": self.inputs["input_ids"].int()}
        observation = prepare_observation(self.params.vision_language_backbone, batch, "cpu")
        observation["pixel_values"] = self.inputs["pixel_values"].flatten(0, 1)
        return self.model.vision_language_backbone(**observation)

    def window(self, past_mask: Tensor) -> ActionWindow:
        # steps of padding were shown there like observed ones
        actions, proprioception = self.inputs["actions"], self.inputs["proprioception"]
        return ActionWindow(actions, past_mask, ~past_mask, None, proprioception, None)


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Published:
    return Published(shared_data / "parity" / "vla_foundry_flow")


@pytest.mark.shared_data
@torch.no_grad()
def test_velocity_and_loss(published: Published) -> None:
    inputs, outputs, head = published.inputs, published.outputs, published.head
    conditioning = published.condition()
    torch.testing.assert_close(conditioning.tokens, outputs["conditioning"], **CLOSE)
    window = published.window(~inputs["future_mask"])
    times = inputs["timesteps"] / published.params.action_head.noise.num_timesteps
    noised = head.process.add_noise(inputs["actions"], inputs["noise"], times)
    noised = torch.where(window.free_mask(), noised, window.held_actions())
    torch.testing.assert_close(noised, outputs["noisy_action_model_input"], **CLOSE)
    velocity = head.predict(noised, times, head.embed_context(conditioning, window))
    torch.testing.assert_close(velocity, outputs["predicted_direction"], **CLOSE)
    loss = reduce_loss((velocity - head.process.target(inputs["actions"], inputs["noise"])).square(), window)
    assert (loss.sum / loss.count).item() == pytest.approx(published.meta["loss"], rel=1e-5)


@pytest.mark.shared_data
@pytest.mark.parametrize("num_steps", [4, 10])
@pytest.mark.parametrize("has_past", [False, True])
def test_sampled_actions(published: Published, num_steps: int, has_past: bool) -> None:
    past_mask = published.inputs["past_mask"]
    window = published.window(past_mask if has_past else torch.zeros_like(past_mask))
    made = published.head.sample_from(published.inputs["sampling_noise"], published.condition(), window, num_steps)
    expected = published.outputs[f"actions_{num_steps}steps{'_pastmask' if has_past else ''}"]
    torch.testing.assert_close(made, expected, **CLOSE)
