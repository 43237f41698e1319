"""Collect English text without a download: docstrings of the standard library and installed packages."""

import ast
import hashlib
import importlib.util
import inspect
import json
import sysconfig
import warnings
from pathlib import Path

# shorter docstrings carry little information and repeat
MIN_CHARACTERS = 80
# one in this many source files is held out
HELD_OUT_EVERY = 20
# folders below a package: other packages, and tests, which take most of the time and hold little text
_LEFT_OUT = {"site-packages", "test", "tests"}
_HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def harvest_docstrings(output_dir: Path, *, packages: tuple[str, ...]) -> dict[str, int]:
    """Write each distinct long docstring as a {"text": ...} line; all docstrings of a source file share a split.

    Args:
        output_dir: receives train/docstrings.jsonl and validation/docstrings.jsonl.
        packages: installed packages to read besides the standard library; they are read, not imported.

    Returns:
        Documents and characters per split: {"train_documents": ..., "train_characters": ..., ...}.

    Raises:
        ValueError: a package is not installed.
    """
    # in this process: parsing takes seconds, and processes of a killed pool would stay
    sources = [(root.name, path) for root in _source_roots(packages) for path in _source_files(root)]
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for root_name, path in sources:
        split = "validation" if _is_held_out(f"{root_name}/{path.name}") else "train"
        for text in read_docstrings(path):
            if text not in seen:
                seen.add(text)
                splits[split].append(text)
    counts = {}
    for split, texts in splits.items():
        target = output_dir / split / "docstrings.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        partial.replace(target)
        counts[f"{split}_documents"] = len(texts)
        counts[f"{split}_characters"] = sum(len(text) for text in texts)
    return counts


def read_docstrings(path: Path) -> list[str]:
    """Return the long docstrings of a source file in breadth-first order; none if it is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in third-party code
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, _HAS_DOCSTRING) and node.body)
    firsts = (body[0].value for body in bodies if isinstance(body[0], ast.Expr))
    texts = (node.value for node in firsts if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [text for text in map(inspect.cleandoc, texts) if len(text) >= MIN_CHARACTERS]


def _source_roots(packages: tuple[str, ...]) -> list[Path]:
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"The package '{name}' is not installed. Run: uv sync")
        roots.append(Path(next(iter(spec.submodule_search_locations))))
    return roots


def _source_files(root: Path) -> list[Path]:
    files = (path for path in root.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_EVERY == 0
