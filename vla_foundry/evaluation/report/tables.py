"""The tables of a report, each written as HTML, Markdown and CSV. All text in them comes from data and is escaped."""

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

# what a terminal, a browser or an editor may take for more than text: control, direction and unpaired characters
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~#$!])")


def clean(text: str) -> str:
    """Replace characters that are not text to read."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(text: str) -> str:
    """Escape text for HTML and SVG, in elements and quoted attributes."""
    return html.escape(clean(text))


def escape_markdown(text: str) -> str:
    """Escape text for a Markdown table; `<` and `&` as in HTML."""
    return _MARKDOWN.sub(r"\\\1", html.escape(clean(text), quote=False))


def percent(rate: float) -> str:
    """Format a rate with one decimal, without the sign."""
    return f"{100 * rate:.1f}"


_FORMATS = {
    "text": str,
    "count": lambda value: f"{value:,}",
    "rate": percent,
    "difference": lambda value: f"{100 * value:+.1f}",
    "p_value": lambda value: f"{value:.2g}",
    "seconds": lambda value: f"{value:,.0f}",
}


def columns_of(*groups: tuple[str, ...]) -> dict[str, str]:
    """Return the columns of a table: each group is a kind, then names."""
    return {name: kind for kind, *names in groups for name in names}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of values; None: unknown."""

    # of its CSV file
    name: str
    caption: str
    # name of a column -> text, count, rate (shown in percent), difference (of rates), p_value or seconds
    columns: dict[str, str]
    rows: Sequence[tuple[Any, ...]]

    def only(self, key: str, caption: str) -> "Table":
        """Return the rows whose first value is `key`, without it."""
        columns = dict(list(self.columns.items())[1:])
        return replace(self, caption=caption, columns=columns, rows=[row[1:] for row in self.rows if row[0] == key])

    def to_html(self) -> str:
        """Format as an HTML table that a phone scrolls by itself; end tags that HTML leaves out are left out."""
        head = "".join(f"<th scope=col>{escape(name)}" for name in self._titles())
        lines = []
        for (_, first), *cells in self._formatted():
            rest = (f"<td{'' if kind == 'text' else ' class=n'}>{escape(cell)}" for kind, cell in cells)
            lines.append(f"<tr><th scope=row>{escape(first)}{''.join(rest)}")
        return (
            f'<div class=scroll tabindex=0 role=region aria-label="{escape(self.caption)}">'
            f"<table><caption>{escape(self.caption)}</caption><thead><tr>{head}<tbody>{''.join(lines)}</table></div>"
        )

    def to_markdown(self) -> str:
        """Format as a Markdown table."""
        marks = ["---" if kind == "text" else "---:" for kind in self.columns.values()]
        lines = [[escape_markdown(cell) for _, cell in cells] for cells in self._formatted()]
        head = [escape_markdown(name) for name in self._titles()]
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, marks, *lines]) + "\n"

    def to_csv(self) -> str:
        """Format as CSV: rates as fractions, and an apostrophe before text that a spreadsheet takes for a formula."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow([_to_csv(value) for value in row])
        return file.getvalue()

    def _titles(self) -> list[str]:
        units = {"rate": ", %", "difference": ", points"}
        return [name + units.get(kind, "") for name, kind in self.columns.items()]

    def _formatted(self) -> list[list[tuple[str, str]]]:
        kinds = list(self.columns.values())
        return [
            [(kind, "" if value is None else _FORMATS[kind](value)) for kind, value in zip(kinds, row, strict=True)]
            for row in self.rows
        ]


def _to_csv(value: Any) -> Any:
    if isinstance(value, str):
        return "'" + clean(value) if value[:1] in ("=", "+", "-", "@") else clean(value)
    return f"{value:.6g}" if isinstance(value, float) else value
