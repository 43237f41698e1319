"""Training steps of each kind of model: compiled once, and never waiting for the device."""

import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InvalidCxxCompiler
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map

from vla_foundry.batch import Batch
from vla_foundry.models import attention, create_batch_handler, create_model, losses
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.training.distributed import naming_compile_faults, parallelize, start_process_group
from vla_foundry.training.loop import train_step
from vla_foundry.training.state import TrainState, create_train_state
from vla_foundry.world import World

NUM_WARM_UPS, NUM_STEPS = 3, 20


@pytest.fixture(scope="module")
def cases() -> Iterator[Any]:
    """The module gpu_cases.py of the benchmarks, whose toy models and batches are used here."""
    folder = str(Path(__file__).resolve().parents[3] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("gpu_cases")
    sys.path.remove(folder)


def create_varying(cases: Any, kind: str) -> tuple[Any, list[Batch]]:
    """The params of a toy model, and batches that differ in documents, rows and images."""
    if "llm" in kind:
        case = cases.create_llm_case(True, batch=2, has_documents=True)
        hparams = replace(case.params.hparams, fp8="tensorwise" if "fp8" in kind else None)
        return replace(case.params, hparams=hparams), case.batches
    if kind == "vla":
        case = cases.create_vla_case(True, batch=2, draws=2)
        hidden = [torch.ones(2, cases.NUM_VIEWS, dtype=torch.bool) for _ in range(3)]
        hidden[1][0, 2] = hidden[2][1, 3:] = False
        return case.params, [{**case.batches[0], "image_mask": mask} for mask in hidden]
    case = cases.create_vlm_case(True, packed="packed" in kind)
    model, hparams = case.params.model, case.params.hparams
    if "ahead" in kind:
        model = replace(model, image_attention="bidirectional")
    if "fp32" in kind:  # without variable-length attention
        hparams = replace(hparams, precision="fp32")
    return replace(case.params, model=model, hparams=hparams), case.batches


DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def create_state(params: Any, *, compiled: bool = False, fsdp: bool = False) -> TrainState:
    torch.manual_seed(0)
    model = create_model(params.model).train().to(DEVICE)
    hparams = params.hparams
    options: dict[str, Any] = {"world": World(device=DEVICE), "precision": hparams.precision, "fp8": hparams.fp8}
    options["activation_budget"] = hparams.activation_budget
    forward = parallelize(model, DistributedParams(fsdp=fsdp), compile_blocks=compiled, **options)
    return create_train_state(model, forward, hparams=params.hparams, ema=params.ema, total_steps=100)


def create_step(params: Any, batches: list[Batch], state: TrainState, handler: Any = None) -> Callable[[int], Tensor]:
    handler = handler or create_batch_handler(params)
    options = {"handler": handler, "hparams": params.hparams, "world": World(device=DEVICE)}
    return lambda number: train_step(state, [batches[number % len(batches)]], **options).loss


@pytest.fixture(scope="module")
def varlen_on_cpu() -> Iterator[None]:
    """torch's variable-length attention has no kernel for a CPU; with these, a CPU traces what a GPU runs."""

    def split(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor) -> Any:
        pairs = ((q, q_starts), (k, k_starts), (v, k_starts))
        return zip(*(x.float().split(starts.diff().tolist()) for x, starts in pairs), strict=True)

    ops = torch.ops.aten

    def forward(
        q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *options: Any, **named: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        is_causal = options[2]
        outputs = []
        for parts in split(q, k, v, q_starts, k_starts):
            rows = [part.transpose(0, 1)[None] for part in parts]
            output, _ = ops._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, is_causal)
            outputs.append(output[0].transpose(0, 1))
        rng = torch.zeros(2, dtype=torch.uint64)
        return torch.cat(outputs).to(q.dtype), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), rng

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        _: Tensor,
        q_starts: Tensor,
        k_starts: Tensor,
        *options: Any,
        **named: Any,
    ) -> tuple[Tensor, ...]:
        is_causal = options[2]
        found: list[list[Tensor]] = [[], [], []]
        grads = grad.float().split(q_starts.diff().tolist())
        parts = split(q, k, v, q_starts, k_starts)
        for grad_out, triple in zip(grads, parts, strict=True):
            rows = [part.transpose(0, 1)[None] for part in triple]
            output, lse = ops._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, is_causal)
            results = ops._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out.transpose(0, 1)[None], *rows, output, lse, 0.0, is_causal
            )
            for sums, result in zip(found, results, strict=True):
                sums.append(result[0].transpose(0, 1))
        return tuple(torch.cat(pieces).to(q.dtype) for pieces in found)

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)
    attention.VARLEN_DEVICES.add("cpu")
    yield
    attention.VARLEN_DEVICES.remove("cpu")


KINDS = ("llm", "vlm padded", "vlm packed ahead", "vlm packed ahead fp32", "vla")
NEEDS_TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao (extra fp8)")


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    """The checks of types in tests are code that a compiler would trace too."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("llm fp8", marks=NEEDS_TORCHAO)])
@pytest.mark.usefixtures("varlen_on_cpu", "no_type_checks")
# dynamo looks at .grad, and hides the warning only where warnings are not errors
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_blocks_are_whole_graphs_that_take_all_sizes(kind: str, cases: Any) -> None:
    from torch._dynamo.utils import counters

    params, batches = create_varying(cases, kind)
    plain = create_step(params, batches, create_state(params))
    torch.compiler.set_default_backend("eager")
    torch._dynamo.reset()
    counters.clear()
    compiled = create_step(params, batches, create_state(params, compiled=True))
    for number in range(NUM_WARM_UPS):
        torch.testing.assert_close(compiled(number), plain(number), rtol=1e-5, atol=0)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    for number in range(NUM_WARM_UPS, NUM_WARM_UPS + NUM_STEPS):
        compiled(number)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.usefixtures("varlen_on_cpu", "no_type_checks")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_budget_keeps_fewer_activations_and_changes_no_loss(cases: Any) -> None:
    params, batches = create_varying(cases, "llm")
    # the compiler's choice of what to keep, without its code
    torch.compiler.set_default_backend("aot_eager_decomp_partition")
    kept, losses_of = [], []
    for budget in (1.0, 0.7):
        torch._dynamo.reset()
        params = replace(params, hparams=replace(params.hparams, activation_budget=budget))
        state, storages = create_state(params, compiled=True), {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        step = create_step(params, batches, state)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses_of.append(step(0))
        kept.append(sum(storages.values()))
        losses_of[-1] = torch.stack([losses_of[-1], *(step(number) for number in range(1, 5))])
    torch.compiler.set_default_backend("eager")
    torch.testing.assert_close(*losses_of, rtol=1e-5, atol=0)
    assert kept[1] < 0.9 * kept[0]


def test_blocks_add_up_bf16_and_learn_as_in_fp32_with_each_wrapper(cases: Any) -> None:
    params, batches = create_varying(cases, "llm")
    exact = replace(params, hparams=replace(params.hparams, precision="fp32"))
    states = [create_state(exact), create_state(params)]
    start_process_group(DistributedParams(fsdp=True), World(device=DEVICE))
    try:
        states.append(create_state(params, fsdp=True))
        dtypes = []
        for state in states[1:]:
            last: Any = state.model
            last.layers[-1].register_forward_hook(lambda block, args, output: dtypes.append(output.dtype))
        all_params = (exact, params, params)
        steps = [create_step(p, batches, state) for p, state in zip(all_params, states, strict=True)]
        for number in range(8):
            wanted, alone, sharded = (step(number).cpu() for step in steps)
            torch.testing.assert_close(alone, wanted, rtol=5e-3, atol=0)
            torch.testing.assert_close(sharded, alone, rtol=1e-5, atol=0)
    finally:
        torch.distributed.destroy_process_group()
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for state in states for p in state.parameters.values()} == {torch.float32}


class Unreadable:
    """A batch handler whose tensors have no values, which is what the host knows of a device's tensors."""

    def __init__(self, handler: Any, mode: FakeTensorMode) -> None:
        self.handler, self.mode = handler, mode
        self.count_targets = handler.count_targets

    def prepare(self, batch: Batch, device: str) -> dict[str, Any]:
        with unset_fake_temporarily():
            inputs = self.handler.prepare(batch, device)
        return tree_map(lambda x: self.mode.from_tensor(x) if isinstance(x, Tensor) else x, inputs)


def refuse(self: Tensor, *args: Any, **options: Any) -> Any:
    raise AssertionError("a tensor is copied to the host inside a step")


@pytest.mark.parametrize("kind", ["llm", "vlm packed ahead", "vla"])
def test_a_step_never_waits_for_the_device(kind: str, cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, batches = create_varying(cases, kind)
    if DEVICE != "cpu":
        step = create_step(params, batches, create_state(params))
        for number in range(NUM_WARM_UPS):
            step(number)
        torch.cuda.set_sync_debug_mode("error")
        for number in range(NUM_STEPS):
            step(number)
        torch.cuda.set_sync_debug_mode("default")
        return
    # a CPU takes the branches of a GPU, with tensors that cannot be read
    monkeypatch.setattr(attention, "VARLEN_DEVICES", {"cpu"})
    monkeypatch.setattr(losses, "NEVER_WAITING", set())
    for name in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(FakeTensor, name, refuse, raising=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = create_model(params.model).train()
    with mode, torch.random.fork_rng():
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        model._apply(mode.from_tensor)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        with monkeypatch.context() as patch:
            patch.setattr(FakeTensor, "__bool__", lambda self: True, raising=False)  # AdamW checks its rate
            state = create_train_state(model, model, hparams=params.hparams, ema=params.ema, total_steps=100)
        step = create_step(params, batches, state, Unreadable(create_batch_handler(params), mode))
        step(0)
        loss = step(1)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            loss.item()


@pytest.mark.parametrize(
    ("cause", "expected", "message"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            ValueError,
            "No space left on device .TORCHINDUCTOR_CACHE",
        ),
        (InvalidCxxCompiler("g++"), ValueError, "torch.compile: Compiler: g.. is not found. Mend it, or set hparams."),
        (KeyError("a fault of the compiler"), BackendCompilerFailed, "a fault of the compiler"),
    ],
)
def test_what_a_machine_lacks_to_compile_is_told_apart_from_faults_of_the_compiler(
    cause: Exception, expected: type[Exception], message: str
) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise cause

    torch._dynamo.reset()
    with pytest.raises(expected, match=message), naming_compile_faults():
        torch.compile(lambda x: x + 1, backend=refuse)(torch.ones(1))
