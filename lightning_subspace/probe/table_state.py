"""Tables of records in a checkpoint: one flat tensor a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_subspace.probe.entries import Entries
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.table import MOST_GROUPS, Table

Layout = tuple[tuple[str, ...], tuple[str, ...]]  # names of groups and of rows


def encode_tables(records: Sequence[Record]) -> dict[str, Any]:
    """The tables of records, by name.

    Names of groups and rows are there once.

    Example:
        >>> records = [Record(3, {}, tables={"layers": Table.of(["body", "head"], {"null": [0.25, 0.75]})})]
        >>> decode_tables(Entries(encode_tables(records)), count=1)[0]["layers"].plain()
        {'groups': ['body', 'head'], 'null': [0.25, 0.75]}
    """
    return {name: _encoded(name, records) for name in dict.fromkeys(name for r in records for name in r.tables)}


def decode_tables(entries: Entries, count: int) -> list[dict[str, Table]]:
    """The tables that `encode_tables` was given, by record.

    Args:
        entries: what it returned.
        count: number of records.

    Raises:
        CheckpointError: for what it cannot have returned.
    """
    found: list[dict[str, Table]] = [{} for _ in range(count)]
    for name in entries.values:
        own = entries.below(name)
        which = own.integers("which", count, least=-1)
        layouts = _layouts(own.below("layouts"))
        own.require(max(which, default=-1) < len(layouts), "which", f"numbers below {len(layouts)}")
        sizes = [len(layouts[at][0]) * len(layouts[at][1]) if at >= 0 else 0 for at in which]
        parts = torch.split(own.tensor("values", (sum(sizes),), torch.float32), sizes)
        for tables, at, part in zip(found, which, parts, strict=True):
            if at >= 0:
                groups, rows = layouts[at]
                tables[str(name)] = Table(groups, rows, part.view(len(rows), len(groups)).clone().numpy())
    return found


def _encoded(name: str, records: Sequence[Record]) -> dict[str, Any]:
    tables = [record.tables.get(name) for record in records]
    layouts = list(dict.fromkeys((table.groups, table.names) for table in tables if table is not None))
    number = {layout: place for place, layout in enumerate(layouts)}
    values = [torch.from_numpy(table.values).flatten() for table in tables if table is not None]
    return {
        "layouts": {
            place: {"groups": list(groups), "rows": list(rows)} for place, (groups, rows) in enumerate(layouts)
        },
        "which": [-1 if table is None else number[table.groups, table.names] for table in tables],
        "values": torch.cat(values),
    }


def _layouts(entries: Entries) -> list[Layout]:
    """The names of groups and rows, by number."""
    found = []
    for number in range(len(entries.values)):
        names = entries.below(number)
        groups, rows = names.texts("groups"), names.texts("rows")
        names.require(0 < len(groups) <= MOST_GROUPS, "groups", f"1 to {MOST_GROUPS} names")
        found.append((tuple(groups), tuple(rows)))
    return found
