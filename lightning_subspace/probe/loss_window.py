"""Training's last losses, kept without a wait for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_subspace.parallel.ranks import Ranks


class LossWindow:
    """The losses that a training loop returned for its last batches.

    They stay on their device until they are read, all at once: the host waits for the device then, and at no step.

    Args:
        length: how many are kept.

    Attributes:
        seen: number of batches so far, with a loss or without.

    Example:
        >>> window = LossWindow(2)
        >>> for value in (3.0, 2.0, 1.0):
        ...     window.add({"loss": torch.tensor(value)})
        >>> window.seen, window.read(Ranks())
        (3, [2.0, 1.0])
    """

    def __init__(self, length: int) -> None:
        self.seen = 0
        self._losses: deque[tuple[Tensor | None, float]] = deque(maxlen=length)  # and their factors

    def add(self, outputs: Any, scale: float = 1.0) -> None:
        """Keep the loss in what Lightning passes on of a training step.

        Args:
            outputs: a tensor or a mapping with one as "loss"; anything else is a batch without a loss.
            scale: a factor; Lightning divides by the number of accumulated batches.
        """
        loss: Any = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        is_scalar = isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()
        self._losses.append((loss.detach().reshape(()) if is_scalar else None, scale))
        self.seen += 1

    def read(self, ranks: Ranks) -> list[float]:
        """The losses, oldest first, each the mean over ranks; a collective.

        A batch without a finite loss on any rank is nan.
        """
        held = [loss for loss, _ in self._losses if loss is not None]
        values = iter(torch.stack(held).tolist() if held else ())
        own = [math.nan if loss is None else next(values) * scale for loss, scale in self._losses]
        return [_mean(together) for together in zip(*ranks.all_gather_object(own), strict=True)]

    def clear(self) -> None:
        """Forget all."""
        self.seen = 0
        self._losses.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tensors of a run behind."""
        return {**vars(self), "seen": 0, "_losses": deque(maxlen=self._losses.maxlen)}


def _mean(values: tuple[float, ...]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
