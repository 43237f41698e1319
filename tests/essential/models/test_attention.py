"""On a GPU: documents go through variable-length attention, and a training step never waits for the device."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vla_foundry.batch import Documents
from vla_foundry.models import create_model
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.params.models.vit import ViTParams
from vla_foundry.params.models.vlm import VLMParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PARAMS = TransformerParams(hidden_dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, max_seq_len=512)


@pytest.fixture
def no_sync() -> Iterator[Callable[[], None]]:
    """A function after which every wait for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("is_causal", [True, False])
def test_documents_equal_rows_of_their_own(is_causal: bool, create_documents: Callable[..., Documents]) -> None:
    torch.manual_seed(0)
    model: Any = create_model(PARAMS).cuda()
    model.is_causal = is_causal
    ids = torch.randint(0, 512, (2, 300), device="cuda")
    documents = create_documents([100, 200], [37, 128, 100, -35])
    pieces = [(0, 0, 100), (0, 100, 300), (1, 0, 37), (1, 37, 165), (1, 165, 265)]
    exact = [model(input_ids=ids[r : r + 1, a:b]).logits[0] for r, a, b in pieces]
    with torch.autocast("cuda", torch.bfloat16):
        packed = model(input_ids=ids, documents=documents).logits
    for (row, start, end), alone in zip(pieces, exact, strict=True):
        error = (packed[row, start:end].float() - alone).norm() / alone.norm()
        assert error < 0.02
    fp32 = model(input_ids=ids, documents=documents).logits
    for (row, start, end), alone in zip(pieces, exact, strict=True):
        torch.testing.assert_close(fp32[row, start:end], alone, rtol=1e-3, atol=1e-3)


def test_a_step_never_waits_for_the_device(
    create_documents: Callable[..., Documents], no_sync: Callable[[], None]
) -> None:
    model = create_model(PARAMS).cuda()
    ids = torch.randint(0, 512, (2, 300), device="cuda")
    gradients = []
    for documents in (create_documents([100, 200], [37, 263]), create_documents([150, 150], [200, 60, -40])):
        with torch.autocast("cuda", torch.bfloat16):
            output = model(input_ids=ids, targets=ids, documents=documents, z_loss_coefficient=1e-4)
        output.sum.backward()
        gradients.append(output.sum.detach())
        # the first step may set up what the later ones use
        no_sync()
    torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for value in gradients)


def test_the_loss_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = create_model(PARAMS)
    ids = torch.randint(0, 512, (2, 64))
    ids[0, :9] = 3
    targets = ids.clone()
    targets[1, 20:30] = -100
    expected = model(input_ids=ids, targets=targets, z_loss_coefficient=1e-3)
    expected.sum.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    output = model(input_ids=ids.cuda(), targets=targets.cuda(), z_loss_coefficient=1e-3)
    torch.testing.assert_close(output.sum.cpu(), expected.sum, rtol=1e-4, atol=0)
    assert output.count.item() == expected.count.item()
    output.sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.cpu(), wanted[name], rtol=1e-2, atol=1e-2)


VLM_PARAMS = VLMParams(
    vit=ViTParams(
        hidden_dim=128,
        inter_dim=256,
        n_heads=2,
        n_layers=2,
        patch_size=14,
        img_size=56,
        projector_pixel_shuffle_factor=2,
    ),
    transformer=PARAMS,
    image_token_id=511,
    image_attention="bidirectional",
)


def test_a_step_with_images_that_see_each_other_never_waits_and_equals_the_cpus(
    create_documents: Callable[..., Documents], no_sync: Callable[[], None]
) -> None:
    torch.manual_seed(0)
    model = create_model(VLM_PARAMS)
    ids = torch.randint(0, 500, (2, 200))
    ids[0, 1:5] = ids[0, 101:105] = ids[1, 1:9] = 511
    is_image = ids == 511
    inputs = {
        "input_ids": ids,
        "targets": torch.where(is_image, -100, ids),
        "pixel_values": torch.randn(4, 3, 56, 56),
        "image_positions": is_image.flatten().nonzero().squeeze(1),
    }
    host = {"sees_ahead": is_image.numpy(), "documents": create_documents([100, 100], [160, -40])}
    expected = model(**inputs, **host).sum
    model.cuda()
    moved = {name: value.cuda() for name, value in inputs.items()}
    sums = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            output = model(**moved, **host)
        output.sum.backward()
        sums.append(output.sum.detach())
        # the first step may set up what the later ones use
        no_sync()
    torch.cuda.set_sync_debug_mode("default")
    for value in sums:
        torch.testing.assert_close(value.cpu().float(), expected.detach(), rtol=2e-2, atol=0)
