"""Table of a record: numbers of one probe by group of parameters.

A record keeps it beside its metrics, for figures: loggers get no scalars of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_GROUPS = 16  # a figure has room for no more, and a run has very many tables


@dataclass(frozen=True, eq=False, slots=True)
class Table:
    """Numbers of one probe, one in each row for each group.

    A measurement returns it as a value among its numbers, and may add rows after the step.

    Attributes:
        groups: their names, at most 16.
        names: of the rows.
        values: (rows, groups) float32; nan where a number is not known.

    Raises:
        ValueError: for more than 16 groups, or values of another shape.

    Example:
        >>> table = Table.of(["body", "head"], {"gradient": [0.25, 0.75]})
        >>> table.rows["gradient"].tolist()
        [0.25, 0.75]
    """

    groups: tuple[str, ...]
    names: tuple[str, ...]
    values: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not 0 < len(self.groups) <= MOST_GROUPS:
            raise ValueError(f"groups: expected 1 to {MOST_GROUPS} names, got {len(self.groups)}; sum the rest up.")
        shape = len(self.names), len(self.groups)
        if self.values.shape != shape or self.values.dtype != np.float32:
            got = f"{self.values.dtype} of shape {self.values.shape}"
            raise ValueError(f"values: expected float32 of shape {shape}, a number a row and group, got {got}.")

    @classmethod
    def of(cls, groups: Sequence[str], rows: Mapping[str, Any]) -> Table:
        """A table of rows by name, each with a number a group."""
        values = np.array([np.asarray(row, dtype=np.float32) for row in rows.values()], dtype=np.float32)
        return cls(tuple(groups), tuple(rows), values.reshape(len(rows), -1))

    @property
    def rows(self) -> dict[str, NDArray[np.float32]]:
        """The rows by name."""
        return dict(zip(self.names, self.values, strict=True))

    def with_rows_of(self, other: Table) -> Table:
        """This table with more rows, if the groups are the same."""
        return Table.of(self.groups, {**self.rows, **other.rows}) if other.groups == self.groups else self

    def sharing_names(self, other: Table | None) -> Table:
        """This table with the equal names of another: held once."""
        if other is None or (other.groups, other.names) != (self.groups, self.names):
            return self
        return Table(other.groups, other.names, self.values)

    def plain(self) -> dict[str, list[Any]]:
        """As lists of numbers, None for unknown ones.

        Example:
            >>> Table.of(["body", "head"], {"update": [0.125, float("nan")]}).plain()
            {'groups': ['body', 'head'], 'update': [0.125, None]}
        """
        rows = zip(self.names, self.values.tolist(), strict=True)
        known = {name: [value if math.isfinite(value) else None for value in row] for name, row in rows}
        return {"groups": list(self.groups), **known}
