"""The chunked language-model loss equals the dense one, and never builds the logits of all tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vla_foundry.batch import IGNORE_INDEX
from vla_foundry.models.losses import dense_language_model_loss, language_model_loss

B, T, D, V = 3, 7, 5, 23


def random_inputs(dtype: torch.dtype = torch.float64, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, dtype=dtype, generator=generator).requires_grad_()
    head = torch.randn(V, D, dtype=dtype, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[torch.rand(B, T, generator=generator) < ignored] = IGNORE_INDEX
    return hidden, head, targets


def dense_loss(hidden: Tensor, head: Tensor, targets: Tensor, z: float) -> Tensor:
    logits = (hidden @ head.T).flatten(0, 1)
    kept = targets.flatten() != IGNORE_INDEX
    cross_entropy = F.cross_entropy(logits[kept], targets.flatten()[kept], reduction="sum")
    return cross_entropy + z * logits[kept].logsumexp(-1).square().sum()


@pytest.mark.parametrize("z", [0.0, 0.05])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000, None])
def test_value_and_gradients_equal_the_dense_loss(z: float, chunk_tokens: int | None) -> None:
    hidden, head, targets = random_inputs()
    output = language_model_loss(hidden, head, targets, z_loss_coefficient=z, chunk_tokens=chunk_tokens)
    expected = dense_loss(hidden, head, targets, z)
    torch.testing.assert_close(output.sum, expected, rtol=1e-12, atol=1e-12)
    # a factor that is not 1: the backward pass has to scale what the forward pass made
    gradients = torch.autograd.grad(output.sum * 0.37, [hidden, head])
    expected_gradients = torch.autograd.grad(expected * 0.37, [hidden, head])
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


def test_count_and_logs_add_up() -> None:
    hidden, head, targets = random_inputs()
    output = language_model_loss(hidden, head, targets, z_loss_coefficient=0.1)
    assert output.count.item() == (targets != IGNORE_INDEX).sum().item()
    assert set(output.logs) == {"cross_entropy", "z_loss"}
    torch.testing.assert_close(output.logs["cross_entropy"], dense_loss(hidden, head, targets, 0.0).detach())
    torch.testing.assert_close(output.logs["cross_entropy"] + output.logs["z_loss"], output.sum.detach())
    assert not any(value.requires_grad for value in output.logs.values())


@pytest.mark.parametrize("targets", [torch.full((B, T), IGNORE_INDEX), torch.zeros(B, 0, dtype=torch.long)])
def test_no_targets_give_zero_with_a_gradient(targets: Tensor) -> None:
    hidden, head, _ = random_inputs()
    output = language_model_loss(hidden[:, : targets.shape[1]], head, targets, z_loss_coefficient=0.1)
    assert output.sum.item() == 0
    assert output.count.item() == 0
    output.sum.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.full((1, 2, 1), 300.0, requires_grad=True)
    head = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    output = language_model_loss(hidden, head, torch.tensor([[0, 2]]))
    assert output.sum.item() == pytest.approx(600.0)
    output.sum.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, head, targets = random_inputs()
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    language_model_loss(hidden, head, targets).sum.backward()
    trained, other = (head, hidden) if frozen == "hidden" else (hidden, head)
    assert trained.grad is not None
    assert other.grad is None


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, head, targets = random_inputs()
    with torch.no_grad():
        output = language_model_loss(hidden, head, targets)
    assert not output.sum.requires_grad
    torch.testing.assert_close(output.sum, dense_loss(hidden, head, targets, 0.0).detach())


def test_a_second_backward_is_refused_not_wrong() -> None:
    hidden, head, targets = random_inputs()
    output = language_model_loss(hidden, head, targets)
    output.sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum.backward()


def test_autocast_rounds_the_products_only() -> None:
    hidden, head, targets = random_inputs(torch.float32)
    exact = torch.autograd.grad(dense_loss(hidden, head, targets, 0.01), [hidden, head])
    with torch.autocast("cpu", torch.bfloat16):
        output = language_model_loss(hidden, head, targets, z_loss_coefficient=0.01, chunk_tokens=4)
    assert output.sum.dtype == torch.float32
    torch.testing.assert_close(output.sum, dense_loss(hidden, head, targets, 0.01), rtol=1e-2, atol=0)
    gradients = torch.autograd.grad(output.sum, [hidden, head])
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]
    for gradient, expected in zip(gradients, exact, strict=True):
        assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_bf16_weights_give_bf16_gradients_of_an_fp32_sum() -> None:
    hidden, head, targets = random_inputs(torch.bfloat16)
    output = language_model_loss(hidden, head, targets, chunk_tokens=4)
    assert output.sum.dtype == torch.float32
    output.sum.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert head.grad is not None
    assert head.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("is_autocast", [False, True])
def test_largest_temporary_does_not_grow_with_the_vocabulary(record_shapes: type, is_autocast: bool) -> None:
    num_tokens, dim = 512, 4
    largest = {}
    for vocab_size in (2**14, 2**17):
        hidden = torch.randn(1, num_tokens, dim, requires_grad=True)
        head = torch.randn(vocab_size, dim, requires_grad=True)
        targets = torch.randint(0, vocab_size, (1, num_tokens))
        with record_shapes() as record, torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            language_model_loss(hidden, head, targets, z_loss_coefficient=1e-4).sum.backward()
        sizes = [torch.Size(shape).numel() for shape in record.shapes if shape not in {(vocab_size, dim)}]
        largest[vocab_size] = max(sizes)
    # 32 MiB of fp32 logits; all logits of the larger vocabulary would be 256 MiB
    assert largest[2**17] <= largest[2**14] <= 2**23


def test_dense_loss_for_special_heads_is_the_same_sum() -> None:
    hidden, head, targets = random_inputs()
    chunked = language_model_loss(hidden, head, targets, z_loss_coefficient=0.1)
    dense = dense_language_model_loss(hidden @ head.T, targets, z_loss_coefficient=0.1)
    torch.testing.assert_close(dense.sum, chunked.sum)
    torch.testing.assert_close(dense.logs, chunked.logs)
    assert dense.count.item() == chunked.count.item()
