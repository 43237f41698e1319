"""Optional kernels. Products in fp8 run on a CPU, whose kernels round as a GPU's do; FlashAttention 3 does not."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vla_foundry.batch import Batch
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.params import HyperParams, TrainExperimentParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.models.roles import LoRAParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.training.distributed import parallelize, start_process_group
from vla_foundry.training.kernels import use_flash_attention_3
from vla_foundry.training.loop import train_step
from vla_foundry.training.state import TrainState, create_train_state
from vla_foundry.world import World

VOCABULARY, T, NUM_STEPS = 256, 48, 200
MODEL = TransformerParams(hidden_dim=48, n_layers=2, n_heads=3, vocab_size=VOCABULARY, max_seq_len=T)
HPARAMS: dict[str, Any] = {"lr": 5e-3, "warmup": 10.0, "grad_clip_norm": 1.0}


def create_batches(count: int) -> list[Batch]:
    """Text whose next token is a function of the last one, in nine of ten cases."""
    rng = np.random.default_rng(0)
    successor = rng.permutation(VOCABULARY)
    batches: list[Batch] = []
    for _ in range(count):
        tokens = np.zeros((3, T + 1), np.int32)
        for i in range(T):
            drawn = rng.integers(0, VOCABULARY, 3)
            tokens[:, i + 1] = np.where(rng.random(3) < 0.1, drawn, successor[tokens[:, i]])
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        mask[:, 0] = False
        positions = torch.arange(3)
        batches.append(
            {
                "modality": "text",
                "positions": positions,
                "input_ids": torch.from_numpy(tokens),
                "target_mask": mask,
            }
        )
    return batches


needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao (extra fp8)")


def create_state(fp8: Any, model: TransformerParams = MODEL, *, fsdp: bool = False) -> TrainState:
    torch.manual_seed(0)
    module = create_model(model).train()
    options: dict[str, Any] = {"world": World(), "precision": "amp_bfloat16", "fp8": fp8}
    forward = parallelize(module, DistributedParams(fsdp=fsdp), **options)
    ema = create_root(fp8).ema
    return create_train_state(module, forward, hparams=create_root(fp8).hparams, ema=ema, total_steps=NUM_STEPS)


def create_root(fp8: Any) -> TrainExperimentParams:
    data = TextDataParams(dataset_manifest=["none"], seq_len=T)
    return TrainExperimentParams(model=MODEL, data=data, hparams=HyperParams(fp8=fp8, **HPARAMS))


def train(state: TrainState, batches: list[Batch], fp8: Any) -> Tensor:
    """Return the loss of each step."""
    root = create_root(fp8)
    options: dict[str, Any] = {"handler": create_batch_handler(root), "hparams": root.hparams, "world": World()}
    return torch.stack([train_step(state, [batch], **options).loss for batch in batches])


@needs_torchao
def test_a_model_learns_as_in_bf16() -> None:
    batches = create_batches(NUM_STEPS)
    states = {fp8: create_state(fp8) for fp8 in (None, "tensorwise")}
    bf16, fp8 = (train(state, batches, name) for name, state in states.items())
    assert not torch.equal(bf16, fp8)
    # the loss falls by more than 4; bf16's own distance to fp32 is about 0.005
    assert fp8[:5].mean() - fp8[-20:].mean() > 3
    for start in range(0, NUM_STEPS, 20):
        assert fp8[start : start + 20].mean() == pytest.approx(float(bf16[start : start + 20].mean()), abs=0.03)
    # masters and names are the same, so that checkpoints are
    weights, others = (state.model.state_dict() for state in states.values())
    assert [(name, w.dtype) for name, w in weights.items()] == [(name, w.dtype) for name, w in others.items()]


@needs_torchao
def test_gradients_point_where_those_of_bf16_do() -> None:
    gradients = []
    for fp8 in (None, "tensorwise"):
        state = create_state(fp8)
        inputs = create_batch_handler(create_root(fp8)).prepare(create_batches(1)[0], "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            state.model(**inputs).sum.backward()
        gradients.append({name: weight.grad for name, weight in state.parameters.items()})
    for name, exact in gradients[0].items():
        assert torch.cosine_similarity(exact.flatten(), gradients[1][name].flatten(), dim=0) > 0.95, name
    whole = [torch.cat([gradient.flatten() for gradient in of_all.values()]) for of_all in gradients]
    assert torch.cosine_similarity(*whole, dim=0) > 0.98


@needs_torchao
def test_sharded_blocks_learn_the_same() -> None:
    batches = create_batches(4)
    alone = train(create_state("tensorwise"), batches, "tensorwise")
    start_process_group(DistributedParams(fsdp=True), World())
    try:
        sharded = train(create_state("tensorwise", fsdp=True), batches, "tensorwise")
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(sharded, alone, rtol=1e-5, atol=0)


@needs_torchao
def test_heads_adapters_and_odd_widths_keep_their_precision() -> None:
    from torchao.float8.float8_linear import Float8Linear

    def converted(model: nn.Module) -> set[str]:
        return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}

    parts = ("attention.in_proj", "attention.out_proj", "feed_forward.w12", "feed_forward.w3")
    assert converted(create_state("tensorwise").model) == {f"layers.{i}.{part}" for i in (0, 1) for part in parts}
    adapters = LoRAParams(rank=16, targets=["*.attention.*_proj"])
    adapted = create_state("tensorwise", replace(MODEL, lora=adapters))
    assert converted(adapted.model) == {f"layers.{i}.{part}" for i in (0, 1) for part in parts[2:]}
    with pytest.raises(ValueError, match="no linear layer in the model's blocks has widths that are multiples of 16"):
        create_state("tensorwise", replace(MODEL, hidden_dim=36, ffn_type="gelu"))


def test_where_fp8_cannot_run_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fp8 is for precision amp_bfloat16 or pure_bf16, not fp32"):
        HyperParams(fp8="tensorwise", precision="fp32")
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"hparams.fp8 needs torchao .*pip install 'vla-foundry\[fp8\]'"):
        create_state("tensorwise")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"compute capability 8.9 or newer .* but NVIDIA A100 has 8.0"):
        parallelize(create_model(MODEL), DistributedParams(), world=World(device="cuda:0"), fp8="tensorwise")


def test_where_flash_attention_3_cannot_run_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="flash_attention_3 is for precision amp_bfloat16 or pure_bf16, not fp32"):
        HyperParams(flash_attention_3=True, precision="fp32")
    with pytest.raises(ValueError, match=r"compute capability 9 \(Hopper\), but the device is 'cpu'"):
        parallelize(create_model(MODEL), DistributedParams(), world=World(), flash_attention_3=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match="needs the package flash_attn_interface of FlashAttention 3: No module named"):
        use_flash_attention_3("cuda:0")
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(ValueError, match="needs a newer torch than"):
        use_flash_attention_3("cuda:0")
