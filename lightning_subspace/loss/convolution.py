"""Convolutions whose second derivatives use the kernels of the first.

A convolution C(x, w) is linear in x and in w. With D its derivative towards x and W the one towards w,

    <g, C(x, w)> = <D(g, w), x> = <W(x, g), w>,

the gradient (D(g, w), W(x, g), sum g) has, along (dx, dw, db), the derivatives

    towards g: C(dx, w) + C(x, dw) + db,    towards x: D(g, dw),    towards w: W(dx, g):

C, D and W again, of the same sizes. Torch's own formula takes the last one by a convolution whose kernel is as large as
the image, for which a GPU has no fast code. `torch.autograd.Function` is used for both levels, and calls itself in
higher ones. Torch's own code stays where there is nothing to gain or to get wrong: on other devices (`DEVICES`), with
complex numbers and classes of tensors of others, and inside of `torch.func` and forward-mode derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_subspace._torch import is_asked_for, is_transformed, node_class
from lightning_subspace.loss.lasting_mode import LastingMode

DEVICES = frozenset({"cuda"})  # whose kernels for large images in the place of weights are slow
PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
# The functions that are replaced: the order of their arguments, and the number of spatial dimensions.
SIGNATURES: dict[Callable[..., Any], tuple[tuple[str, ...], int]] = {
    F.conv1d: (PLAIN, 1),
    F.conv2d: (PLAIN, 2),
    F.conv3d: (PLAIN, 3),
    F.conv_transpose1d: (TRANSPOSED, 1),
    F.conv_transpose2d: (TRANSPOSED, 2),
    F.conv_transpose3d: (TRANSPOSED, 3),
}
aten: Any = torch.ops.aten


def regular_convolutions(device: torch.device) -> AbstractContextManager[object]:
    """The context for what is differentiated twice on a device."""
    return RegularConvolutions() if device.type in DEVICES else nullcontext()


class RegularConvolutions(LastingMode):
    """Context in which convolutions on `DEVICES` have these second derivatives.

    It must be on wherever the forward pass runs again, so also for the backward passes of activation checkpoints.
    """

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function of torch, or the replacement of a convolution."""
        if func in SIGNATURES and not is_transformed() and (call := _Call.of(func, args, named)) is not None:
            return call.result()
        return func(*args, **named)


class Geometry(NamedTuple):
    """What tells convolutions of the same tensors apart, in ATen's order."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def convolution(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """C(x, w) + bias, of a batch."""
    x, w, bias = _cast(x), _cast(w), None if bias is None else _cast(bias)
    if is_transformed():
        return aten.convolution(x, w, bias, *geometry)  # type: ignore[no-any-return]
    y: Tensor = Convolution.apply(_inner(x), _inner(w), None if bias is None else _inner(bias), geometry)
    return y


def gradients(
    g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """D(g, w), W(x, g) and the sum of g, as masked."""
    if is_transformed():
        return _gradients(g, x, w, geometry, mask)
    by_x, by_w, by_bias = ConvolutionGradient.apply(_inner(g), _inner(x), _inner(w), geometry, mask)
    return by_x, by_w, by_bias


class Convolution(torch.autograd.Function):
    """C(x, w) + bias; arguments as `convolution`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """The value, by the kernel that torch takes itself."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return aten.convolution(x, w, bias, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients that are asked for."""
        if g is None:
            return (None,) * 4
        x, w = ctx.saved_tensors
        return *gradients(g, x, w, ctx.geometry, _asked(ctx)), None


class ConvolutionGradient(torch.autograd.Function):
    """The gradients of a convolution; arguments as `gradients`."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """The values, by the kernels that torch takes itself."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        return _gradients(g, x, w, geometry, mask)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> tuple[Tensor | None, ...]:
        """The derivatives along (dx, dw, db), towards g, x and w."""
        g, x, w = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        to_g, to_x, to_w = _asked(ctx)
        by_g = by_x = by_w = None
        if to_g:
            terms = [] if dx is None else [convolution(dx, w, None, geometry)]
            if dw is not None:
                terms.append(convolution(x, dw, db, geometry))  # the kernel adds db at no cost
            elif db is not None:
                terms.append(db.reshape(-1, *[1] * (g.dim() - 2)).expand_as(g))
            by_g = sum(terms[1:], terms[0]) if terms else None
        if to_x and dw is not None:
            by_x, _, _ = gradients(g, x, dw, geometry, (True, False, False))
        if to_w and dx is not None:
            _, by_w, _ = gradients(g, dx, w, geometry, (False, True, False))
        return by_g, by_x, by_w, None, None


# Their graphs end where one of torch's own would: what they depend on is saved for backward and nowhere else.
NODES = (node_class(Convolution), node_class(ConvolutionGradient))


class _Call(NamedTuple):
    """A call of a convolution that can be replaced."""

    input: Tensor  # with or without a batch
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    after: tuple[int, ...]  # what padding="same" adds behind the image, beyond what it adds on both sides

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> _Call | None:
        """The call, or None: it is left to torch, like mistakes."""
        names, dims = SIGNATURES[func]
        given = dict(zip(names, args, strict=False)) | named
        x: Any = given.get("input")
        w: Any = given.get("weight")
        bias: Any = given.get("bias")
        if len(args) > len(names) or not given.keys() <= set(names) or not _is_replaced(x, w, bias):
            return None
        if x.dim() not in (dims + 1, dims + 2) or w.dim() != dims + 2:
            return None
        stride = _sizes(given.get("stride", 1), dims)
        dilation = _sizes(given.get("dilation", 1), dims)
        output_padding = _sizes(given.get("output_padding", 0), dims)
        groups, padding, after = given.get("groups", 1), given.get("padding", 0), (0,) * dims
        if names is PLAIN and padding == "valid":
            padding = 0
        elif names is PLAIN and padding == "same" and stride == (1,) * dims and dilation is not None:
            around = [d * (size - 1) for d, size in zip(dilation, w.shape[2:], strict=True)]
            padding, after = [total // 2 for total in around], tuple(total % 2 for total in around)
        padding = _sizes(padding, dims)
        if stride is None or dilation is None or output_padding is None or padding is None or type(groups) is not int:
            return None
        geometry = Geometry(stride, padding, dilation, names is TRANSPOSED, output_padding, groups)
        return cls(x, w, bias, geometry, after)

    def result(self) -> Tensor:
        """What torch would return."""
        is_batch = self.input.dim() == self.weight.dim()
        x = _cast(self.input if is_batch else self.input.unsqueeze(0))
        if any(self.after):
            x = F.pad(x, [side for width in reversed(self.after) for side in (0, width)])
        result = convolution(x, self.weight, self.bias, self.geometry)
        return result if is_batch else result.squeeze(0)


def _gradients(
    g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    channels = w.shape[1] * geometry.groups if geometry.transposed else w.shape[0]
    return aten.convolution_backward(g, x, w, [channels] if mask[2] else None, *geometry, mask)  # type: ignore[no-any-return]


def _is_replaced(x: Any, w: Any, bias: Any) -> bool:
    """Whether tensors are plain and real, and need a gradient."""
    tensors = [x, w] if bias is None else [x, w, bias]
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in tensors)
        and all(t.device.type in DEVICES and t.is_floating_point() for t in tensors)
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
    )


def _sizes(value: Any, dims: int) -> tuple[int, ...] | None:
    """One number a dimension, or None for what only torch can read."""
    values = (value,) if type(value) is int else tuple(value) if isinstance(value, list | tuple) else ()
    if not all(type(v) is int for v in values) or len(values) not in (1, dims):
        return None
    return values * dims if len(values) == 1 else values


def _cast(tensor: Tensor) -> Tensor:
    """What autocast, where on, makes of an argument."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _inner(tensor: Tensor) -> Tensor:
    """A view of a leaf: its node, unlike a leaf's, suits `is_asked_for`."""
    return tensor.view_as(tensor) if tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled() else tensor


def _asked(ctx: Any) -> tuple[bool, bool, bool]:
    """Which of the first three arguments are asked a gradient for."""
    asked = [node is not None and is_asked_for(node) for node, _ in ctx.next_functions]
    return (*asked, False)[:3]  # type: ignore[return-value]
