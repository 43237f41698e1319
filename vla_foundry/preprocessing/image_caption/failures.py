"""Count what became of each image and caption: samples, and failures by reason with the first names."""

from collections import Counter
from typing import Any

# begins the reasons that are not the user's to mend: links that are dead, or lead to something else
DOWNLOAD = "download: "
# names that are kept for each reason
_MAX_EXAMPLES = 10
# before this many are judged, a run is not stopped for its share of failures
_MIN_JUDGED = 1000


class Unusable(ValueError):
    """Raised for an image and caption that make no sample.

    Args:
        reason: a few words that failures are counted by.
        detail: what is particular about this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


class Failures:
    """Counts that can be sent as JSON and added up."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count failures of one reason, one of which is named."""
        self.counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(name)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "samples": self.num_samples,
            "failed": dict(sorted(self.counts.items())),
            "examples": dict(sorted(self.examples.items())),
        }

    def add_json(self, values: dict[str, Any]) -> None:
        """Add what another one gave as JSON values."""
        self.num_samples += values["samples"]
        self.counts.update(values["failed"])
        for reason, examples in values["examples"].items():
            mine = self.examples.setdefault(reason, [])
            mine += examples[: _MAX_EXAMPLES - len(mine)]

    def check(self, max_fraction: float, *, flag: str, downloads: bool, is_final: bool) -> None:
        """Stop when too much has failed.

        Args:
            max_fraction: share that may fail.
            flag: where the user sets that.
            downloads: judge the failed downloads; else all other failures.
            is_final: no more will come; few are enough to judge.

        Raises:
            ValueError: more has failed.
        """
        judged = {reason: n for reason, n in self.counts.items() if reason.startswith(DOWNLOAD) == downloads}
        num_failed = sum(judged.values())
        total = self.num_samples + num_failed
        if num_failed > max_fraction * total and (is_final or total >= _MIN_JUDGED):
            reasons = "; ".join(
                f"{count:,} {reason}, as {self.examples[reason][0]}" for reason, count in Counter(judged).most_common(3)
            )
            raise ValueError(
                f"{num_failed:,} of {total:,} images failed ({reasons}). Mend the source, or allow more than "
                f"{flag} {max_fraction:g}."
            )

    def describe(self) -> list[str]:
        """Lines that say what failed, and why."""
        return [
            f"failed: {count:,} {reason}: {', '.join(self.examples[reason][:3])}{', ...' if count > 3 else ''}"
            for reason, count in sorted(self.counts.items())
        ]
