"""Gradient of the mean loss, where no product can be trusted.

It takes the place of an operator with `on_check_fail="omit"`: gradients and values of the loss are measured, and what
asks for a product is left out.
"""

from __future__ import annotations

from typing import ClassVar, NoReturn

from torch import Tensor

from lightning_subspace.curvature.batch_mean import BatchMean


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
        raise NoProductsError("the self-check has failed, and on_check_fail='omit' leaves out what needs a product.")
