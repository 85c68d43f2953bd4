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
from lightning_subspace.loss.loss_function import LossError

MESSAGE = (
    "loss: expected every parameter from the module, where a probe puts its copies, got the original of {!r} from "
    "elsewhere (an object of another package, self.optimizers(), a class attribute, a weak reference, a closure), so "
    "that a part of its gradient would be missing; take it from the module there, or pass loss_fn=, a loss that does."
)


# The class of the nodes that a graph ends in, which has no public name.
ACCUMULATE = type(get_gradient_edge(torch.empty(0, requires_grad=True, device="cpu")).node)


class Dependence:
    """What the losses of an open context depend on; itself a context.

    Args:
        originals: the parameters that the copies stand for, with their names.

    Attributes:
        reaches_copies: whether a loss seen so far depends on a copy, or hides what it depends on.
        others: the leaves beside copies that losses depend on, such as another network of the user's.

    Example:
        >>> original = torch.ones(2, requires_grad=True)
        >>> copy = original.detach().clone().requires_grad_()
        >>> with Dependence({original: "weight"}) as dependence:
        ...     dependence.see((2.0 * copy).sum(), [copy])
        ...     print(dependence.reaches_copies)
        ...     try:
        ...         dependence.see((copy * original).sum(), [copy])
        ...     except LossError as error:
        ...         print(str(error)[-90:])
        True
        would be missing; take it from the module there, or pass loss_fn=, a loss that does.
    """

    def __init__(self, originals: Mapping[Tensor, str]) -> None:
        self.reaches_copies = False
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
            LossError: when one of them is an original.
        """
        ends, is_hidden = _ends(loss)
        for original, name in self._originals:
            if id(original) in ends:
                raise LossError(MESSAGE.format(name))
        reached = [ends.pop(id(copy), None) is not None for copy in copies]
        self.reaches_copies = self.reaches_copies or is_hidden or any(reached)
        self.others.update(ends)
        if is_hidden and not self._is_guarded:
            self._guard()

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
            raise LossError(MESSAGE.format(name))

        self._is_guarded = True
        for original, name in self._originals:
            self._hooks.enter_context(gradient_hook(original, partial(refuse, name=name)))


def _ends(loss: Tensor) -> tuple[dict[int, Tensor], bool]:
    """Leaves of a graph by id, and whether some may be hidden."""
    if loss.grad_fn is None:  # itself a leaf
        return {id(loss): loss}, False
    leaves: dict[int, Tensor] = {}
    is_hidden = False
    seen: set[Any] = {loss.grad_fn}  # held, so that no id is used again
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if isinstance(node, ACCUMULATE):
            leaf = node.variable  # type: ignore[attr-defined]
            leaves[id(leaf)] = leaf
            continue
        is_hidden = is_hidden or isinstance(node, BackwardCFunction)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves, is_hidden
