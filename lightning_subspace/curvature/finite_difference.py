"""The Hessian of the mean training loss as a matrix-vector product, by central differences of its gradients.

    H v = |v| (g(theta + eps u) - g(theta - eps u)) / (2 eps),    u = v / |v|,

in float64, whatever the solver computes in. It needs no second derivative and the memory of a training step, and takes
the gradient by `backward()`, as training does: so it is right where double backward is not implemented, refused
(reentrant checkpoints) or silently wrong (functions that are differentiable once).

In float64 rounding leaves about 1e-16 |g| / eps, and truncation eps^2. In between lie the kinks of a ReLU network: a
step that crosses one is wrong by any amount, and with many examples even one of 1e-6 does now and then. It does on one
side only, so the differences forward and backward, both known once g(theta) is, then disagree: the product is taken
again with a smaller step. In float32 no eps is small enough: the error is of the size of H v.

Only where theta lies *on* kinks, such as zero biases under blank inputs at step 0, there is nothing to agree with; the
operator is then not symmetric, and the solver says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_subspace.curvature.gradient import backward_gradient
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.training_loss import MicroBatch, TrainingLoss

# Lengths of the displacement, tried in turn until the differences to both sides agree.
STEPS = (3e-7, 3e-8, 3e-9)
AGREEMENT = 1e-5
# What rounding can do to the sum of the gradients on both sides, relative to the gradient.
ROUNDING = 100 * torch.finfo(torch.float64).eps


class FiniteDifferenceHessian(Hessian):
    """The Hessian of the mean loss over `batches`, where it cannot be had by double backward.

    Args:
        loss: an open context with dtype float64; it must stay open as long as products are taken.
        batches: the fixed sample; weights need not be normalised.
        dtype: of the vectors that come and go.
        steps: lengths of the displacement in parameter space, falling.

    Raises:
        ValueError: for an empty sample, or when `loss` is not a float64 one.

    Example:
        >>> from lightning_subspace.parameters import ParameterSpace
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
        steps: Sequence[float] = STEPS,
    ) -> None:
        if loss.dtype != torch.float64:
            raise ValueError(f"loss: expected a TrainingLoss with dtype=torch.float64, got {loss.dtype}.")
        super().__init__(loss, batches, memory=0.0)
        self.dtype = dtype
        self._steps = tuple(steps)

    def gradient(self) -> Tensor:  # (n,)
        """Gradient of the mean loss over the sample."""
        return self._centre().to(self.dtype, copy=True)

    def matvec(
        self,
        v: Tensor,  # (n,)
    ) -> Tensor:  # (n,)
        """H v, from two gradients of every micro-batch, or more of them near a kink."""
        wide = v.to(torch.float64)
        length = float(wide.norm())
        if not 0.0 < length < float("inf"):
            return torch.zeros_like(v, dtype=self.dtype) * length  # nan stays nan
        unit = wide / length
        found = []
        for step in self._steps:
            slope, bend = self._differences(unit, step)
            found.append((bend, slope))
            if bend <= AGREEMENT * float(slope.norm()) + ROUNDING * float(self._centre().norm()) / step:
                break
        _, slope = min(found, key=lambda pair: pair[0])
        return slope.mul_(length).to(self.dtype)

    def _differences(self, unit: Tensor, step: float) -> tuple[Tensor, float]:
        """The central difference for one step, and how far those forward and backward are apart."""
        try:
            plus, minus = self._mean_at(step * unit, self.batches), self._mean_at(-step * unit, self.batches)
        finally:
            self._loss.displace(None)
        bend = float((plus + minus - 2.0 * self._centre()).norm()) / step
        return plus.sub_(minus).div_(2.0 * step), bend

    def _centre(self) -> Tensor:
        """g(theta), in float64."""
        if self._mean is None:
            self._mean = self._mean_at(None, self.batches)
        return self._mean

    def batch_gradients(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each micro-batch with the gradient of its own mean loss, (n,)."""
        for batch in self.batches:
            yield batch, self.mean_gradient([batch])

    def mean_gradient(self, batches: Iterable[MicroBatch]) -> Tensor:  # (n,)
        """Gradient of the mean loss over other micro-batches, taken once."""
        return self._mean_at(None, batches).to(self.dtype)

    def _retain(self, memory: float) -> None:
        """Keep nothing."""
        self._graphs = [None] * len(self.batches)

    def _mean_at(self, offset: Tensor | None, batches: Iterable[MicroBatch]) -> Tensor:
        """Gradient of the mean loss at theta + offset, in float64."""
        batches = list(batches)
        total = sum(batch.weight for batch in batches)
        mean = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        self._loss.displace(offset)
        for batch in batches:
            mean.add_(backward_gradient(self._loss, batch), alpha=batch.weight / total)
        return mean
