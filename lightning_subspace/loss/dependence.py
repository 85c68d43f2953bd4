"""Dependence of a loss on copies of parameters, not on originals.

A probe differentiates by copies that stand in the module. A loss that takes a parameter from elsewhere (an object of
another package, the optimizer, a class attribute, a weak reference, a closure) meets the original, which no derivative
of the probe sees. So the graph of a loss is followed to its ends, as `backward()` would. A custom autograd.Function may
hide what it depends on; there hooks on the originals refuse a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from lightning_subspace._torch import gradient_hook
from lightning_subspace.loss import attention, convolution, cross_entropy
from lightning_subspace.loss.loss_function import ElsewhereError

MESSAGE = (
    "loss: expected every parameter from the module, where a probe puts its copies, got the original of {!r} from "
    "elsewhere (an object of another package, self.optimizers(), a class attribute, a weak reference, a closure), so "
    "that a part of its gradient would be missing; take it from the module there, or pass loss_fn=, a loss that does."
)


# Custom functions of this package, which hide nothing.
NODES = (*convolution.NODES, *cross_entropy.NODES, *attention.NODES)
# The class of the nodes that a graph ends in, which has no public name.
ACCUMULATE = type(get_gradient_edge(torch.empty(0, requires_grad=True, device="cpu")).node)
# The name of those of a reentrant activation checkpoint, torch's or another package's.
CHECKPOINT = "CheckpointFunctionBackward"
REENTRANT = (
    "a part of the loss is an activation checkpoint with use_reentrant=True, inside of which torch.autograd.grad finds "
    "no parameter; use_reentrant=False is right"
)


class Dependence:
    """What the losses of an open context depend on; itself a context.

    Args:
        originals: the parameters that the copies stand for, with their names.

    Attributes:
        reaches_copies: whether a loss seen so far depends on a copy, or hides what it depends on.
        is_reentrant: whether a loss has passed through an activation checkpoint with `use_reentrant=True`.
        others: the leaves beside copies that losses depend on, such as another network of the user's.

    Example:
        >>> original = torch.ones(2, requires_grad=True)
        >>> copy = original.detach().clone().requires_grad_()
        >>> with Dependence({original: "weight"}) as dependence:
        ...     dependence.see((2.0 * copy).sum(), [copy])
        ...     print(dependence.reaches_copies)
        ...     try:
        ...         dependence.see((copy * original).sum(), [copy])
        ...     except ElsewhereError as error:
        ...         print(str(error).split("; ")[-1])
        True
        take it from the module there, or pass loss_fn=, a loss that does.
    """

    def __init__(self, originals: Mapping[Tensor, str]) -> None:
        self.reaches_copies = self.is_reentrant = False
        self.others: dict[int, Tensor] = {}  # by id
        self._originals = tuple(originals.items())
        self._hooks = ExitStack()
        self._is_guarded = False

    def __enter__(self) -> Dependence:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hooks.close()
        self.others = {}
        self._is_guarded = False

    def see(self, loss: Tensor, copies: Iterable[Tensor]) -> None:
        """Follow the graph of a loss to its ends.

        Raises:
            ElsewhereError: when one of them is an original.
        """
        ends, hidden = _ends(loss)
        self.is_reentrant = self.is_reentrant or any(type(node).__name__ == CHECKPOINT for node in hidden)
        for original, name in self._originals:
            if id(original) in ends:
                raise ElsewhereError(MESSAGE.format(name))
        reached = [ends.pop(id(copy), None) is not None for copy in copies]
        self.reaches_copies = self.reaches_copies or bool(hidden) or any(reached)
        self.others.update(ends)
        if hidden and not self._is_guarded:
            self._guard()

    def require_no_reentrant_checkpoint(self) -> None:
        """Refuse a loss that `torch.autograd.grad` does not differentiate whole.

        Raises:
            RuntimeError: as torch does where an inner part alone is such a checkpoint.
        """
        if self.is_reentrant:
            raise RuntimeError(REENTRANT)

    @contextmanager
    def preserved_gradients(self) -> Iterator[None]:
        """Put back `.grad` of the others, which a `backward()` adds to."""
        before = [(other, other.grad) for other in self.others.values()]
        for other, _ in before:
            other.grad = None
        try:
            yield
        finally:
            for other, gradient in before:
                other.grad = gradient

    def _guard(self) -> None:
        """Refuse gradients of originals until the context is left."""

        def refuse(_: Tensor, name: str) -> None:
            raise ElsewhereError(MESSAGE.format(name))

        self._is_guarded = True
        for original, name in self._originals:
            self._hooks.enter_context(gradient_hook(original, partial(refuse, name=name)))


def _ends(loss: Tensor) -> tuple[dict[int, Tensor], list[Any]]:
    """Leaves of a graph by id, and nodes that may hide others."""
    if loss.grad_fn is None:  # itself a leaf
        return {id(loss): loss}, []
    leaves: dict[int, Tensor] = {}
    hidden: list[Any] = []
    seen: set[Any] = {loss.grad_fn}  # held, so that no id is used again
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if isinstance(node, ACCUMULATE):
            leaf = node.variable  # type: ignore[attr-defined]
            leaves[id(leaf)] = leaf
            continue
        if isinstance(node, BackwardCFunction) and not isinstance(node, NODES):
            hidden.append(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves, hidden
