"""Hessian by central differences of float64 gradients.

    H v = |v| (g(theta + eps u) - g(theta - eps u)) / (2 eps),    u = v / |v|,

in float64, whatever the solver computes in. A product needs no second derivative and the memory of a training step. The
gradient is taken by `backward()`, as in training. So the product is right also where double backward is not
implemented, refused (reentrant checkpoints) or silently wrong. Errors and limits: README.md, "What is exact".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_subspace.curvature.differences import DisplacedGradients
from lightning_subspace.curvature.widening import Widening
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.partition import Partition

# Lengths of the displacement. Rounding leaves about 1e-16 |g| / eps and truncation eps^2: little in float64; in float32
# no length would do. A step that crosses the kink of a ReLU is wrong by any amount, and with many examples even 1e-6
# crosses some. But it does so on one side only: the differences to both sides disagree, and the next step is tried.
STEPS = (3e-7, 3e-8, 3e-9)
# How far both may be apart, relative to H u, and by rounding of the gradients, relative to g.
SIDES_AGREE = 1e-5
GRADIENT_ROUNDING = 100 * torch.finfo(torch.float64).eps


class FiniteDifferenceHessian(DisplacedGradients):
    """The Hessian where double backward is not available.

    Args:
        loss: as for `BatchMean`, like `batches` and `partition`; its dtype has to be float64.
        dtype: of the vectors that come and go.

    Raises:
        ValueError: for an empty sample, or a `loss` of another dtype.

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> data = MicroBatch(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), weight=2.0, index=0)
        >>> fn = lambda m, x, i: m(x).square().mean()
        >>> with TrainingLoss(net, ParameterSpace.of(net), fn, dtype=torch.float64) as loss:
        ...     product = FiniteDifferenceHessian(loss, [data]).matvec(torch.ones(2))
        >>> product
        tensor([1., 4.])
    """

    def __init__(
        self,
        loss: TrainingLoss,
        batches: Sequence[MicroBatch],
        *,
        dtype: torch.dtype = torch.float32,
        partition: Partition | None = None,
    ) -> None:
        if loss.dtype != torch.float64:
            raise ValueError(f"loss: expected a TrainingLoss with dtype=torch.float64, got {loss.dtype}.")
        super().__init__(loss, batches, dtype=dtype, partition=partition)

    def matvec(self, v: Tensor) -> Tensor:  # (n,) -> (n,)
        """H v, from two gradients of every micro-batch, or more near kinks.

        One all-gather and a sum, and for each step tried two reduce-scatters and a sum.
        """
        wide = v.to(torch.float64)
        length, centre = self._norms(wide, self._centre())
        if not 0.0 < length < float("inf"):
            return torch.zeros_like(v, dtype=self.dtype) * length  # nan stays nan
        return self._slope(self._buffers.gather(wide), length, centre).mul_(length).to(self.dtype)

    def _gradient_of(self, batch: MicroBatch) -> Tensor:
        with Widening():  # type: ignore[no-untyped-call]  # one operation in float32 would make differences noise
            return super()._gradient_of(batch)

    def _slope(self, whole: Tensor, length: float, centre: float) -> Tensor:
        """This rank's part of H u; centre is |g|."""
        found = []
        for step in STEPS:
            plus, minus = (self._gradient_at(whole, sign * step / length) for sign in (1.0, -1.0))
            bend = (plus + minus).sub_(self._centre(), alpha=2.0).div_(step)
            slope = plus.sub_(minus).div_(2.0 * step)
            size, steepness = self._norms(bend, slope)
            found.append((size, slope))
            if not size > SIDES_AGREE * steepness + GRADIENT_ROUNDING * centre / step:  # also where it is nan
                break
        return min(found, key=lambda pair: pair[0])[1]
