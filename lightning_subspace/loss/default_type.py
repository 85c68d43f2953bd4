"""Floating-point type of torch's new tensors, in one thread alone.

`torch.set_default_dtype` belongs to the process: a thread of the user's that prepares batches would get float64 tensors
while a probe computes in float64. A `TorchFunctionMode` belongs to its thread. Three kinds of calls go by the default
type: those that make a tensor (`torch.zeros(3)`), those that infer a type from Python's numbers (`torch.tensor(0.5)`),
and operations on integers whose result is none (`count / 2`). The mode stays on in backward passes (`LastingMode`).

Not seen by a mode, and so of the process's type: `torch.Tensor(...)`, and what is made inside of TorchScript or of a
custom operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_subspace._torch import is_operator
from lightning_subspace.loss.lasting_mode import LastingMode

# Functions whose result is of the default type unless they are told another.
MAKING = frozenset({
    *(torch.zeros, torch.ones, torch.empty, torch.empty_strided, torch.empty_permuted, torch.eye),
    *(torch.rand, torch.randn, torch.normal, torch.linspace, torch.logspace, torch.scalar_tensor),
    *(torch.bartlett_window, torch.blackman_window, torch.hamming_window, torch.hann_window, torch.kaiser_window),
    *(torch.fft.fftfreq, torch.fft.rfftfreq),
})  # fmt: skip
# Functions that look at their data: of the default type where these are, or contain, numbers of Python's own.
INFERRING = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.sparse_coo_tensor})
COUNTING = frozenset({torch.full, torch.arange})  # of the default type unless all numbers are whole
# Functions that say a type by their name, or by a string.
CONVERTING = frozenset({
    *(Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.chalf),
    *(Tensor.type, Tensor.to, Tensor.view, Tensor.new_tensor, Tensor.new),
})  # fmt: skip


class DefaultType(LastingMode):
    """Context in which another type is this thread's default.

    Args:
        dtype: floating-point, wider than that of the process.

    Example:
        >>> with DefaultType(torch.float64):
        ...     print(torch.zeros(1).dtype, (torch.arange(3) / 2).dtype, torch.zeros(1, dtype=torch.float32).dtype)
        torch.float64 torch.float64 torch.float32
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        default = torch.get_default_dtype()
        # The complex type that goes with bfloat16 is that of float32.
        narrow = torch.complex32 if default is torch.float16 else torch.complex64
        self._dtype = dtype
        self._wide = {default: dtype, narrow: dtype.to_complex()}

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function of torch as if the default type were another."""
        if func in MAKING:
            return func(*args, **self._told(args, named))
        result = func(*args, **named)
        if not isinstance(result, Tensor) or result.dtype not in self._wide:
            return result
        return self._widened(func, args, named, result)

    def _told(self, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """The arguments, and the type where none is given."""
        given = [*args, *named.values()]
        if _says_type(named) or any(isinstance(value, Tensor) and not _is_whole(value) for value in given):
            return named
        is_complex = any(isinstance(value, complex) for value in given)
        return {**named, "dtype": self._dtype.to_complex() if is_complex else self._dtype}

    def _widened(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], result: Tensor) -> Any:
        """A result in the other type, if nobody asked for its own."""
        given = [*args, *named.values()]
        wide = self._wide[result.dtype]
        if _says_type(named) or func in CONVERTING or any(isinstance(value, torch.dtype) for value in given):
            return result
        if func in COUNTING or (func in INFERRING and _has_own_numbers(_data_of(args, named))):
            return func(*args, **{**named, "dtype": wide})
        tensors = list(_tensors_in(given))
        if is_operator(func) or not tensors or not all(map(_is_whole, tensors)) or any(t is result for t in tensors):
            return result
        if func in (torch.where, Tensor.where):  # the condition stays, and both others may be numbers of Python's
            condition = 0 if func is torch.where else 1
            given = [v if i == condition else torch.as_tensor(v, dtype=wide) for i, v in enumerate(args)]
            return func(*given, **named)
        # The same operation on the same numbers, which are whole: it draws nothing and writes to nothing.
        return func(*(_to(value, wide) for value in args), **{key: _to(value, wide) for key, value in named.items()})


def _says_type(named: Mapping[str, Any]) -> bool:
    return named.get("dtype") is not None or named.get("out") is not None


def _data_of(args: tuple[Any, ...], named: Mapping[str, Any]) -> list[Any]:
    return [*args, *(value for key, value in named.items() if key in ("data", "obj", "indices", "values"))]


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor holds integers or truth values."""
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def _has_own_numbers(data: Iterable[Any]) -> bool:
    """Whether nested lists hold Python's floats or complex numbers, or nothing."""
    is_empty = True
    for item in data:
        if isinstance(item, list | tuple):
            if _has_own_numbers(item):
                return True
        elif isinstance(item, float | complex):
            return True
        is_empty = False
    return is_empty


def _tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


def _to(value: Any, dtype: torch.dtype) -> Any:
    """A value with its tensors converted."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return type(value)(_to(item, dtype) for item in value) if type(value) in (list, tuple) else value
