"""Gradient of the mean loss, where no product can be trusted.

The operator of `curvature="none"`, and what takes the place of another one where the self-check lets no product be
measured: gradients and values of the loss are, and what asks for a product is left out.
"""

from __future__ import annotations

from typing import ClassVar, NoReturn

from torch import Tensor

from lightning_subspace.curvature.batch_mean import BatchMean
from lightning_subspace.curvature.fsdp_difference import ShardedDifferenceHessian

NO_PRODUCTS = "products: expected an operator that has them, got curvature='none', or one whose self-check has failed."


class NoProductsError(RuntimeError):
    """A product was asked for where none can be trusted."""


class GradientMean(BatchMean):
    """An operator without products; arguments as `BatchMean`.

    The loss is best of order 1.

    Raises:
        LossError: when a loss cannot be evaluated (see `TrainingLoss`).
        ValueError: for an empty sample.

    Example:
        >>> import torch
        >>> from lightning_subspace.data.micro_batch import MicroBatch
        >>> from lightning_subspace.loss.training_loss import TrainingLoss
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> data = MicroBatch(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), weight=2.0, index=0)
        >>> with TrainingLoss(net, ParameterSpace.of(net), lambda m, x, i: m(x).mean(), order=1) as loss:
        ...     print(GradientMean(loss, [data]).gradient())
        tensor([0.5000, 1.0000])
    """

    has_products: ClassVar[bool] = False

    def matvec(self, v: Tensor) -> NoReturn:
        """Refuse a product.

        Raises:
            NoProductsError: always.
        """
        raise NoProductsError(NO_PRODUCTS)


class ShardedGradientMean(ShardedDifferenceHessian):
    """The same on the shards of FSDP2; arguments as `ShardedDifferenceHessian`."""

    has_products: ClassVar[bool] = False

    def matvec(self, v: Tensor, step: float = 0.0) -> NoReturn:
        """Refuse a product.

        Raises:
            NoProductsError: always.
        """
        raise NoProductsError(NO_PRODUCTS)
