"""Write the tree of the README from the first line of each module's docstring, or check that it is up to date.

Usage: python .ci/tree.py [--check]
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- tree: begin (written by .ci/tree.py) -->", "<!-- tree: end -->"
FOLDERS = {
    "config_presets/": "presets, in the wheel too: models/ hparams/ training_jobs/ data/ field_maps/ action_fields/",
    "benchmarks/": "scripts that measure both sides of a claim and print JSON",
    "tests/essential/": "mirrors the package; CPU, no network",
    "tests/dependencies/": "one folder per optional dependency group",
    ".ci/": "the script that CI runs, and the one that writes this tree",
}


def create_tree() -> str:
    """Return the tree, one line a file."""
    lines = ["```", "vla_foundry/"]
    package = ROOT / "vla_foundry"
    for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent.as_posix() + "/", path.name)):
        inside = path.relative_to(package)
        if path.name == "__init__.py":
            if path.parent != package:
                lines.append(f"{'  ' * len(inside.parts[:-1])}{path.parent.name}/")
            continue
        indent = "  " * len(inside.parts)
        name = f"{indent}{path.name}"
        lines.append(f"{name:<34}{first_line(path)}")
    lines += [f"{name:<34}{what}" for name, what in FOLDERS.items() if (ROOT / name).exists()]
    return "\n".join([*lines, "```"])


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    if not docstring:
        raise SystemExit(f"{path} has no docstring.")
    return docstring.split("\n")[0].rstrip(".:")


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    expected = f"{before}{BEGIN}\n{create_tree()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if expected != text:
            raise SystemExit("The tree in README.md is out of date. Run: python .ci/tree.py")
        return
    README.write_text(expected, encoding="utf-8")


if __name__ == "__main__":
    main()
