"""Fields side by side in one array, in a stated order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_foundry.registry import unknown_name_message


@dataclass(frozen=True)
class FieldLayout:
    """Fields side by side in one array (..., width), in a stated order."""

    # fields in the order of their columns
    fields: tuple[str, ...]
    # columns of each field
    widths: tuple[int, ...]

    @classmethod
    def create(cls, fields: Sequence[str], widths: Mapping[str, int], *, what: str = "field") -> "FieldLayout":
        """Lay out `fields` with the widths that are known of them.

        Args:
            what: config path of the list, for messages (`data.action_fields`).

        Raises:
            ValueError: a field is unknown or given twice.
        """
        for number, name in enumerate(fields):
            if name not in widths:
                raise ValueError(unknown_name_message(what, name, sorted(widths)))
            if name in fields[:number]:
                raise ValueError(f"{what} lists '{name}' twice. Remove one.")
        return cls(tuple(fields), tuple(widths[name] for name in fields))

    @property
    def width(self) -> int:
        """Columns of the whole."""
        return sum(self.widths)

    def slices(self) -> Iterator[tuple[str, slice]]:
        """Yield each field with its columns."""
        start = 0
        for name, width in zip(self.fields, self.widths, strict=True):
            yield name, slice(start, start + width)
            start += width

    def concatenate(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Put the fields side by side: {field: (..., width)} -> (..., total width).

        Raises:
            ValueError: a field is missing or has another width.
        """
        parts = []
        for name, width in zip(self.fields, self.widths, strict=True):
            if name not in arrays:
                raise ValueError(unknown_name_message("field", name, sorted(arrays)))
            if arrays[name].shape[-1] != width:
                raise ValueError(f"field '{name}' has {arrays[name].shape[-1]} columns, expected {width}.")
            parts.append(arrays[name])
        return np.concatenate(parts, axis=-1)

    def split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Take the fields apart again: views of (..., total width)."""
        if values.shape[-1] != self.width:
            raise ValueError(f"fields {', '.join(self.fields)} need {self.width} columns, got {values.shape[-1]}.")
        return {name: values[..., columns] for name, columns in self.slices()}
