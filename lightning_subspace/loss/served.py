"""Operators on the graphs of an open loss, released with it.

Others may still refer to one by then: a measurement of a user's that keeps its probe, or the traceback of an exception,
whose functions keep what they close over. So the loss has them drop their graphs when it is closed.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet


class Released(Protocol):
    """An object that can drop what it keeps."""

    def release(self) -> None:
        """Drop graphs, gradients and buffers."""
        ...


class Served:
    """The operators of one open loss; it keeps none of them alive.

    Example:
        >>> class Operator:
        ...     graphs = ["large"]
        ...     def release(self):
        ...         self.graphs = []
        >>> served, kept = Served(), Operator()
        >>> served.add(kept)
        >>> served.release()
        >>> kept.graphs
        []
    """

    def __init__(self) -> None:
        self._operators: WeakSet[Released] = WeakSet()

    def add(self, operator: Released) -> None:
        """Take in an operator."""
        self._operators.add(operator)

    def release(self) -> None:
        """Have all drop what they keep."""
        for operator in list(self._operators):
            operator.release()
