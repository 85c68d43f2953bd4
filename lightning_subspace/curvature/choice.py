"""Which derivatives a run is measured with, in which precision, and what the self-check changes about it.

    "hessian"            double backward: exact, one retained graph a micro-batch
    "ggn"                the generalised Gauss-Newton matrix, one retained graph a micro-batch; see `gauss_newton.py`
    "finite-difference"  needs no second derivative: forward differences of float32 gradients where the self-check finds
                         the loss smooth, which is the cheapest of all, and central ones of float64 gradients elsewhere

A run begins as its user asked. Where an operation has no second derivative, it goes on with differences by itself;
where the second derivatives are wrong, `on_check_fail` decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_subspace.collectives import Ranks
from lightning_subspace.curvature.finite_difference import FiniteDifferenceHessian
from lightning_subspace.curvature.forward_difference import ForwardDifferenceHessian, smoothness_check
from lightning_subspace.curvature.gauss_newton import GaussNewton, gauss_newton_check
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.curvature.operator import Operator
from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck, self_check
from lightning_subspace.curvature.sharded_difference import ShardedDifferenceHessian, check_differences
from lightning_subspace.loss_function import LossError, LossFunction
from lightning_subspace.micro_batch import MicroBatch, few_examples
from lightning_subspace.parameters import ParameterSpace
from lightning_subspace.partition import Partition
from lightning_subspace.sample import Sample
from lightning_subspace.sharded import fsdp_modules, refusal_of_differences, stand_ins
from lightning_subspace.sharded_loss import ShardedLoss
from lightning_subspace.training_loss import Mode, TrainingLoss

Precision = Literal["float32", "float64", "native"]
Curvature = Literal["hessian", "ggn", "finite-difference"]
OnCheckFail = Literal["warn", "raise", "finite-difference"]

# Examples in the float64 self-check: the code path is the same for eight as for a thousand.
CHECKED_EXAMPLES = 8
# For kinks it takes more of them: among 64 the networks of ReLU that were tried met some in every direction.
EXAMPLES_WITH_KINKS = 64
# Two evaluations agree to the bit on a CPU; kernels of an accelerator may sum in another order.
REPEATED = 1e-5
DIFFERENCES = "This run is measured with finite differences of float64 gradients instead."


class CheckError(RuntimeError):
    """The second derivatives of the model are wrong, and `on_check_fail="raise"` asked to be told so."""


@dataclass(frozen=True)
class Choice:
    """How the loss is evaluated and differentiated.

    Attributes:
        loss_fn: see `TrainingLoss`.
        mode: see `TrainingLoss`.
        seed: see `TrainingLoss`.
        dtype: "float32" (at least; wider parameters keep their type), "float64", "native" (the loss as it is trained),
            or a `torch.dtype`.
        curvature: "hessian", "ggn" or "finite-difference".
        on_check_fail: "warn" and go on, "raise" `CheckError`, or "finite-difference".
        is_smooth: whether the self-check has found that forward differences will do.

    Raises:
        ValueError: for anything else, and for finite differences of the "native" loss, which are rounding alone.
    """

    loss_fn: LossFunction | None = None
    mode: Mode = "train"
    seed: int = 0
    dtype: str | torch.dtype = "float32"
    curvature: str = "hessian"
    on_check_fail: str = "warn"
    is_smooth: bool = False

    def __post_init__(self) -> None:
        for name in ("curvature", "on_check_fail"):
            object.__setattr__(self, name, getattr(self, name).replace("_", "-"))
        _check("mode", self.mode, get_args(Mode))
        _check("curvature", self.curvature, get_args(Curvature))
        _check("on_check_fail", self.on_check_fail, get_args(OnCheckFail))
        if self.dtype not in (torch.float32, torch.float64):
            _check("dtype", self.dtype, get_args(Precision))
        if self.dtype == "native" and self.curvature == "finite-difference":
            raise ValueError(
                "dtype: finite differences are taken in float64, since in a narrower type they are rounding alone; "
                "expected 'float32' or 'float64' (for the solver) with curvature='finite-difference', got 'native'."
            )

    def loss(self, module: nn.Module, space: ParameterSpace, ranks: Ranks | None = None) -> TrainingLoss:
        """The loss to be opened for a probe. A collective."""
        ranks = Ranks() if ranks is None else ranks
        if self._is_on_shards(module):
            buffers = stand_ins(module, ranks, whole=False)
            return ShardedLoss(
                module, space, self.loss_fn, mode=self.mode, seed=self.seed, stand_ins=buffers, ranks=ranks
            )
        if self.is_smooth:
            return self._loss(module, space, ranks, self._narrowest, order=1)
        is_wide = self.curvature == "finite-difference"
        return self._loss(module, space, ranks, torch.float64 if is_wide else self._narrowest)

    def operator(self, loss: TrainingLoss, sample: Sample, partition: Partition | None = None) -> Operator:
        """The operator over the sample's first part, at an open loss; of this process alone without a `partition`."""
        partition = Partition.even(loss.space) if partition is None else partition
        if isinstance(loss, ShardedLoss):
            return ShardedDifferenceHessian(loss, sample.hessian, partition)
        if self.curvature == "hessian":
            return exact_hessian(loss, sample, partition)
        if self.curvature == "ggn":
            return GaussNewton(loss, sample.hessian, partition=partition)
        if self.is_smooth:
            return ForwardDifferenceHessian(loss, sample.hessian, partition=partition)
        widest = loss.space.widest_dtype(loss.module, self._narrowest or torch.float32)
        return FiniteDifferenceHessian(loss, sample.hessian, dtype=widest, partition=partition)

    def check(self, module: nn.Module, sample: Sample, partition: Partition | None = None) -> SelfCheck:
        """The self-check on a few examples of the sample; on the whole batch where it cannot be cut.

        Every rank checks the first rank's batch, and the first rank's result counts.

        Args:
            module: as it is at the first probe.
            sample: its first micro-batch is looked at.
            partition: of the parameter space; None: all parameters, this process alone.

        Raises:
            LossError: when the loss cannot be evaluated, or gives two values for one batch; when differences on the
                shards of FSDP2 are not right for this loss.
        """
        partition = Partition.even(ParameterSpace.of(module)) if partition is None else partition
        if self._is_on_shards(module):
            return self._check_on_shards(module, sample, partition)
        first, whole = partition.ranks.first, sample.hessian[0]
        kinks = self.curvature == "finite-difference"
        few = few_examples(whole, EXAMPLES_WITH_KINKS if kinks else CHECKED_EXAMPLES)
        few_is_part = few is not whole
        few = first(few)
        result = first(self._compare(module, few, partition))
        if result.outcome is CheckOutcome.INCONCLUSIVE and first(few_is_part):
            result = first(self._compare(module, first(whole), partition))
        self._evaluate_twice(module, few, partition)
        return result

    def _compare(self, module: nn.Module, batch: MicroBatch, partition: Partition) -> SelfCheck:
        order: Literal[1, 2] = 1 if self.curvature == "finite-difference" else 2
        wide = self._loss(module, partition.space, partition.ranks, torch.float64, order=order)
        if self.curvature == "ggn":
            return gauss_newton_check(wide, batch, seed=self.seed)
        if self.curvature == "hessian":
            return self_check(wide, batch, seed=self.seed)
        if partition.space.widest_dtype(module, self._narrowest or torch.float32) != torch.float32:
            return SelfCheck(CheckOutcome.SKIPPED, float("nan"), "", "differences of float64 gradients need none")
        return smoothness_check(wide, batch, seed=self.seed)

    def _evaluate_twice(self, module: nn.Module, batch: MicroBatch, partition: Partition) -> None:
        with self.loss(module, partition.space, partition.ranks) as loss:
            values = [loss(batch).value.item() for _ in range(2)]
        if abs(values[0] - values[1]) > REPEATED * max(map(abs, values)):
            raise LossError(
                f"the loss is not a function: two evaluations of one batch gave {values[0]} and {values[1]}, so it "
                "depends on something outside of the module, perhaps a random generator; pass loss_fn=, a loss without."
            )

    def _check_on_shards(self, module: nn.Module, sample: Sample, partition: Partition) -> SelfCheck:
        """Differences are all there is: where they are wrong nothing is measured."""
        with self.loss(module, partition.space, partition.ranks) as loss:
            assert isinstance(loss, ShardedLoss)
            operator = ShardedDifferenceHessian(loss, sample.hessian[: partition.ranks.count], partition)
            result = check_differences(operator, partition.random(self.seed, 0).to(loss.device))
        if result.outcome is CheckOutcome.FAILED:
            raise LossError(result.reason)
        return result

    def after(self, check: SelfCheck) -> tuple[Choice, str | None]:
        """What to go on with after the self-check, and what to tell the user about it, once.

        Raises:
            CheckError: when the check has failed, with `on_check_fail="raise"`.
        """
        if check.outcome not in (CheckOutcome.FAILED, CheckOutcome.UNAVAILABLE):
            is_smooth = self.curvature == "finite-difference" and check.outcome is CheckOutcome.PASSED
            return replace(self, is_smooth=is_smooth), None
        if self.curvature == "ggn":  # differences would measure another matrix
            raise CheckError(f"{check.outcome.value} Measured: {check.reason.rstrip('.')}. Pass curvature='hessian'.")
        text = f"{check.outcome.value} Measured: {check.reason.rstrip('.')}."
        if check.outcome is CheckOutcome.FAILED and self.on_check_fail == "raise":
            raise CheckError(f"{text} (on_check_fail='finite-difference' measures without second derivatives.)")
        if check.outcome is CheckOutcome.FAILED and self.on_check_fail == "warn" and check.error < float("inf"):
            return self, f"{text} on_check_fail='finite-difference' measures without second derivatives."
        dtype = "float32" if self.dtype == "native" else self.dtype
        return replace(self, curvature="finite-difference", dtype=dtype), f"{text} {DIFFERENCES}"

    @property
    def _narrowest(self) -> torch.dtype | None:
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        return {"float32": torch.float32, "float64": torch.float64}.get(self.dtype)

    def require_no_obstacle(self, module: nn.Module) -> None:
        """Whether a module that FSDP2 has sharded can be measured in this way.

        Raises:
            ValueError: for finite differences on shards whose gradients are narrower than float32.
        """
        if self._is_on_shards(module) and (refusal := refusal_of_differences(module)) is not None:
            raise ValueError(refusal)

    def _is_on_shards(self, module: nn.Module) -> bool:
        """Whether FSDP2 takes the gradients, on its shards."""
        return self.curvature == "finite-difference" and bool(fsdp_modules(module))

    def _loss(
        self,
        module: nn.Module,
        space: ParameterSpace,
        ranks: Ranks,
        dtype: torch.dtype | None,
        order: Literal[1, 2] = 2,
    ) -> TrainingLoss:
        return TrainingLoss(
            module,
            space,
            self.loss_fn,
            mode=self.mode,
            dtype=dtype,
            seed=self.seed,
            order=order,
            stand_ins=stand_ins(module, ranks, narrowest=dtype),
        )


def exact_hessian(loss: TrainingLoss, sample: Sample, partition: Partition) -> Hessian:
    """The Hessian over the sample's first part, at an open loss, by double backward."""
    return Hessian(loss, sample.hessian, partition=partition)


def _check(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.")
