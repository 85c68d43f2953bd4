"""Findings about the state around a module, kept between probes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_subspace.loss.attention_scores import AttentionScores
from lightning_subspace.state.bulk import SMALLEST, Bulk

MANY = 10_000  # entries, before those of tensors that are gone are looked for


class Findings:
    """Findings along one run.

    Attributes:
        written: tensors and arrays around the module that an evaluation has written to, by id; they are copied from
            then on.
        walked: ids of large containers that an evaluation has changed, and of global objects; they are restored behind
            every evaluation from then on.
        skipped: types of objects whose state cannot be asked for in short time.
        is_agreed: whether a first evaluation has been taken by all ranks without having to be taken again.
        refusals: why a loss is not evaluated any more, by what tells one loss from another.
        scores: of its attention.
    """

    def __init__(self) -> None:
        self.written: dict[int, weakref.ref[Any]] = {}
        self.walked: set[int] = set()
        self.skipped: set[type] = set()
        self.is_agreed = False
        self.refusals: dict[Any, str] = {}
        self.scores = AttentionScores()
        self._verified: dict[int, weakref.ref[Any]] = {}
        self._most = MANY
        self._bulks: dict[int, Bulk] = {}

    def bulk(self, value: Any, smallest: int = SMALLEST) -> Bulk | None:
        """A value as a large container of plain data, or None."""
        if id(value) in self.walked:
            return None
        known = self._bulks.get(id(value))
        if known is not None and known.root is value and not known.has_changed():
            return known
        self._bulks.pop(id(value), None)
        found = Bulk.of(value, smallest)
        if found is not None:
            self._bulks[id(value)] = found
        return found

    def keep(self, bulks: Iterable[Bulk]) -> None:
        """Forget all large containers but these."""
        kept = {id(bulk) for bulk in bulks}
        self._bulks = {key: bulk for key, bulk in self._bulks.items() if id(bulk) in kept}

    def verify(self, value: Any) -> None:
        """A first evaluation has left this tensor or array as it was."""
        if not self.is_verified(value):
            self._verified[id(value)] = weakref.ref(value)
            if len(self._verified) > self._most:  # most of a replay memory's entries are gone after a while
                self._verified = {key: ref for key, ref in self._verified.items() if ref() is not None}
                self._most = max(MANY, 2 * len(self._verified))

    def is_verified(self, value: Any) -> bool:
        """Whether this tensor or array has seen an evaluation before."""
        return _is_of(self._verified, value)

    def write(self, value: Any) -> None:
        """An evaluation has written to this tensor or array."""
        self.written[id(value)] = weakref.ref(value)

    def is_written(self, value: Any) -> bool:
        """Whether an evaluation has written to this tensor or array."""
        return _is_of(self.written, value)


def findings_of(module: nn.Module) -> Findings:
    """The findings of a module, which live as long as it does."""
    return _FINDINGS.setdefault(module, Findings())


def _is_of(known: dict[int, weakref.ref[Any]], value: Any) -> bool:
    """Whether the object itself is known, not one before in its place."""
    reference = known.get(id(value))
    return reference is not None and reference() is value


_FINDINGS: weakref.WeakKeyDictionary[nn.Module, Findings] = weakref.WeakKeyDictionary()
