"""Cross-entropy with derivatives in closed form, a few rows at a time.

With p = softmax(z) of the logits z of a token, weights q on its classes (target times class weight) and Q = sum q,

    l = Q log(sum exp z) - q . z,    dl = Q p - q,    d^2 l u = Q (p * u - p (p . u)).

For these z itself is enough: p is computed again, for `ENTRIES` numbers at a time. Torch's own graph keeps four more
tensors of the size of all logits, which for a language model are the largest there are. What a step makes of the losses
of its tokens (a mean, masks, a factor, or what is not linear) stays with autograd, so that it need not be recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_subspace._torch import is_transformed, node_class

# Logits in one piece: some tokens of a vocabulary of 50,000. Those of a CPU fit in its caches; a GPU wants large ones.
ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 24}
REDUCTIONS = frozenset({"mean", "sum", "none"})
NAMES = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


class Options(NamedTuple):
    """Arguments of a cross-entropy beside tensors."""

    ignore_index: int = -100
    smoothing: float = 0.0


def closed_cross_entropy(args: tuple[Any, ...], named: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """A call of `F.cross_entropy` as a function of its logits.

    Returns:
        None for a call that is left to torch: of tensors of a class of their own or of 16 bits, with a target or
        weights that need a gradient, inside of transforms, with the old words `size_average` and `reduce`, and every
        mistake.

    Example:
        >>> z, y = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([1, -100])
        >>> closed = closed_cross_entropy((z, y), {"reduction": "sum"})
        >>> closed(z).item() == F.cross_entropy(z, y, reduction="sum").item()
        True
    """
    given: dict[str, Any] = dict(zip(NAMES, args, strict=False)) | named
    if len(args) > len(NAMES) or not given.keys() <= set(NAMES) or is_transformed():
        return None
    z: Any = given.get("input")
    target: Any = given.get("target")
    weight: Any = given.get("weight")
    options = Options(given.get("ignore_index", -100), given.get("label_smoothing", 0.0))
    reduction = given.get("reduction", "mean")
    if given.get("size_average") is not None or given.get("reduce") is not None or reduction not in REDUCTIONS:
        return None
    if type(options.ignore_index) is not int or not _is_number_in_unit(options.smoothing):
        return None
    if not (_is_plain(z) and _is_plain(target) and (weight is None or _is_plain(weight))) or z.numel() == 0:
        return None
    if z.dtype not in (torch.float32, torch.float64) or not _fits(z, target, weight):
        return None

    def closed(logits: Tensor) -> Tensor:
        is_single = logits.dim() == 1
        rows, targets = (logits.unsqueeze(0), target.unsqueeze(0)) if is_single else (logits, target)
        losses: Tensor = CrossEntropy.apply(rows, targets, weight, options)
        if reduction == "none":
            return losses.squeeze(0) if is_single else losses
        return losses.sum() if reduction == "sum" else losses.sum() / _total(rows, targets, weight, options)

    return closed


class CrossEntropy(torch.autograd.Function):
    """The loss of each token, (N, ...), from (N, C, ...)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
        """The values, by torch's own function."""
        ctx.save_for_backward(z, target, weight)
        ctx.options = options
        losses = z.new_empty(z.shape[:1] + z.shape[2:])
        for logits, tokens in pieces(z):
            goal = target[logits] if target.is_floating_point() else target[tokens]
            losses[tokens] = F.cross_entropy(
                z[logits],
                goal,
                weight,
                ignore_index=options.ignore_index,
                reduction="none",
                label_smoothing=options.smoothing,
            )
        return losses

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, whose graph knows z and g alone."""
        z, target, weight = ctx.saved_tensors
        return CrossEntropySlope.apply(z, g, target, weight, ctx.options), None, None, None


class CrossEntropySlope(torch.autograd.Function):
    """g (Q p - q) by token, (N, C, ...)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, g: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
        """The values."""
        ctx.save_for_backward(z, g, target, weight)
        ctx.options = options
        slope = torch.empty_like(z)
        for logits, tokens in pieces(z):
            q = _weights(z[logits], target, weight, options, (logits, tokens))
            piece = torch.mul(z[logits].softmax(1), q.sum(1, keepdim=True), out=slope[logits])
            piece.sub_(q).mul_(g[tokens].unsqueeze(1))
        return slope

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        """The derivatives along u, towards z and g."""
        if torch.is_grad_enabled():  # no step can ask for it: between it and the logits is the cut of the operator
            raise RuntimeError("cross_entropy: expected at most two derivatives of its closed form, got a third.")
        z, g, target, weight = ctx.saved_tensors
        to_z, to_g = ctx.needs_input_grad[:2]
        by_z = torch.empty_like(z) if to_z else None
        by_g = torch.empty_like(g) if to_g else None
        for logits, tokens in pieces(z):
            p, along = z[logits].softmax(1), u[logits]
            mean = (p * along).sum(1, keepdim=True)
            mass = _mass(z[logits], target, weight, ctx.options, (logits, tokens))
            if by_z is not None:
                torch.sub(along, mean, out=by_z[logits]).mul_(p.mul_((g[tokens] * mass).unsqueeze(1)))
            if by_g is not None:
                q = _weights(z[logits], target, weight, ctx.options, (logits, tokens))
                by_g[tokens] = mass * mean.squeeze(1) - (q * along).sum(1)
        return by_z, by_g, None, None, None


# They hold all that they depend on as saved tensors, so that their graphs end where torch's own would.
NODES = (node_class(CrossEntropy), node_class(CrossEntropySlope))

Index = tuple[slice, ...]


def pieces(z: Tensor) -> list[tuple[Index, Index]]:
    """Indices of the logits and of the tokens of each piece.

    Logits are (N, C, ...), tokens (N, ...). They give views, whatever the layout: rows of the first dimension, or parts
    of a row along the third.
    """
    most, row, whole = ENTRIES.get(z.device.type, ENTRIES["cuda"]), z[0].numel(), slice(None)
    if z.dim() == 2 or row <= most:
        return [((rows,), (rows,)) for rows in _slices(len(z), most // row)]
    parts = _slices(z.shape[2], most * z.shape[2] // row)
    return [((rows, whole, part), (rows, part)) for rows in _slices(len(z), 1) for part in parts]


def _slices(length: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, start + step) for start in range(0, length, step)]


def _weights(z: Tensor, target: Tensor, weight: Tensor | None, options: Options, piece: tuple[Index, Index]) -> Tensor:
    """Q of a piece, (N, C, ...)."""
    each = options.smoothing / z.shape[1]
    if target.is_floating_point():
        q = target[piece[0]] * (1.0 - options.smoothing) + each
    else:
        goal, valid = _classes(target[piece[1]], options)
        q = torch.full_like(z, each).scatter_(1, goal.unsqueeze(1), each + 1.0 - options.smoothing)
        # The class weight of the target is that of its column, as for the others.
        q.mul_(valid.unsqueeze(1))
    return q if weight is None else q.mul_(_by_class(weight, z))


def _mass(z: Tensor, target: Tensor, weight: Tensor | None, options: Options, piece: tuple[Index, Index]) -> Tensor:
    """Q of a piece, (N, ...)."""
    if target.is_floating_point():
        return _weights(z, target, weight, options, piece).sum(1)
    goal, valid = _classes(target[piece[1]], options)
    if weight is None:
        return valid.to(z.dtype)
    return ((1.0 - options.smoothing) * weight[goal] + options.smoothing * weight.mean()) * valid


def _total(z: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor | float:
    """What a mean is divided by."""
    if target.is_floating_point():
        return z.numel() / z.shape[1]
    goal, valid = _classes(target, options)
    return valid.sum() if weight is None else (weight[goal] * valid).sum()


def _classes(target: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Classes (0 for what is ignored), and whether each counts."""
    valid = target != options.ignore_index
    return target.long().masked_fill(~valid, 0), valid


def _by_class(weight: Tensor, z: Tensor) -> Tensor:
    return weight.reshape(-1, *[1] * (z.dim() - 2))


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided


def _is_number_in_unit(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 <= value <= 1.0


def _fits(z: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether shapes, types and devices are such as torch takes."""
    axis = min(z.dim() - 1, 1)
    classes = z.shape[axis] if z.dim() else 0
    is_soft = target.shape == z.shape
    if not is_soft and target.shape != z.shape[:axis] + z.shape[axis + 1 :]:
        return False
    if target.dtype != (z.dtype if is_soft else torch.int64) or target.device != z.device or target.requires_grad:
        return False
    if weight is None:
        return True
    same = weight.dtype == z.dtype and weight.device == z.device and weight.shape == (classes,)
    return same and not weight.requires_grad
