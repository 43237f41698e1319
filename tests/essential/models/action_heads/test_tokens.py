"""Heads that write tokens: what trains what, and that a chunk is always whole."""

from types import ModuleType
from typing import Any

import pytest
import torch

from vla_foundry.models import create_batch_handler


def create(policies: ModuleType, head: str, backbone: str = "vlm", **options: Any) -> tuple[Any, Any]:
    params = policies.create_params(
        policies.create_backbone_params(backbone), policies.create_head_params(head), **options
    )
    return policies.create_policy(params), create_batch_handler(params)


def gradients_of(module: Any) -> dict[str, float]:
    return {name: p.grad.abs().sum().item() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backbone", ["vlm", "vlm prefix"])
def test_the_head_of_an_insulated_backbone_gives_it_no_gradient_and_tokens_do(backbone: str, policies) -> None:
    policy, handler = create(policies, "flow concat", backbone, is_insulated=True)
    inputs = handler.prepare(policies.create_batch(0), "cpu")
    policy.action_tokens_weight = 0.0
    policy(**inputs).sum.backward()
    assert all(total == 0.0 for total in gradients_of(policy.vision_language_backbone).values())
    assert sum(gradients_of(policy.action_head).values()) > 0
    policy.zero_grad()
    policy.action_tokens_weight = 1.0
    policy(**inputs).sum.backward()
    found = gradients_of(policy.vision_language_backbone)
    assert all(total > 0.0 for name, total in found.items() if not name.endswith("transformer.embeddings.weight"))
    assert sum(found.values()) > 0
    head = gradients_of(policy.action_head)
    policy.zero_grad()
    policy.insulate_backbone = False
    policy(**inputs).sum.backward()
    # the head learns the same, and now the backbone learns from it too
    assert gradients_of(policy.action_head) == pytest.approx(head)
    assert gradients_of(policy.vision_language_backbone) != pytest.approx(found)


def test_captions_train_an_insulated_backbone(policies) -> None:
    policy, _ = create(policies, "flow adaptive", is_insulated=True)
    ids = torch.randint(3, 89, (2, 9))
    policy(language={"input_ids": ids[:, :-1], "targets": ids[:, 1:]}).sum.backward()
    assert gradients_of(policy.vision_language_backbone)
    assert not gradients_of(policy.action_head)


@pytest.mark.parametrize("head", ["fast tokens", "discrete bins"])
def test_what_is_written_is_what_the_likeliest_tokens_of_a_whole_row_say(head: str, policies) -> None:
    policy, handler = create(policies, head)
    batch = policies.create_batch(0, is_plain=True)
    # without its head's noise an untrained model would always write one token
    with torch.no_grad():
        policy.action_head.output.weight.normal_()
    policy.eval()
    written = policy.sample(handler.prepare_sampling(batch, "cpu"), seeds=torch.tensor([0, 1]))
    tokenizer = policy.action_head.tokenizer
    chunks = written[:, policies.PAST :].numpy()
    ids = tokenizer.encode(chunks)
    again = torch.stack([torch.from_numpy(tokenizer.decode(row)).float() for row in ids])
    if head == "discrete bins":
        assert torch.equal(again, written[:, policies.PAST :])
        inputs = handler.prepare({**batch, "actions": written}, "cpu")
        output = policy(**inputs)
        # every token is the likeliest given those before it
        assert output.logs["token_accuracy"].item() == output.count.item()


def test_a_model_that_predicts_nonsense_still_acts(policies) -> None:
    policy, handler = create(policies, "fast tokens")
    with torch.no_grad():
        policy.action_head.output.weight.fill_(torch.nan)
    inputs = handler.prepare_sampling(policies.create_batch(0), "cpu")
    assert policy.sample(inputs, seeds=torch.tensor([0, 1])).isfinite().all()


def test_rows_of_chunks_with_more_tokens_weigh_as_much_as_others(policies) -> None:
    policy, handler = create(policies, "fast tokens")
    batch = policies.create_batch(0, is_plain=True)
    batch["actions"][0] = 0.0  # few tokens
    both = policy(**handler.prepare(batch, "cpu"))
    losses = []
    for row in range(2):
        rows = {name: value[row : row + 1] for name, value in batch.items() if isinstance(value, torch.Tensor)}
        images = batch["pixel_values"][2 * row : 2 * row + 2]
        ids = batch["input_ids"][row : row + 1, : 14 + 2 * row]
        one = {**batch, **rows, "pixel_values": images, "input_ids": ids}
        del one["documents"]
        output = policy(**handler.prepare(one, "cpu"))
        losses.append(output.sum / output.count)
    assert (both.sum / both.count).item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)
