"""Make the tutorials' notebooks: `python .ci/tutorials.py [NAME ...]` runs their sources and keeps the outputs."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "tutorials"
_SECONDS_PER_CELL = 600


def read_source(name: str) -> nbformat.NotebookNode:
    """Return the notebook of a source, without outputs."""
    notebook = jupytext.read(FOLDER / "sources" / f"{name}.py")
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    return notebook


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run all cells in a new process; an error in one is raised."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=_SECONDS_PER_CELL, resources=resources, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            output.pop("metadata", None)
    return notebook


def main() -> None:
    """Write notebooks with their outputs."""
    names = sorted(path.stem for path in (FOLDER / "sources").glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=names)
    for name in parser.parse_args().names:
        notebook = run(read_source(name))
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {len(notebook.cells)} cells")  # noqa: T201


if __name__ == "__main__":
    main()
