"""Scores of attention: their bytes, and blocks where these are many.

Torch's math attention, the only one with a second derivative, keeps `KEPT` tensors of T x S scores a head in the graph
of a gradient, and a product makes `MADE` more for a while. A `TorchFunctionMode` counts them, and answers a call by
blocks (`attention.py`) where those of all calls in an evaluation do not fit in a `SHARE` of the free memory. What was
decided for calls of one size holds for a whole run: dropout masks must be the same at every evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_subspace._torch import is_transformed, undispatched
from lightning_subspace.loss.attention import AttentionCall
from lightning_subspace.loss.lasting_mode import LastingMode
from lightning_subspace.state.free_memory import free_memory

KEPT, KEPT_WITH_DROPOUT = 3, 5  # counted by autograd's hooks on saved tensors, in torch 2.14
MADE = 10  # at once, in the backward pass of one call: 9.5 by the resident set, of 4 heads at T = 2,048
SHARE = 0.5  # as for graphs that are kept; the rest of a graph and the solver need the other half
MANY = 48  # calls, where none was counted yet and a decision cannot be changed any more


class AttentionScores:
    """Scores along one run of a module.

    Attributes:
        calls: of attention in an evaluation; None: none has been seen yet, so that it is not known.
        nbytes: that scores of math attention keep in the graph of an evaluation: the largest since `begin`.
        avoided: that they would keep beyond it, of calls that blocks have answered.
        num_ranks: processes that share the memory.

    Example:
        >>> import torch
        >>> scores = AttentionScores()
        >>> q = torch.randn(2, 16, 8, requires_grad=True)
        >>> with scores.counted(), AttentionMode(scores):
        ...     _ = F.scaled_dot_product_attention(q, q, q)
        >>> scores.calls, scores.nbytes == 3 * 2 * 16 * 16 * 4, scores.avoided
        (1, True, 0)
    """

    def __init__(self) -> None:
        self.calls: int | None = None
        self.nbytes = self.avoided = 0
        self.num_ranks = 1
        self._decided: dict[tuple[Any, ...], bool] = {}
        self._now: list[int] | None = None  # of the evaluation at work: calls, bytes kept, bytes avoided

    def begin(self, num_ranks: int) -> None:
        """A context is opened, in which so many processes evaluate."""
        self.nbytes = self.avoided = 0
        self.num_ranks = num_ranks

    @contextmanager
    def counted(self) -> Iterator[None]:
        """An evaluation; what a checkpoint runs again later is none."""
        before, self._now = self._now, [0, 0, 0]
        try:
            yield
            calls, kept, avoided = self._now
            self.calls = max(self.calls or 0, calls)
            if kept + avoided > self.nbytes + self.avoided:
                self.nbytes, self.avoided = kept, avoided
        finally:
            self._now = before

    def are_in_blocks(self, call: AttentionCall) -> bool:
        """Whether a call is to be answered by blocks."""
        dropout, device = bool(call.options.dropout), call.q.device
        each = call.num_scores * call.q.dtype.itemsize
        kept = each * (KEPT_WITH_DROPOUT if dropout else KEPT)
        key = call.num_scores, call.q.dtype, dropout, device
        number = self._now[0] + 1 if self._now is not None else 1
        decided = self._decided.get(key)
        if decided is None:
            calls = max(self.calls or (MANY if dropout else 1), number)
            room = SHARE * free_memory(device) / (1 if device.type == "cuda" else self.num_ranks)
            decided = calls * kept + MADE * each > room
            if self.calls or dropout or decided:
                self._decided[key] = decided
        if self._now is not None:
            self._now[0] = number
            self._now[2 if decided else 1] += kept
        return decided

    @property
    def text(self) -> str:
        """What a forecast says about them; "" without attention."""
        parts = []
        if self.nbytes:
            parts.append(f"attention scores (T x T a head) are {self.nbytes / 1e6:.1f} MB of the largest graph")
        if self.avoided:
            parts.append(f"attention in blocks, since its scores (T x T a head) would be {self.avoided / 1e6:.1f} MB")
        return "".join(f"; {part}" for part in parts)


class AttentionMode(LastingMode):
    """Context in which calls of attention are counted, or answered by blocks.

    It must be on wherever the forward pass runs again, so also for the backward passes of activation checkpoints.

    Args:
        scores: of the module.
    """

    def __init__(self, scores: AttentionScores) -> None:
        super().__init__()
        self._scores = scores

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function of torch, or answer for attention."""
        if func is F.scaled_dot_product_attention and not is_transformed():
            call = AttentionCall.of(args, named)
            if call is not None and self._scores.are_in_blocks(call):
                return call.result()
        elif func is F.multi_head_attention_forward and all(map(_is_plain, (*args, *named.values()))):
            with self:  # it is written in Python, and would run without the mode
                return undispatched(func)(*args, **named)
        return func(*args, **named)


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter)
