"""The tutorials run from top to bottom, and the notebooks are those of their sources."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "tutorials" / "sources").glob("*.py"))


@pytest.fixture(scope="module")
def tutorials() -> ModuleType:
    """The script that makes the notebooks."""
    spec = importlib.util.spec_from_file_location("tutorials", ROOT / ".ci" / "tutorials.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_that_of_its_source(name: str, tutorials: ModuleType) -> None:
    notebook: Any = nbformat.read(ROOT / "tutorials" / f"{name}.ipynb", as_version=4)  # pyright: ignore
    assert cells(notebook) == cells(tutorials.read_source(name)), f"run: python .ci/tutorials.py {name}"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs
    assert not any(output.output_type == "error" for output in outputs)


def test_every_notebook_is_in_the_table() -> None:
    table = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.ipynb)" in table for name in NAMES)
    assert {"training_llm_vlm_vla", "lerobot"} <= {*NAMES}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_runs(name: str, tutorials: ModuleType) -> None:
    tutorials.run(tutorials.read_source(name))
