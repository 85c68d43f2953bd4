"""Parameters as the coordinates of R^n: selection, order, and flat vectors.

The order is that of `module.named_parameters()`. Tied parameters appear once, under their first name; a pattern may use
any of their names. A complex parameter has two real coordinates an entry, its real and imaginary parts. Torch's
gradient of a real loss by a complex tensor, dL/dRe + i dL/dIm, holds the real gradient by these two, so that flat
vectors are real and their inner products are those of R^n.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from lightning_subspace.parallel.fsdp import local_part, type_name
from lightning_subspace.parallel.storage import overlapping


@dataclass(frozen=True)
class ParameterSpace:
    """The trainable parameters of a module as the coordinates of R^n.

    Attributes:
        names: qualified parameter names, in the order of `named_parameters()`.
        shapes: their shapes.
        complex_names: those that are complex.
        aliases: all names of each parameter, more than one where it is tied; not compared.
        types: the class of the module that holds each, in words; not compared.

    Example:
        >>> space = ParameterSpace.of(nn.Linear(3, 2))
        >>> space.names, space.n
        (('weight', 'bias'), 8)
        >>> [tuple(t.shape) for t in space.unflatten(torch.arange(8.0))]
        [(2, 3), (2,)]
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    complex_names: frozenset[str] = frozenset()
    aliases: tuple[tuple[str, ...], ...] = field(default=(), compare=False, repr=False)
    types: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, module: nn.Module, params: Sequence[str] | None = None) -> ParameterSpace:
        """The space of the trainable parameters of a module.

        Args:
            module: any module; only parameters with `requires_grad=True` are taken.
            params: shell-style patterns on the qualified names (`["head.*", "*.bias"]`); None takes all.

        Raises:
            ValueError: when no parameter is trainable, a pattern matches none, one is lazy and without a shape, or two
                trainable parameters share memory without being one.
        """
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                names.setdefault(parameter, []).append(name)
        if not names:
            name = type(module).__name__
            raise ValueError(
                f"module: expected trainable parameters, got none; {name} has no parameter with requires_grad=True."
            )
        if params is not None:
            _require_matches(params, [name for aliases in names.values() for name in aliases], type(module).__name__)
        chosen = {aliases[0]: p for p, aliases in names.items() if params is None or _any_match(aliases, params)}
        for name, parameter in chosen.items():
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(
                    f"{name!r}: expected a shape, got a lazy parameter; run a forward pass before training."
                )
        _require_own_memory(module)
        is_complex = frozenset(name for name, parameter in chosen.items() if parameter.is_complex())
        modules = dict(module.named_modules(remove_duplicate=False))
        return cls(
            tuple(chosen),
            tuple(p.shape for p in chosen.values()),
            is_complex,
            aliases=tuple(tuple(names[p]) for p in chosen.values()),
            types=tuple(type_name(modules.get(name.rpartition(".")[0], module)) for name in chosen),
        )

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of real coordinates of each parameter."""
        return tuple(
            math.prod(shape) * (2 if name in self.complex_names else 1)
            for name, shape in zip(self.names, self.shapes, strict=True)
        )

    @property
    def n(self) -> int:
        """Dimension of the space."""
        return sum(self.numels)

    def widest_dtype(self, module: nn.Module, *least: torch.dtype) -> torch.dtype:
        """The real type that holds every parameter and the `least` types."""
        dtypes = (tensor.dtype.to_real() for tensor in self.tensors(module))
        return reduce(torch.promote_types, (*least, *dtypes))

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """The module's parameters of this space, in order.

        Raises:
            ValueError: when a parameter has gone or changed its shape.
        """
        named = dict(module.named_parameters())
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in named or named[name].shape != shape:
                raise ValueError(f"the parameter {name!r} of shape {tuple(shape)} is no longer part of the module.")
        return [named[name] for name in self.names]

    def flatten(self, tensors: Iterable[Tensor | None], like: Tensor | None = None) -> Tensor:  # (n,)
        """Concatenate one tensor a parameter into a new flat real vector.

        Args:
            tensors: in the order of `names`; None stands for zeros (an unused parameter), sparse ones are made dense.
            like: gives (real) dtype and device of the result; by default the first tensor that is not None.

        Raises:
            ValueError: when `like` is needed but missing, or when a tensor has not the shape of its parameter.
        """
        tensors = list(tensors)
        like = next((t for t in tensors if t is not None), None) if like is None else like
        if like is None:
            raise ValueError("tensors: expected at least one, got None alone; pass `like=` for dtype and device.")
        flat = torch.zeros(self.n, dtype=like.dtype.to_real(), device=like.device)
        pieces = torch.split(flat, list(self.numels))
        for name, shape, piece, tensor in zip(self.names, self.shapes, pieces, tensors, strict=True):
            if tensor is not None:
                piece.copy_(flat_values(tensor, name, shape))
        return flat

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector, (n,), by parameter; copies if complex."""
        return [
            torch.complex(*piece.view(-1, 2).unbind(1)).view(shape) if name in self.complex_names else piece.view(shape)
            for name, shape, piece in zip(self.names, self.shapes, torch.split(flat, list(self.numels)), strict=True)
        ]


def is_lazy(module: nn.Module) -> bool:
    """Whether a parameter of a module has no shape yet."""
    return any(isinstance(parameter, nn.UninitializedParameter) for parameter in module.parameters())


def flat_values(tensor: Tensor, name: str, shape: torch.Size) -> Tensor:
    """The real coordinates of a tensor or of its local shard, flat.

    Raises:
        ValueError: for a tensor that has not the shape of the parameter `name`.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name!r}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}.")
    values = local_part(tensor.detach()).to_dense()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    return values.reshape(-1)


def _any_match(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _require_own_memory(module: nn.Module) -> None:
    shared = overlapping({name: p for name, p in module.named_parameters() if p.requires_grad})
    if shared is not None:
        one, other = shared
        raise ValueError(
            f"module: expected parameters that are one object or have memory of their own, got {one!r} and {other!r} "
            "over one storage (tied by .data, or views of one buffer), so that a step of one moves the other; assign "
            "the parameter itself, as in `decoder.weight = encoder.weight`."
        )


def _require_matches(patterns: Sequence[str], names: Sequence[str], module: str) -> None:
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"params: expected None or a list of patterns such as ['head.*'], got {patterns!r}.")
    for pattern in patterns:
        if not _any_match(names, [pattern]):
            raise ValueError(
                f"params: expected patterns of parameter names, got one without a match; the pattern {pattern!r} "
                f"matches no trainable parameter of {module}; names: {list(names[:5])}."
            )
