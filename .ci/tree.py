"""Write the list of files in docs/architecture.md from the first line of each module's docstring, or check it.

Usage: python .ci/tree.py [--check]
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: begin (written by .ci/tree.py) -->", "<!-- tree: end -->"


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
    return "\n".join([*lines, "```"])


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    if not docstring:
        raise SystemExit(f"{path} has no docstring.")
    return docstring.split("\n")[0].rstrip(".:")


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    expected = f"{before}{BEGIN}\n{create_tree()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if expected != text:
            raise SystemExit("The list of files in docs/architecture.md is out of date. Run: python .ci/tree.py")
        return
    PAGE.write_text(expected, encoding="utf-8")


if __name__ == "__main__":
    main()
