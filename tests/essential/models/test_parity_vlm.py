"""A published vision-language checkpoint gives its recorded outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vla_foundry.batch import IGNORE_INDEX
from vla_foundry.inference.decoding import generate
from vla_foundry.models import create_model, load_model_checkpoint
from vla_foundry.params import ModelParams, load_params_from_yaml

pytestmark = pytest.mark.shared_data

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Published:
    """The checkpoint with what was recorded of it."""

    def __init__(self, folder: Path) -> None:
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.model: Any = create_model(load_params_from_yaml(ModelParams, str(folder / "config_model.yaml")))
        load_model_checkpoint(self.model, folder)
        self.model.eval()


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Published:
    return Published(shared_data / "parity" / "vlm_ps2")


def test_image_tokens(published: Published) -> None:
    pixels = published.inputs["pixel_values"]
    torch.testing.assert_close(published.model.vit(pixels), published.outputs["vit"], **CLOSE)
    torch.testing.assert_close(published.model.encode_images(pixels), published.outputs["projected"], **CLOSE)


def test_logits_and_hidden_states(published: Published) -> None:
    states: list[torch.Tensor] = []
    hook = published.model.transformer.layers[-1].register_forward_hook(lambda _m, _i, out: states.append(out))
    inputs = {"input_ids": published.inputs["input_ids"], "pixel_values": published.inputs["pixel_values"]}
    logits = published.model(**inputs).logits
    hook.remove()
    torch.testing.assert_close(logits, published.outputs["logits"], **CLOSE)
    # what was recorded is the last block's own output, before the norm
    torch.testing.assert_close(states[0], published.outputs["hidden_last"], **CLOSE)
    # padding behind a row changes nothing in front of it
    mask = published.inputs["attention_mask"]
    masked = published.model(**inputs, attention_mask=mask).logits
    is_real = mask.bool()
    torch.testing.assert_close(masked[is_real], published.outputs["logits"][is_real], **CLOSE)


@pytest.mark.parametrize("layout", ["5d", "flat4d"])
def test_two_images_a_sample(published: Published, layout: str) -> None:
    pixels = published.inputs["pixel_values_2img_5d"]
    pixels = pixels if layout == "5d" else pixels.flatten(0, 1)
    logits = published.model(input_ids=published.inputs["input_ids_2img"], pixel_values=pixels).logits
    torch.testing.assert_close(logits, published.outputs[f"logits_2img_{layout}"], **CLOSE)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(published: Published, use_cache: bool) -> None:
    expected, prompt = published.outputs["greedy_tokens"][0], published.inputs["input_ids"][0]
    length = next(n for n in range(len(expected), 0, -1) if torch.equal(expected[:n], prompt[:n]))
    assert 20 < length < 38
    made = generate(
        published.model,
        prompt[None, :length],
        max_new_tokens=38 - length,
        use_cache=use_cache,
        prompt_inputs={"pixel_values": published.inputs["pixel_values"][:1]},
    )
    assert made[0].tokens == expected[length:].tolist()


def test_loss_and_gradients(published: Published) -> None:
    targets = published.inputs["targets"]
    ignored = (targets == published.meta["pad_token_id"]) | (targets == published.meta["image_token_id"])
    output = published.model(
        input_ids=published.inputs["input_ids"],
        pixel_values=published.inputs["pixel_values"],
        targets=targets.masked_fill(ignored, IGNORE_INDEX),
    )
    loss = output.sum / output.count
    assert loss.item() == pytest.approx(published.meta["loss_masked"], rel=1e-6)
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in published.model.named_parameters()}
    assert norms == pytest.approx(published.meta["grad_norms"], rel=1e-5)
