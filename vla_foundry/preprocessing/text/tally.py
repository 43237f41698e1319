"""Count what became of every row of the source: documents, and skipped rows by reason."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from vla_foundry.preprocessing.text.sources import Skipped

# rows that are named for each reason
_MAX_EXAMPLES = 3
# an empty row is no fault; any other skipped row is
_HARMLESS = "empty"
# before this many rows are read, a run is not stopped for its share of bad ones
_MIN_ROWS = 1000


class Tally:
    """Counts that can be sent as JSON and added up."""

    def __init__(self) -> None:
        self.num_documents = 0
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        # about how many bytes of text are in files that can not be read
        self.num_lost_bytes = 0

    def skip(self, row: Skipped) -> None:
        """Count a row that yields no document."""
        self.skipped[row.reason] += 1
        self.num_lost_bytes += row.num_bytes
        examples = self.examples.setdefault(row.reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(row.where)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "documents": self.num_documents,
            "skipped": dict(sorted(self.skipped.items())),
            "examples": dict(sorted(self.examples.items())),
            "lost_bytes": self.num_lost_bytes,
        }

    def add_json(self, values: dict[str, Any]) -> None:
        """Add the counts that another tally gave as JSON values."""
        self.num_documents += values["documents"]
        self.skipped.update(values["skipped"])
        self.num_lost_bytes += values["lost_bytes"]
        for reason, examples in values["examples"].items():
            mine = self.examples.setdefault(reason, [])
            mine += examples[: _MAX_EXAMPLES - len(mine)]

    def check(self, max_bad_fraction: float, num_bytes: int, *, is_final: bool) -> None:
        """Stop when too much of the source is bad.

        Args:
            max_bad_fraction: share of the rows, and of the bytes, that may be bad.
            num_bytes: about how many bytes of text the whole source has.
            is_final: no rows follow; a decision can be made on few rows.

        Raises:
            ValueError: more is bad than that.
        """
        num_bad = sum(count for reason, count in self.skipped.items() if reason != _HARMLESS)
        num_rows = self.num_documents + num_bad
        if num_bad > max_bad_fraction * num_rows and (is_final or num_rows >= _MIN_ROWS):
            raise ValueError(
                f"{num_bad:,} of {num_rows:,} rows are bad ({self._reasons()}). {_advice(max_bad_fraction)}"
            )
        if self.num_lost_bytes > max_bad_fraction * num_bytes:
            share = 100 * self.num_lost_bytes / max(num_bytes, 1)
            raise ValueError(
                f"{share:.0f}% of the text can not be read ({self._reasons()}). {_advice(max_bad_fraction)}"
            )

    def _reasons(self) -> str:
        return "; ".join(
            f"{count:,} {reason}, as {self.examples[reason][0]}"
            for reason, count in sorted(self.skipped.items())
            if reason != _HARMLESS
        )

    def describe(self) -> Iterable[str]:
        """Lines that say which rows were skipped, and why."""
        for reason, count in sorted(self.skipped.items()):
            yield f"skipped {count:,} {reason}: {', '.join(self.examples[reason])}{', ...' if count > 3 else ''}"


def _advice(max_bad_fraction: float) -> str:
    return f"Mend the source, or allow more than --max_bad_fraction {max_bad_fraction:g}."
