"""Recordings of what code does to weights, played back by parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vla_foundry.tensors import as_parts, open_tensors, write_tensors
from vla_foundry.training.deferred import NO_VALUES, Recording


class Odd(nn.Module):
    """Weights that are drawn in every way, overwritten, grown, computed and loaded from files."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        with torch.device("meta"):
            # draws nothing
            self.linear = nn.Linear(8, 6)
        self.linear.to_empty(device="cpu")
        nn.init.trunc_normal_(self.linear.weight, std=0.5, a=-0.1, b=0.1)
        nn.init.zeros_(self.linear.bias)
        self.table = nn.Embedding(7, 4, padding_idx=2)
        self.grown = nn.Embedding(9, 4, device=self.table.weight.device)
        self.grown.weight.data[:7] = self.table.weight.data
        self.position = nn.Parameter(torch.zeros(1, 5, 4))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.tied = self.table.weight
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.drawn = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(4, 3)) * 2 + torch.ones(3).cumsum(0))
        self.register_buffer("frequencies", 1 / 10 ** (torch.arange(0, 8, 2).float() / 8), persistent=False)
        self.stored = nn.Parameter(torch.randn(600, 20))
        self.cast = nn.Parameter(torch.empty(600, 20, dtype=torch.bfloat16))
        with open_tensors(files) as (entries, _), torch.no_grad():
            self.stored.copy_(entries["a"].read())
            self.cast.copy_(entries["a"].read().bfloat16().double())
        # newer versions of torch leave tensors on the meta device as they are
        self.orthogonal, self.sparse = nn.Linear(5, 3), nn.Linear(5, 4)
        nn.init.orthogonal_(self.orthogonal.weight)
        nn.init.sparse_(self.sparse.weight, sparsity=0.3)
        self.dirac = nn.Conv1d(4, 3, 3)
        nn.init.dirac_(self.dirac.weight)
        self.last = nn.Parameter(torch.rand(3))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files that hold 600 rows of a tensor."""
    whole = torch.randn(600, 20, generator=torch.Generator().manual_seed(1))
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    write_tensors(paths[0], as_parts({"a": whole[:200]}), marks_parts=True)
    second = {name: part._replace(first_row=200) for name, part in as_parts({"a": whole[200:]}).items()}
    write_tensors(paths[1], second, marks_parts=True)
    return paths


def list_all(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("rows", [slice(None), slice(0, 2), slice(1, 3)], ids=str)
def test_parts_are_those_of_a_model_made_at_once(rows: slice, files: list[Path]) -> None:
    torch.manual_seed(3)
    whole = list_all(Odd(files))
    drawn_next = torch.rand(1)
    torch.manual_seed(3)
    recording = Recording()
    with recording:
        model = Odd(files)
    tensors = list_all(model)
    assert all(tensor.is_meta for name, tensor in tensors.items() if name not in ("scale", "frequencies"))
    assert recording.find_unset(tensors) == []
    parts = {name: rows if tensor.ndim else slice(None) for name, tensor in tensors.items()}
    for _ in range(2):  # as often as one likes
        found = dict(recording.play(tensors, parts))
        assert found.keys() == whole.keys()
        assert torch.equal(torch.rand(1), drawn_next)
        for name, value in whole.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value[rows] if value.ndim else value), name
    some = dict(recording.play({"bias": tensors["linear.bias"]}, draws=False))
    assert torch.equal(some["bias"], torch.zeros(6))


def give_no_value() -> None:
    torch.empty(4, 3) * 2


def write_through_numpy() -> None:
    nn.Linear(4, 3).weight.detach().numpy()[:] = 0.5


def set_seed() -> None:
    torch.manual_seed(1)
    torch.randn(3)


def draw_apart() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.randn(3)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        pytest.param(lambda: bool(torch.randn(3).sum() > 0), "meta|Meta", id="branch"),
        pytest.param(lambda: torch.tensor([1.0, 2.0]).normal_(), "normal_.* changes what is not recorded", id="small"),
        pytest.param(give_no_value, "mul.* reads a tensor that has no values", id="empty"),
        pytest.param(write_through_numpy, "can't convert meta device type tensor to numpy", id="numpy"),
        pytest.param(set_seed, r"torch\.manual_seed is called", id="seed"),
        pytest.param(draw_apart, r"torch\.set_rng_state is called", id="fork"),
        # torch catches an error here
        pytest.param(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 4)), "geqrf", id="caught"),
    ],
)
def test_code_that_looks_at_values_is_found_out(act: Callable[[], Any], message: str) -> None:
    before = dict(vars(nn.init)), torch.manual_seed, torch.set_rng_state
    with pytest.raises(NO_VALUES, match=message), Recording():
        act()
    assert (dict(vars(nn.init)), torch.manual_seed, torch.set_rng_state) == before


def test_a_tensor_that_nothing_is_written_to_is_found() -> None:
    recording = Recording()
    with recording:
        empty = torch.empty(3)
    assert recording.find_unset({"empty": empty, "real": torch.ones(1)}) == ["empty"]
