"""Attention in blocks of queries, differentiable, whose graph keeps no scores.

For queries q, keys k, values v, with scores S = s q k' + mask, P = softmax(S) by rows, and a dropout mask D,

    o = (D P) v;    along g:    dP = D (g v'),    dS = P (dP - sum P dP),
    towards q, k, v:    s dS k,    s dS' q,    (D P)' g.

Products without a sign are entry by entry where both factors are T x S, and sums are over keys. Differentiated once
more, along (a, b, c), with M = s (a k' + q b'), m = sum P M, U = P (M - m), W = M (dP - sum P dP) - m dP + D (g c') and
Z = P (W - sum P W):

    towards g, q, k, v:    (D U) v + (D P) c,    s (Z k + dS b),    s (Z' q + dS' a),    (D U)' g.

Torch's math attention keeps three to five tensors of T x S numbers a head for that. Here q, k and v are kept, and each
block of `ENTRIES` scores is computed again (Rabe and Staats 2021, arXiv 2112.05682, for the value and the gradient).
All is written in differentiable operations, so that a third derivative is right as well; it alone keeps scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_subspace._torch import is_asked_for, node_class

# Scores in one block: those of a CPU fit in its caches, a GPU wants large ones. Dropout masks are drawn by blocks, so
# that these must not depend on what is free.
ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 24}
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Options(NamedTuple):
    """What an attention is told beside tensors."""

    causal: bool
    scale: float
    dropout: float
    seed: int = 0  # of the dropout masks


class AttentionCall(NamedTuple):
    """A call of `scaled_dot_product_attention` that blocks can answer."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    options: Options

    @classmethod
    def of(cls, args: tuple[Any, ...], named: dict[str, Any]) -> AttentionCall | None:
        """The call, or None: it is left to torch, like mistakes.

        Left are tensors of 16 bits, on an autocast, or of a class of their own, masks that need a gradient, and leading
        dimensions that are to be broadcast.
        """
        given: dict[str, Any] = dict(zip(NAMES, args, strict=False)) | named
        if len(args) > len(NAMES) or not given.keys() <= set(NAMES):
            return None
        q: Any = given.get("query")
        k: Any = given.get("key")
        v: Any = given.get("value")
        mask, dropout, causal = given.get("attn_mask"), given.get("dropout_p", 0.0), given.get("is_causal", False)
        if not (_are_plain(q, k, v) and _is_mask(mask, q)) or (causal and mask is not None):
            return None
        if type(dropout) not in (int, float) or not 0.0 <= dropout < 1.0 or torch.is_autocast_enabled(q.device.type):
            return None
        if given.get("enable_gqa", False):
            if q.dim() < 3 or min(k.dim(), v.dim()) < 3 or q.shape[-3] % k.shape[-3] or q.shape[-3] % v.shape[-3]:
                return None
            k, v = (_repeated(t, q.shape[-3]) for t in (k, v))
        if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2] or k.shape[-2] != v.shape[-2] or q.shape[-1] != k.shape[-1]:
            return None
        if mask is not None and not _is_broadcast(mask.shape, (*q.shape[:-1], k.shape[-2])):
            return None
        scale = given.get("scale")
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        return cls(q, k, v, mask, Options(bool(causal), float(scale), float(dropout)))

    @property
    def num_scores(self) -> int:
        """T x S, of all heads."""
        return math.prod(self.q.shape[:-1]) * self.k.shape[-2]

    def result(self) -> Tensor:
        """What torch would return; with dropout, under masks of its own.

        Their seed is drawn from the global generator, whose state the loss sets for each evaluation.
        """
        options, mask = self.options, self.mask
        if options.dropout:
            options = options._replace(seed=int(torch.randint(2**62, (), device="cpu")))
        if mask is not None:
            mask = mask.expand(*self.q.shape[:-1], self.k.shape[-2])
        output: Tensor = Attention.apply(_inner(self.q), _inner(self.k), _inner(self.v), mask, options)
        return output


class Attention(torch.autograd.Function):
    """o, of q, k, v, a mask for each score, and options."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
        """The value."""
        ctx.save_for_backward(q, k, v, mask)
        ctx.options = options
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        for block in blocks(q, k, options):
            p, drop = block.probabilities(q, k, mask)
            output[block.rows] = drop(p) @ v[block.columns]
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, whose graph keeps g, q, k and v."""
        q, k, v, mask = ctx.saved_tensors
        return *AttentionGradient.apply(_inner(g), q, k, v, mask, ctx.options), None, None


class AttentionGradient(torch.autograd.Function):
    """The derivatives along g, towards q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options
    ) -> tuple[Tensor, ...]:
        """The values."""
        ctx.save_for_backward(g, q, k, v, mask)
        ctx.options = options
        by_q, by_k, by_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in blocks(q, k, options):
            rows, columns = block.rows, block.columns
            p, drop = block.probabilities(q, k, mask)
            slope = drop(g[rows] @ v[columns].mT)
            slope = p * (slope - (p * slope).sum(-1, keepdim=True)) * options.scale
            by_q[rows] = slope @ k[columns]
            by_k[columns] += slope.mT @ q[rows]
            by_v[columns] += drop(p).mT @ g[rows]
        return by_q, by_k, by_v

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        """The derivatives along (a, b, c), towards g, q, k and v."""
        g, q, k, v, mask = ctx.saved_tensors
        whole_a, whole_b, whole_c = directions
        scale = ctx.options.scale
        by_g, by_q, by_k, by_v = (torch.zeros_like(t) for t in (g, q, k, v))
        # The Gauss-Newton matrix asks for the derivative towards g alone.
        to_others = any(node is not None and is_asked_for(node) for node, _ in ctx.next_functions[1:4])
        for block in blocks(q, k, ctx.options):
            rows, columns = block.rows, block.columns
            g_, q_, a, k_, v_, b, c = g[rows], q[rows], whole_a[rows], *(t[columns] for t in (k, v, whole_b, whole_c))
            p, drop = block.probabilities(q, k, mask)
            m = scale * (a @ k_.mT + q_ @ b.mT)
            mean = (p * m).sum(-1, keepdim=True)
            u = drop(p * (m - mean))
            by_g[rows] = u @ v_ + drop(p) @ c
            if not to_others:
                continue
            slope = drop(g_ @ v_.mT)
            centred = slope - (p * slope).sum(-1, keepdim=True)
            w = m * centred - mean * slope + drop(g_ @ c.mT)
            z = p * (w - (p * w).sum(-1, keepdim=True))
            along = p * centred
            by_q[rows] = scale * (z @ k_ + along @ b)
            by_k[columns] += scale * (z.mT @ q_ + along.mT @ a)
            by_v[columns] += u.mT @ g_
        return by_g, by_q, by_k, by_v, None, None


# They hold all that they depend on as saved tensors, so that their graphs end where torch's own would.
NODES = (node_class(Attention), node_class(AttentionGradient))


class Block(NamedTuple):
    """Some queries, with all keys that they see."""

    rows: tuple[Any, ...]  # index of what has a row a query: q, o, g
    columns: tuple[Any, ...]  # index of what has a row a key: k, v
    first: int  # query
    options: Options
    seed: int

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """P of the block, and what drops out entries of its size."""
        scores = (q[self.rows] * self.options.scale) @ k[self.columns].mT
        if self.options.causal:
            queries = torch.arange(self.first, self.first + scores.shape[-2], device=q.device)
            hidden = queries.unsqueeze(1) < torch.arange(scores.shape[-1], device=q.device)
            p = scores.masked_fill(hidden, -math.inf).softmax(-1)
        elif mask is None:
            p = scores.softmax(-1)
        else:
            part = mask[self.rows]
            scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part
            blind = (scores == -math.inf).all(-1, keepdim=True)  # a query that sees no key gets zeros, as from torch
            p = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        if not self.options.dropout:
            return p, lambda entries: entries
        generator = torch.Generator(q.device).manual_seed(self.seed)
        rest = 1.0 - self.options.dropout
        factors = torch.empty_like(p, requires_grad=False).bernoulli_(rest, generator=generator).div_(rest)
        return p, lambda entries: entries * factors


def blocks(q: Tensor, k: Tensor, options: Options) -> list[Block]:
    """All blocks, the same ones for every derivative."""
    length, keys, whole = q.shape[-2], k.shape[-2], slice(None)
    leading = [(slice(number, number + 1),) for number in range(len(q))] if q.dim() > 3 else [()]
    row = math.prod(q.shape[1 if q.dim() > 3 else 0 : -2]) * keys
    step = max(1, ENTRIES.get(q.device.type, ENTRIES["cuda"]) // max(1, row))
    found: list[Block] = []
    for lead in leading:
        for first in range(0, length, step):
            last = min(first + step, length)
            seen = slice(0, min(last, keys)) if options.causal else whole  # the others have the probability 0
            rows, columns = (*lead, ..., slice(first, last), whole), (*lead, ..., seen, whole)
            found.append(Block(rows, columns, first, options, (options.seed + len(found)) % 2**63))
    return found


def _inner(tensor: Tensor) -> Tensor:
    """A view of a leaf: its node, unlike a leaf's, suits `is_asked_for`."""
    return tensor.view_as(tensor) if tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled() else tensor


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """Heads of keys or values, one for each of the queries."""
    return tensor.repeat_interleave(heads // tensor.shape[-3], -3)


def _are_plain(*tensors: Any) -> bool:
    """Whether tensors are torch's own, of one type and device."""
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and t.dim() >= 2 for t in tensors)
        and len({(t.dtype, t.device) for t in tensors}) == 1
        and tensors[0].dtype in (torch.float32, torch.float64)
        and all(t.numel() for t in tensors)
    )


def _is_mask(mask: Any, q: Tensor) -> bool:
    """Whether a mask is none, or one without a gradient."""
    if mask is None:
        return True
    is_own = type(mask) in (Tensor, nn.Parameter) and mask.layout is torch.strided and not mask.requires_grad
    return is_own and mask.dtype in (torch.bool, q.dtype) and mask.device == q.device and mask.dim() <= q.dim()


def _is_broadcast(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(to), strict=False))
