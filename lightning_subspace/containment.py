"""A module whose state is copies, for as long as a probe looks at it.

`training_step` changes more than gradients: batch-norm statistics, spectral-norm vectors, metric states, counters, a
momentum teacher, clamped weights, random generators. A `Shadow` finds every container of state that hangs on a module
and fills it with copies. Modules, dicts and lists stay the same *objects*, so that closures and hooks see the copies
too; only their contents are exchanged. Whatever is written goes to the copies. Closing puts the original contents
back: not equal ones, the same ones, so nothing of the user's was ever written.

`renew` gives fresh copies: called before every evaluation of the loss, it makes each evaluation start from the same
state, which is what makes the loss a function. Copies of parameters are kept between evaluations as long as nobody
writes to them, so that all graphs of a probe share one set of leaves.

What is found (`containers.py` says how): the attributes of all modules, registered or not; dicts, lists, sets, deques
and tuples at any depth; arrays; random generators; hooks, with what their closures and partials hold; and plain objects
whose class comes from the same package as one of the module's own classes. A tensor that is a view of another one, or
of a parameter, is so among the copies too. An iterator or an open file cannot be put back: using one raises.

Not found: globals and class attributes, objects of unrelated packages, what lives outside of Python (shared memory,
queues, services), and `.grad`, without which the copies of parameters begin. A set that grew may iterate in another
order afterwards. A list kept in the module is copied with all its tensors, so a training set does not belong there.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from lightning_subspace.containers import Container, Found, explore, own_caches, own_packages


class Shadow:
    """Exchange the state of `module` for copies until `close` is called.

    Args:
        module: the module; its tree is walked once.
        dtype: floating-point copies are at least this wide (a bfloat16 weight becomes a float32 leaf); None keeps all.
        displacement: None, or a function from a parameter to an offset that is added to its copy (None: no offset).
        bystanders: objects whose attributes are put back as well, but whose tensors are not copied: what a training
            step can reach and assign to, such as the learning rate of an optimizer.

    Raises:
        TypeError: for a TorchScript module.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> shadow = Shadow(norm)
        >>> _ = norm(torch.ones(3, 2)); norm.num_batches_tracked
        tensor(1)
        >>> shadow.close(); norm.num_batches_tracked
        tensor(0)
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype | None = None,
        displacement: Callable[[nn.Parameter], Tensor | None] | None = None,
        bystanders: Iterable[Any] = (),
    ) -> None:
        self._dtype = dtype
        self._displacement = displacement if displacement is not None else lambda parameter: None
        self._leaves: dict[int, _Leaf] = {}  # by the id of the original
        self._written: set[int] = set()  # ids of the originals whose copies were written to
        self._caches = [(cache, cache.cache_info().misses) for cache in own_caches(module)]
        packages = own_packages(module)
        inside = explore([module], Found(packages))
        around = explore(map(vars, bystanders), Found(packages, inside.seen))
        self._containers, self._bystanding = inside.containers, around.containers
        self._generators = inside.generators + around.generators
        self._seen = inside.seen
        self._owners = _owners(inside.tensors)
        try:
            self.renew()
        except BaseException:
            self.close()
            raise

    def renew(self) -> None:
        """Start again from the original state: fresh copies, generators rewound; untouched parameter copies stay."""
        self.settle()
        memo: dict[int, Any] = {}
        for container in self._containers:
            container.fill([self._copy(item, memo) for item in container.items])
        for leaf in list(self._leaves.values()):
            leaf.copy.grad = None
            leaf.copy.__dict__.clear()
            leaf.copy.__dict__.update({key: self._copy(item, memo) for key, item in vars(leaf.original).items()})
        self._put_back(self._bystanding)

    def settle(self) -> None:
        """Part with the parameter copies that an evaluation has written to; to be called when its graph is built.

        Raises:
            RuntimeError: when the graph of an earlier evaluation, which had not written to it, uses the same copy.
        """
        for key, leaf in list(self._leaves.items()):
            # By value: writes through `.data` (a clamp, a momentum teacher) leave no trace in the version counter.
            untouched = leaf.copy.requires_grad == leaf.original.requires_grad and torch.equal(
                leaf.copy.detach(), self._value(leaf.original, leaf.offset)
            )
            if not untouched:
                self._written.add(key)
                if leaf.shared:
                    raise RuntimeError(
                        "the training step writes to a parameter at some batches and not at others, so that there is "
                        "no one function to differentiate; pass loss_fn=, a loss without the write."
                    )
            if key in self._written or self._displacement(leaf.original) is not leaf.offset:
                del self._leaves[key]
            leaf.shared = True

    def close(self) -> None:
        """Put the original contents back. The module is as if nothing had happened, also after an exception."""
        self._put_back(self._containers)
        self._put_back(self._bystanding)
        self._leaves.clear()
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()

    def _put_back(self, containers: list[Container]) -> None:
        for container in containers:
            container.fill(container.items)
        for set_state, state in self._generators:
            set_state(state)

    # -- copying ------------------------------------------------------------------------------------------------------

    def _copy(self, value: Any, memo: dict[int, Any]) -> Any:
        """What stands in for a value; what is constant, or exchanged in place, stands in for itself."""
        if isinstance(value, tuple | types.MappingProxyType):
            return self._copy_immutable(value, memo)
        if id(value) not in memo:
            if isinstance(value, nn.Parameter):
                memo[id(value)] = self._copy_parameter(value)
            elif isinstance(value, Tensor):
                memo[id(value)] = self._copy_tensor(value, memo)
            elif isinstance(value, np.ndarray):
                memo[id(value)] = value.copy()
            elif isinstance(value, Iterator) and not self._is_exchanged(value):
                memo[id(value)] = _Sealed(value)
            else:
                return value
        return memo[id(value)]

    def _copy_immutable(self, value: Any, memo: dict[int, Any]) -> Any:
        """A tuple or a read-only dict, made anew if something in it is."""
        items = list(value if isinstance(value, tuple) else value.values())
        new = [self._copy(item, memo) for item in items]
        if all(a is b for a, b in zip(new, items, strict=True)):
            return value
        if not isinstance(value, tuple):
            return types.MappingProxyType(dict(zip(value, new, strict=True)))
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
