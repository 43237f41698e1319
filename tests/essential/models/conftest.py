"""Small models, and a record of the tensors that operations make."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vla_foundry.batch import Documents
from vla_foundry.models import create_model
from vla_foundry.models.transformer import Transformer
from vla_foundry.params.models.transformer import TransformerParams


class RecordShapes(TorchDispatchMode):
    """The shape of every tensor that is made inside this context, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """These models are too small for several threads, which on a busy machine mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def record_shapes() -> type[RecordShapes]:
    return RecordShapes


@pytest.fixture
def create_tiny() -> Iterator[Callable[..., Transformer]]:
    """A function that makes a float64 transformer of two blocks; its keyword arguments change the params."""

    def create(**changes: Any) -> Transformer:
        values = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 61, "max_seq_len": 64, **changes}
        torch.manual_seed(0)
        model = create_model(TransformerParams(**values)).double()
        assert isinstance(model, Transformer)
        with torch.no_grad():
            for parameter in model.parameters():
                # gains and biases at their initial 1 and 0 would hide errors
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        return model

    return create


@pytest.fixture
def create_documents() -> Callable[..., Documents]:
    """A function of the document lengths of each row; a negative length is padding."""

    def create(*rows: list[int]) -> Documents:
        lengths = np.array([length for row in rows for length in row], dtype=np.int32)
        return Documents(
            lengths=np.abs(lengths),
            num_per_row=np.array([len(row) for row in rows], dtype=np.int32),
            is_padding=lengths < 0,
        )

    return create


@pytest.fixture
def check_two_ranks() -> Callable[[Path, Path, Mapping[str, list[float]]], None]:
    """A function that checks that a script's models train and resume on two ranks as in one process."""

    def check(script: Path, folder: Path, alone: Mapping[str, list[float]]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, folder],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for rank in range(2):
            together = json.loads((folder / f"losses.{rank}.json").read_text(encoding="utf-8"))
            for name, losses in alone.items():
                assert together[name] == pytest.approx(losses, rel=1e-5), name
                assert together[name][-1] == 0
        for losses in alone.values():
            assert losses[3] == losses[2]
            assert losses[4:6] == losses[:2]
            assert losses[0] != losses[1] != losses[2]

    return check


@pytest.fixture(scope="session")
def policies() -> ModuleType:
    """The module policy_run.py, which torchrun runs too."""
    return importlib.import_module("tests.essential.models.policy_run")


@pytest.fixture(scope="session")
def image_text() -> ModuleType:
    """The module image_text_run.py, which torchrun runs too."""
    return importlib.import_module("tests.essential.models.image_text_run")
