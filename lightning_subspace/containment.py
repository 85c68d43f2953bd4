"""A module whose state is copies, for as long as a probe looks at it.

`training_step` changes more than gradients: batch-norm statistics, spectral-norm vectors, metric states, counters, a
momentum teacher, clamped weights, random generators. A `Shadow` finds every container of state that hangs on a module
and fills it with copies. Modules, dicts and lists stay the same *objects*, so that closures and hooks see the copies
too; only their contents are exchanged. Whatever is written goes to the copies. Closing puts the original contents
back: not equal ones, the same ones, so nothing of the user's was ever written.

`renew` gives fresh copies: called before every evaluation of the loss, it makes each evaluation start from the same
state, which is what makes the loss a function. Copies of parameters are kept between evaluations as long as nobody
wrote to them, so that all graphs of a probe share one set of leaves.

What is found: the attributes of all submodules; lists, dicts, sets, deques and tuples in them at any depth; arrays;
random generators; and plain objects whose class comes from the same package as one of the module's own classes. Not
found: state in closures, globals, `__slots__`, and objects of unrelated packages.
"""

from __future__ import annotations

import argparse
import collections
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

# Objects of these packages manage training itself: a probe must neither copy nor follow them.
FOREIGN = frozenset({"lightning", "pytorch_lightning", "lightning_fabric", "torch", "builtins"})


class Shadow:
    """Exchange the state of `module` for copies until `close` is called.

    Args:
        module: the module; its tree is walked once.
        dtype: floating-point copies are at least this wide (a bfloat16 weight becomes a float32 leaf); None keeps all.
        displacement: None, or a function from a parameter to an offset that is added to its copy (None: no offset).

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
    ) -> None:
        self._dtype = dtype
        self._displacement = displacement
        self._containers: list[_Container] = []
        self._generators: list[tuple[Callable[[Any], Any], Any]] = []
        self._parameters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # id of the original: (original, copy)
        self._packages = {cls.__module__.split(".")[0] for m in module.modules() for cls in type(m).__mro__} - FOREIGN
        self._walk(module)
        try:
            self.renew()
        except BaseException:
            self.close()
            raise

    def renew(self) -> None:
        """Start again from the original state: fresh copies, generators rewound; untouched parameter copies stay."""
        self._parameters = {key: pair for key, pair in self._parameters.items() if self._is_intact(*pair)}
        memo: dict[int, Any] = {}
        for container in self._containers:
            container.fill([self._copy(item, memo) for item in container.items])
        for set_state, state in self._generators:
            set_state(state)

    def close(self) -> None:
        """Put the original contents back. The module is as if nothing had happened, also after an exception."""
        for container in self._containers:
            container.fill(container.items)
        for set_state, state in self._generators:
            set_state(state)
        self._parameters.clear()

    # -- finding state ------------------------------------------------------------------------------------------------

    def _walk(self, root: nn.Module) -> None:
        seen: set[int] = set()
        stack: list[Any] = [root]
        while stack:
            value = stack.pop()
            if id(value) in seen:
                continue
            if isinstance(value, tuple):  # not marked as seen: a temporary tuple's id may be used again
                stack.extend(value)
                continue
            seen.add(id(value))
            generator = _generator_state(value)
            if generator is not None:
                self._generators.append(generator)
            elif (container := self._container(value)) is not None:
                self._containers.append(container)
                stack.extend(container.items)

    def _container(self, value: Any) -> _Container | None:
        if isinstance(value, torch.jit.ScriptModule):
            raise TypeError(
                f"{type(value).__name__} is a compiled TorchScript module, whose parameters cannot be exchanged for "
                "copies; use the eager module, or pass loss_fn= and leave it out."
            )
        if isinstance(value, dict):
            return _DictContainer(value)
        if isinstance(value, (list, collections.deque)):
            return _ListContainer(value)
        if isinstance(value, set):
            return _SetContainer(value)
        if isinstance(value, nn.Module) or self._is_own_object(value):
            return _DictContainer(vars(value))
        return None

    def _is_own_object(self, value: Any) -> bool:
        """Whether a plain object's attributes are state of the module."""
        if isinstance(value, types.SimpleNamespace | argparse.Namespace | torch.distributions.Distribution):
            return True
        if isinstance(value, type | types.FunctionType | types.MethodType | types.ModuleType | Tensor | Dataset):
            return False
        if not hasattr(value, "__dict__"):
            return False
        packages = {cls.__module__.split(".")[0] for cls in type(value).__mro__ if cls is not object}
        return bool(packages & self._packages) and not packages & FOREIGN

    # -- copying ------------------------------------------------------------------------------------------------------

    def _copy(self, value: Any, memo: dict[int, Any]) -> Any:
        """A copy of a tensor, an array, or a tuple holding one; anything else is exchanged in place or constant."""
        if isinstance(value, tuple) and value:
            items = [self._copy(item, memo) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if not isinstance(value, Tensor | np.ndarray):
            return value
        if id(value) not in memo:
            if isinstance(value, nn.Parameter):
                memo[id(value)] = self._copy_parameter(value)
            elif isinstance(value, Tensor):
                memo[id(value)] = self._widened(value.detach(), clone=True).requires_grad_(
                    value.requires_grad and value.is_leaf
                )
            else:
                memo[id(value)] = value.copy()
        return memo[id(value)]

    def _copy_parameter(self, original: nn.Parameter) -> nn.Parameter:
        if id(original) not in self._parameters:
            copy = nn.Parameter(self._value(original, clone=True), requires_grad=original.requires_grad)
            copy.__dict__.update(original.__dict__)
            self._parameters[id(original)] = (original, copy)
        return self._parameters[id(original)][1]

    def _value(self, original: nn.Parameter, *, clone: bool = False) -> Tensor:
        """What the copy of a parameter holds when nobody has written to it."""
        offset = self._displacement(original) if self._displacement is not None else None
        value = self._widened(original.detach(), clone=clone and offset is None)
        return value if offset is None else value + offset.to(value)

    def _is_intact(self, original: nn.Parameter, copy: nn.Parameter) -> bool:
        # By value: writes through `.data` (a clamp, a momentum teacher) leave no trace in the version counter.
        return copy.requires_grad == original.requires_grad and torch.equal(copy.detach(), self._value(original))

    def _widened(self, tensor: Tensor, *, clone: bool) -> Tensor:
        dtype = tensor.dtype
        if self._dtype is not None and (tensor.is_floating_point() or tensor.is_complex()):
            dtype = torch.promote_types(dtype, self._dtype)
        return tensor.to(dtype, copy=True) if clone else tensor.to(dtype)


class _Container:
    """A mutable container and its original contents; `fill` exchanges the contents, keeping the object."""

    items: list[Any]

    def fill(self, items: list[Any]) -> None:
        raise NotImplementedError


class _DictContainer(_Container):
    def __init__(self, target: dict[Any, Any]) -> None:
        self._target = target
        self._keys = list(target)
        self.items = list(target.values())

    def fill(self, items: list[Any]) -> None:
        target = self._target
        # Entry by entry where the keys are as they were: guards of compiled code and hooks hold on to the dict.
        if list(target) != self._keys:
            target.clear()
        for key, item in zip(self._keys, items, strict=True):
            if key not in target or target[key] is not item:
                target[key] = item


class _ListContainer(_Container):
    def __init__(self, target: list[Any] | collections.deque[Any]) -> None:
        self._target = target
        self.items = list(target)

    def fill(self, items: list[Any]) -> None:
        if len(items) != len(self._target) or any(a is not b for a, b in zip(items, self._target, strict=True)):
            self._target.clear()
            self._target.extend(items)


class _SetContainer(_Container):
    def __init__(self, target: set[Any]) -> None:
        self._target = target
        self.items = list(target)

    def fill(self, items: list[Any]) -> None:
        if len(items) != len(self._target) or any(item not in self._target for item in items):
            self._target.clear()
            self._target.update(items)


def _generator_state(value: Any) -> tuple[Callable[[Any], Any], Any] | None:
    """How to rewind a random generator to its present state; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.set_state, value.get_state()
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda state: setattr(bits, "state", state), bits.state
    if isinstance(value, np.random.RandomState):
        return value.set_state, value.get_state()
    if isinstance(value, random.Random):
        return value.setstate, value.getstate()
    return None

