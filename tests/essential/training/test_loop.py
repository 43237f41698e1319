"""One step and the loop around it, on one process."""

import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vla_foundry.run_folder import find_checkpoint
from vla_foundry.training.checkpoint import load_checkpoint
from vla_foundry.training.loop import create_meter, seed_dropout, train, train_step
from vla_foundry.training.optimization.schedules import learning_rates
from vla_foundry.world import World


def train_tiny(tiny, folder: Path, *, model=None, spoiled=(), **changes: Any) -> dict[str, Any]:
    run = tiny.create_run(tiny.create_params(folder, **changes), World(), model=model, spoiled=spoiled)
    train(run)
    return tiny.read_result(run)


def losses_of(result: dict[str, Any], kind: str = "train") -> list[float]:
    return [line["loss"] for line in result["lines"] if line["kind"] == kind]


def test_the_loop_equals_a_plain_loop_over_whole_batches(tiny, tmp_path: Path) -> None:
    """A reference without accumulation, written out with torch's own AdamW, clipping and averaging."""
    params = tiny.create_params(tmp_path)
    hparams = params.hparams
    result = train_tiny(tiny, tmp_path)
    torch.manual_seed(hparams.seed)
    model = tiny.TinyModel().double()
    loader = tiny.TinyLoader(World(), 16, 16)
    decayed = [layer.linear.weight for layer in model.layers]
    others = [p for p in model.parameters() if not any(p is other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": hparams.wd}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(hparams.beta1, hparams.beta2), eps=hparams.eps)
    averages = {name: value.detach().clone() for name, value in model.named_parameters()}
    expected = []
    for step, rate in enumerate(learning_rates(hparams, 20)):
        batch = loader.read(np.arange(step * 16, step * 16 + 16))
        output = model(
            batch["input_ids"].long()[:, :-1],
            batch["input_ids"].long()[:, 1:].masked_fill(~batch["target_mask"][:, 1:], -100),
        )
        loss = output.sum / output.count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), hparams.grad_clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.step()
        for name, value in model.named_parameters():
            averages[name] = value.detach().clone() if step == 0 else averages[name].lerp(value.detach(), 0.2)
        expected.append(loss.item())
    assert losses_of(result) == pytest.approx(expected, rel=1e-12)
    for name, value in model.named_parameters():
        torch.testing.assert_close(result["weights"][name], value.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(result["averages"][name], averages[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_numbers_do_not_depend_on_the_accumulation(tiny, tmp_path: Path, size: int) -> None:
    one = train_tiny(tiny, tmp_path / "1", hparams__per_gpu_batch_size=size)
    other = train_tiny(tiny, tmp_path / "2", hparams__per_gpu_batch_size=8)
    assert losses_of(one) == pytest.approx(losses_of(other), rel=1e-12)
    assert losses_of(one, "validation") == pytest.approx(losses_of(other, "validation"), rel=1e-12)


def test_a_step_with_a_loss_that_is_not_finite_leaves_no_trace(tiny, tmp_path: Path) -> None:
    """Skipping steps 3 and 4 must equal a run whose data lacks them."""
    spoiled = train_tiny(tiny, tmp_path / "1", spoiled=[2 * 16 + 5, 3 * 16], total_train_samples=16 * 16)
    assert [line["loss"] is None for line in spoiled["lines"][:5]] == [False, False, True, True, False]
    assert spoiled["counters"] | {"targets": 0} == {
        "updates": 14,
        "skipped": 2,
        "skipped_in_row": 0,
        "longest_row": 0,
        "targets": 0,
    }
    run = tiny.create_run(tiny.create_params(tmp_path / "2", total_train_samples=16 * 16), World())
    source = run.loader.microbatches(0)
    for step in range(16):
        batches = [next(source) for _ in range(8)]
        if step not in (2, 3):
            train_step(run.state, batches, handler=run.handler, hparams=run.params.hparams, world=World())
    for name, value in run.state.parameters.items():
        assert torch.equal(spoiled["weights"][name], value)
        assert torch.equal(spoiled["averages"][name], run.state.ema.averages[name])
        for moment, tensor in run.state.optimizer.state[value].items():
            assert torch.equal(spoiled["moments"][f"{name} {moment}"], tensor)
    assert float(run.state.lr) == next(line["lr"] for line in reversed(spoiled["lines"]) if line["kind"] == "train")


def test_too_many_skips_in_a_row_stop_the_run(tiny, tmp_path: Path) -> None:
    spoiled = [16 * step for step in (1, 2, 4, 5, 6)]
    message = r"3 steps in a row .*hparams.max_skipped_steps is 3.*Lower hparams.lr"
    with pytest.raises(ValueError, match=message):
        train_tiny(tiny, tmp_path / "1", spoiled=spoiled, hparams__max_skipped_steps=3)
    # the rows of 2 and 3 are seen even if the host looks only once
    with pytest.raises(ValueError, match=message):
        train_tiny(tiny, tmp_path / "2", spoiled=spoiled, hparams__max_skipped_steps=3, log_every_n_steps=100)
    train_tiny(tiny, tmp_path / "3", spoiled=spoiled, hparams__max_skipped_steps=4)


def test_a_global_batch_without_targets_changes_nothing_and_is_no_fault(tiny, tmp_path: Path) -> None:
    run = tiny.create_run(tiny.create_params(tmp_path, hparams__wd=0.0), World())
    batch = run.loader.read(np.arange(16))
    before = {name: value.detach().clone() for name, value in run.state.parameters.items()}
    empty = {**batch, "target_mask": torch.zeros_like(batch["target_mask"])}
    result = train_step(run.state, [empty], handler=run.handler, hparams=run.params.hparams, world=World())
    assert float(result.loss) == 0.0
    assert float(result.updated) == 1.0
    assert all(torch.equal(value, before[name]) for name, value in run.state.parameters.items())


@pytest.mark.parametrize("key", ["modality", "dataset"])
def test_modalities_and_datasets_weigh_by_their_share_of_samples(tiny, tmp_path: Path, key: str) -> None:
    run = tiny.create_run(tiny.create_params(tmp_path), World())
    batches = [run.loader.read(np.arange(start, start + 4)) for start in (0, 4, 8, 12)]
    for index, batch in enumerate(batches):
        batch[key] = "other" if index == 2 else "text"
    sums, counts = {}, {}
    with torch.no_grad():
        for batch in batches:
            output = run.state.model(**run.handler.prepare(batch, "cpu"))
            name = batch[key]
            sums[name] = sums.get(name, 0.0) + float(output.sum)
            counts[name] = counts.get(name, 0) + int(output.count)
    expected = 0.75 * sums["text"] / counts["text"] + 0.25 * sums["other"] / counts["other"]
    result = train_step(run.state, batches, handler=run.handler, hparams=run.params.hparams, world=World())
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)
    if key == "dataset":
        meter = create_meter(run)
        meter.add_data(batches, 0.0)
        meter.add_step(result)
        logged = meter.read(run.state)
        for name in ("text", "other"):
            assert logged[f"loss_{name}"] == pytest.approx(sums[name] / counts[name], rel=1e-12)


def test_frozen_weights_stay_and_take_no_memory(tiny, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny.TinyModel()
    model.layers[0].requires_grad_(False)
    model.head.requires_grad_(False)  # tied to the embedding
    before = {name: value.detach().clone().double() for name, value in model.named_parameters()}
    result = tiny.create_run(tiny.create_params(tmp_path), World(), model=model)
    train(result)
    frozen = {
        "embeddings.weight",
        "layers.0.norm.weight",
        "layers.0.norm.bias",
        "layers.0.linear.weight",
        "layers.0.linear.bias",
    }
    for name, value in result.state.parameters.items():
        assert torch.equal(value, before[name]) is (name in frozen)
        assert (name in result.state.ema.averages) is (name not in frozen)
        assert (value in result.state.optimizer.state) is (name not in frozen)
    model.requires_grad_(False)
    params = tiny.create_params(tmp_path / "none")
    with pytest.raises(ValueError, match="No weight of the model is trainable"):
        tiny.create_run(params, World(), model=model)


def test_a_part_frozen_on_resume_keeps_its_weights_and_its_average(tiny, tmp_path: Path) -> None:
    first = tiny.create_run(tiny.create_params(tmp_path / "first", num_checkpoints=1), World())
    train(first)
    name = "layers.0.linear.weight"
    weight, average = first.state.parameters[name].detach(), first.state.ema.averages[name]
    assert not torch.equal(weight, average)

    frozen = tiny.TinyModel()
    frozen.layers[0].requires_grad_(False)
    params = tiny.create_params(
        tmp_path / "second", num_checkpoints=1, total_train_samples=2 * first.params.total_train_samples
    )
    second = tiny.create_run(params, World(), model=frozen)
    load_checkpoint(find_checkpoint(first.folder), second.state)
    train(second)

    third = tiny.create_run(tiny.create_params(tmp_path / "third"), World())  # trainable again
    load_checkpoint(find_checkpoint(second.folder), third.state)
    for run in (second, third):
        assert torch.equal(run.state.parameters[name], weight)
        assert torch.equal(run.state.ema.averages[name], average)
        assert not torch.equal(
            run.state.parameters["layers.1.linear.weight"], first.state.parameters["layers.1.linear.weight"]
        )


@pytest.mark.parametrize(("precision", "stored"), [("amp_bfloat16", torch.float32), ("pure_bf16", torch.bfloat16)])
def test_lower_precision_trains_with_the_parameters_it_says(tiny, tmp_path: Path, precision: str, stored) -> None:
    result = train_tiny(tiny, tmp_path, hparams__precision=precision)
    assert {value.dtype for value in result["weights"].values()} == {stored}
    assert {value.dtype for value in result["averages"].values()} == {torch.float32}
    assert losses_of(result)[-1] < losses_of(result)[0] - 1
    full = train_tiny(tiny, tmp_path / "full")
    assert losses_of(result)[0] == pytest.approx(losses_of(full)[0], rel=0.02)


def test_validation_is_of_the_average_and_does_not_disturb_training(tiny, tmp_path: Path) -> None:
    run = tiny.create_run(tiny.create_params(tmp_path / "1", num_checkpoints=1), World())
    train(run)
    result = tiny.read_result(run)
    batches = list(run.validation_loader.microbatches(0))
    with run.state.ema.swapped_in(), torch.no_grad():
        outputs = [run.state.model(**run.handler.prepare(batch, "cpu")) for batch in batches]
    expected = float(sum(o.sum for o in outputs) / sum(o.count for o in outputs))
    assert losses_of(result, "validation") == [pytest.approx(expected, rel=1e-12)]
    often = train_tiny(tiny, tmp_path / "2", num_checkpoints=10)
    assert len(losses_of(often, "validation")) == 10
    assert losses_of(often) == losses_of(result)
    rarely = train_tiny(tiny, tmp_path / "3", num_checkpoints=5, val_every_n_checkpoints=2)
    assert [line["step"] for line in rarely["lines"] if line["kind"] == "validation"] == [8, 16, 20]


def test_a_validation_that_a_signal_cut_off_is_made_up_for(tiny, tmp_path: Path) -> None:
    straight = train_tiny(tiny, tmp_path / "1")
    run = tiny.create_run(tiny.create_params(tmp_path / "2"), World())
    run.handler.stop_at = 9 * 16  # in the step that ends with a checkpoint
    assert train(run) == signal.SIGTERM
    run.log.close()
    checkpoint = find_checkpoint(run.folder)
    goes_on = tiny.create_run(run.params, World())
    goes_on.is_validation_owed = load_checkpoint(checkpoint, goes_on.state)["is_validation_owed"]
    assert train(goes_on) == 0
    lines = run.log._sinks[0].lines + goes_on.log._sinks[0].lines
    assert [line["loss"] for line in lines] == [line["loss"] for line in straight["lines"]]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [10, 20]


def test_dropout_is_seeded_by_step_and_rank() -> None:
    def draw(*key: int) -> float:
        seed_dropout(*key)
        return float(F.dropout(torch.ones(1000), 0.5).sum())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)}) == 4


def test_metrics_are_means_over_the_interval(tiny, tmp_path: Path) -> None:
    every = train_tiny(tiny, tmp_path / "1")
    fifth = train_tiny(tiny, tmp_path / "2", log_every_n_steps=5)
    assert [line["step"] for line in fifth["lines"] if line["kind"] == "train"] == [1, 5, 10, 15, 20]
    assert losses_of(fifth)[3] == pytest.approx(math.fsum(losses_of(every)[10:15]) / 5)
    last = fifth["lines"][-2]
    assert last["dropped_samples"] == 1
    assert last["dropped_reasons"] == {"short": 1}
    assert 0 < last["accuracy"] < 1
    assert last["targets"] == every["counters"]["targets"]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="compiling needs a C++ compiler")
# dynamo looks at .grad, and hides the warning only where warnings are not errors
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_blocks_train_alike(tiny, tmp_path: Path) -> None:
    plain = train_tiny(tiny, tmp_path / "1", hparams__precision="fp32")
    compiled = train_tiny(
        tiny, tmp_path / "2", hparams__precision="fp32", hparams__torchcompile=True, hparams__grad_checkpointing=True
    )
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-5)
    assert compiled["weights"].keys() == plain["weights"].keys()


def test_a_run_without_an_average_validates_its_weights(tiny, tmp_path: Path) -> None:
    params = tiny.create_params(tmp_path)
    run = tiny.create_run(replace(params, ema=replace(params.ema, enabled=False)), World())
    train(run)
    assert run.log._sinks[0].lines[-1]["weights"] == "model"
    assert not list(run.folder.rglob("ema.safetensors"))
