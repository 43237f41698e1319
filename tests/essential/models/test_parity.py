"""A published checkpoint gives its recorded outputs: logits, states, greedy tokens, losses, gradients, training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vla_foundry.batch import IGNORE_INDEX, LossOutput
from vla_foundry.inference.decoding import generate
from vla_foundry.models import create_model, load_model_checkpoint
from vla_foundry.params import ModelParams, load_params_from_yaml

pytestmark = pytest.mark.shared_data

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Published:
    """The checkpoint with what was recorded of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def load(self, **changes: Any) -> Any:
        params = load_params_from_yaml(ModelParams, str(self.folder / "config_model.yaml"))
        model = create_model(dataclasses.replace(params, **changes))
        load_model_checkpoint(model, self.folder)
        return model.eval()


@pytest.fixture
def published(shared_data: Path) -> Published:
    return Published(shared_data / "parity" / "transformer_base")


def mean_loss(output: LossOutput) -> Tensor:
    return output.sum / output.count


def test_logits_and_hidden_states(published: Published) -> None:
    model, states = published.load(), []
    for block in model.blocks():
        block.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    output = model(input_ids=published.inputs["input_ids"], output_hidden_states=True)
    torch.testing.assert_close(output.logits, published.outputs["logits"], **CLOSE)
    # what was recorded is each block's own output; ours are the same but for the last, which is taken after the norm
    for i, state in enumerate(states):
        torch.testing.assert_close(state, published.outputs[f"hidden_{i}"], **CLOSE)
    for i in (1, 2):
        torch.testing.assert_close(output.hidden_states[i], published.outputs[f"hidden_{i - 1}"], **CLOSE)
    torch.testing.assert_close(output.hidden_states[3], model.norm(published.outputs["hidden_2"]), **CLOSE)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(published: Published, use_cache: bool) -> None:
    expected = published.outputs["greedy_tokens_cache" if use_cache else "greedy_tokens_nocache"]
    prompts = published.inputs["input_ids"][:2]
    length = next(n for n in range(32, 0, -1) if torch.equal(expected[:, :n], prompts[:, :n]))
    assert 0 < length < 21
    made = generate(published.load(), prompts[:, :length], max_new_tokens=21 - length, use_cache=use_cache)
    assert [row.tokens for row in made] == expected[:, length:].tolist()


def test_left_padded_rows_with_a_cache(published: Published) -> None:
    mask = published.inputs["attention_mask_leftpad"]
    output = published.load().decode(published.inputs["input_ids"], mask)
    is_real = mask.bool()
    # Only the difference of two positions enters a logit, so that it does not matter that padding took positions when
    # these were recorded; the rotated keys of the padded row differ for it, those of the others do not.
    expected = published.outputs["logits_attnmask_use_cache"]
    torch.testing.assert_close(output.logits[is_real], expected[is_real], **CLOSE)
    keys, values = output.past_key_values.layers[0].keys[:, :32], output.past_key_values.layers[0].values[:, :32]
    full = is_real.all(1)
    torch.testing.assert_close(keys[full], published.outputs["kv0_k"][full], **CLOSE)
    torch.testing.assert_close(values[full], published.outputs["kv0_v"][full], **CLOSE)
    torch.testing.assert_close(values[1, :26], published.outputs["kv0_v"][1, 6:], **CLOSE)


def test_losses_and_gradients(published: Published) -> None:
    model, ids, targets = published.load(), published.inputs["input_ids"], published.inputs["targets"]
    ignored = published.inputs["loss_mask_True_is_ignored"]
    loss = mean_loss(model(input_ids=ids, targets=targets))
    masked = model(input_ids=ids, targets=targets.masked_fill(ignored, IGNORE_INDEX))
    assert loss.item() == pytest.approx(published.meta["loss"], rel=1e-6)
    assert mean_loss(masked).item() == pytest.approx(published.meta["loss_masked"], rel=1e-6)
    with_z = model(input_ids=ids, targets=targets, z_loss_coefficient=1e-3)
    assert mean_loss(with_z).item() == pytest.approx(published.meta["loss_zloss_1e-3"], rel=1e-6)
    # the recorded masked z-loss is averaged over masked places too, which ours is not
    all_z = (with_z.logs["z_loss"] / with_z.count).item()
    assert mean_loss(masked).item() + all_z == pytest.approx(published.meta["loss_zloss_masked_1e-3"], rel=1e-6)
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(published.meta["grad_norms"], rel=1e-4)


def test_training_five_steps(published: Published) -> None:
    model, ids, targets = published.load(), published.inputs["input_ids"], published.inputs["targets"]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(5):
        loss = mean_loss(model(input_ids=ids, targets=targets))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    assert losses == pytest.approx(published.meta["train_losses_5steps"], rel=1e-5)
    torch.testing.assert_close(
        model(input_ids=ids).logits, published.outputs["logits_after_5steps"], rtol=1e-3, atol=1e-4
    )


def learning_rate(step: int) -> float:
    """Warm-up over 2 steps, then a cosine over 33."""
    if step < 2:
        return 1e-2 * (step + 1) / 2
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - 2) / 31)).item()) * 1e-2


@pytest.mark.parametrize("rounds_frequencies", [True, False])
def test_bf16_compute(published: Published, rounds_frequencies: bool) -> None:
    model = published.load(rope_bf16_frequencies=rounds_frequencies)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=published.inputs["input_ids"]).logits.float()
    difference = (logits - published.outputs["logits_bf16_autocast"]).abs()
    # bf16 has 8 bits; the logits reach 3
    assert difference.max() < 0.08
    assert difference.mean() < 0.01
