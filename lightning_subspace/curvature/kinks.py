"""Operations whose derivative jumps, found while a loss is evaluated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_subspace._torch import DispatchMode

# By their names in torch.ops.aten without the underscore of an in-place one.
# fmt: off
KINKED = frozenset((
    "relu", "leaky_relu", "rrelu_with_noise", "_prelu_kernel", "hardtanh", "hardswish", "hardsigmoid", "hardshrink",
    "softshrink", "threshold", "abs", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "amax", "amin", "max",
    "min", "median", "sort", "topk", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
))
# fmt: on


class KinkObserver(DispatchMode):
    """Remember the operations whose derivative jumps.

    Attributes:
        kinks: their names.

    Example:
        >>> import torch
        >>> with KinkObserver() as observer:
        ...     _ = torch.ones(2).relu() + torch.ones(2).tanh()
        >>> observer.kinks
        {'relu'}
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinks: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation, and look at its name."""
        name = func.overloadpacket.__name__.removesuffix("_")
        if (
            func.namespace == "aten"
            and name in KINKED
            and any(
                isinstance(a, Tensor) and a.is_floating_point() and a.numel() > 1 for a in args
            )  # isfinite has an abs
        ):
            self.kinks.add(name)
        return func(*args, **(kwargs or {}))
