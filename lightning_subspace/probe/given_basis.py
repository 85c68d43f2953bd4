"""Space that a user gives, by a function or by batches.

A function returns rows that span it; of each batch it is the gradient of the loss.

Gradients of a retain set, or of earlier tasks, span what a step must not change to first order: with g_A the gradient
of their mean loss and u' orthogonal to all of them, g_A . u' = 0. Orthogonal gradient descent (Farajtabar, Azizan, Mott
and Li 2020, arXiv 1910.07104) takes the gradients of outputs; here they are those of the loss of each batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace._arguments import require_function, require_shape, wrong
from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.data.given import require_given_batches
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.measurements.sample_loss import SampleMean, known_losses
from lightning_subspace.parallel.bit_sums import bit_sum
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.probe.screening import Screening
from lightning_subspace.state.rng import preserved_random_state
from lightning_subspace.subspace.row_space import orthonormal_rows

Rows = Callable[[nn.Module], Tensor]  # module -> (m, n)

# What belongs to the search for eigenvectors, and to its examples.
OF_EIGENVECTORS = ("k", "which", "tol", "max_matvecs", "ncv", "verify", "curvature", "on_check_fail")
OF_THE_SAMPLE = ("sample", "gradient_sample", "resample", "batch_size")
# What belongs to the evaluation of batches: a function does that itself.
OF_BATCHES = ("read_timeout", "weight", "loss_fn", "mode", "dtype", "seed")


@dataclass(frozen=True)
class GivenSpace:
    """An orthonormal basis, with the gradient behind it.

    Attributes:
        basis: (r, n), orthonormal rows; under ranks this rank's columns.
        gradient: (n,), of the mean loss over the batches; None where a function gave the rows.
        loss: that mean loss; nan where a function gave the rows.
    """

    basis: Tensor
    gradient: Tensor | None = None
    loss: float = math.nan

    @property
    def metrics(self) -> dict[str, float]:
        """What to log: its dimension, and the loss if there is one."""
        rank = {"rank": float(len(self.basis))}
        return rank if self.gradient is None else {**rank, "loss": self.loss}


class GivenBasis:
    """Computes the space at the parameters of a module.

    Args:
        basis: a function from the module to rows, or batches.

    Raises:
        ValueError: for anything else, naming the argument.

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net = nn.Linear(2, 1, bias=False)
        >>> given = GivenBasis(lambda module: 2.0 * module.weight)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> given.space(CurvatureConfig(), net, Sample(given.sample), Partition.even(ParameterSpace.of(net))).basis
        tensor([[0.6000, 0.8000]])
    """

    def __init__(self, basis: Rows | Iterable[Any]) -> None:
        self.is_function = callable(basis) and not isinstance(basis, nn.Module | type)
        if self.is_function:
            require_function("basis", basis, ("module",))
        else:
            require_given_batches("basis", basis, "a function of the module, ")
        self._basis: Any = basis
        self._screening = Screening()

    @property
    def sample(self) -> Any:
        """The batches, as the sample of a run."""
        # A function has examples of its own: this micro-batch stands where a run has a sample, and is not evaluated.
        return (MicroBatch(None, 1.0, 0),) if self.is_function else self._basis

    def require_alone(self, arguments: Mapping[str, Any], owner: type) -> None:
        """Refuse other arguments that have no meaning beside it.

        Raises:
            ValueError: naming the first that has another value than its default.
        """  # noqa: DOC501  # `wrong` makes one
        names = {
            **dict.fromkeys(OF_EIGENVECTORS, "no eigenvectors are computed"),
            **dict.fromkeys(OF_THE_SAMPLE, "no examples of training are taken"),
            **(dict.fromkeys(OF_BATCHES, "the function evaluates nothing here") if self.is_function else {}),
        }
        for name, parameter in inspect.signature(owner).parameters.items():
            if name in names and not _is_same(arguments[name], parameter.default):
                shown = f"its default beside basis=, {parameter.default!r}"
                raise wrong(name, shown, arguments[name], f"{names[name]}, so leave it out")

    def require_fewer(self, sample: Sample, n: int) -> None:
        """Refuse as many batches as there are parameters.

        Raises:
            ValueError: naming both numbers.
        """  # noqa: DOC501  # `wrong` makes one
        if not self.is_function and len(sample.hessian) >= n:
            way_out = "that many gradients may span the whole space, so put more examples into each"
            raise wrong("basis", f"fewer batches than the {n} parameters", len(sample.hessian), way_out)

    def space(self, choice: CurvatureConfig, module: nn.Module, sample: Sample, partition: Partition) -> GivenSpace:
        """The space at the present parameters. A collective.

        Args:
            choice: how the loss of batches is evaluated.
            module: left unchanged; a function may change it, but for its gradients and the random generators.
            sample: made of `sample`.
            partition: how coordinates are dealt to ranks.

        Raises:
            LossError: when the loss of a batch cannot be evaluated.
            PeerError: when it went wrong on another rank.
            ValueError: for rows of a wrong shape, that are not finite, or that differ between ranks.
        """
        if self.is_function:
            with partition.ranks.agree():
                rows = partition.cut(self._rows(module, partition))
                return GivenSpace(orthonormal_rows(rows, partition.n, partition.ranks, name="basis"))
        cheap, ranks = replace(choice, omits_products=True), partition.ranks  # differentiated once

        def taken(left: Sample) -> GivenSpace:
            with cheap.loss(module, partition.space, ranks) as loss:
                operator = cheap.operator(loss, left, partition)
                self.require_fewer(left, partition.n)  # which training may have made fewer
                rows = torch.stack([gradient for _, gradient in operator.batch_gradients()])
                weights = torch.tensor([batch.weight for batch in left.hessian], dtype=torch.float64)
                mean = (weights / weights.sum()).to(rows) @ rows
                value = SampleMean.of(known_losses(loss, left, ranks), left.hessian).mean
            return GivenSpace(orthonormal_rows(rows, partition.n, ranks, name="basis"), mean, value)

        return self._screening.run(taken, sample, lambda: cheap.loss(module, partition.space, ranks), ranks)

    def _rows(self, module: nn.Module, partition: Partition) -> Tensor:  # (m, n) of all ranks
        """What the function returns, checked."""
        gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
        try:
            for parameter, _ in gradients:
                parameter.grad = None  # another backward pass would add to it
            with preserved_random_state(), torch.enable_grad():
                rows: Tensor = self._basis(module)
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
        require_shape("basis", rows, ["m", partition.n], "a row for each direction, as long as `params` together")
        like = partition.space.tensors(module)[0]
        rows = rows.detach().clone().to(like.device, partition.space.widest_dtype(module, torch.float32))
        if len(set(partition.ranks.all_gather_object((tuple(rows.shape), int(bit_sum(rows.contiguous())))))) > 1:
            raise ValueError(
                "basis: expected the same rows on every rank, got different ones; compute them from the same data, or "
                "broadcast the first rank's."
            )
        return rows


def _is_same(value: Any, default: Any) -> bool:
    """Whether a value is the default, without comparing tensors."""
    return value is default or (isinstance(value, int | float | str) and value == default)
