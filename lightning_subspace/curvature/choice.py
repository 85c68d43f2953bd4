"""Which derivatives a run is measured with, in which precision, and what the self-check changes about it.

    "hessian"            double backward: exact, one retained graph a micro-batch
    "finite-difference"  differences of float64 gradients: needs no second derivative, takes about twice as long

A run begins as its user asked. Where an operation has no second derivative, it goes on with differences by itself;
where the second derivatives are wrong, `on_check_fail` decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_subspace.curvature.finite_difference import FiniteDifferenceHessian
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck, self_check
from lightning_subspace.parameters import ParameterSpace
from lightning_subspace.sample import Sample, few_examples
from lightning_subspace.training_loss import LossError, LossFunction, Mode, TrainingLoss

Precision = Literal["float32", "float64", "native"]
Curvature = Literal["hessian", "finite-difference"]
OnCheckFail = Literal["warn", "raise", "finite-difference"]

# Examples in the float64 self-check: the code path is the same for eight as for a thousand.
CHECKED_EXAMPLES = 8
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
        curvature: "hessian" or "finite-difference".
        on_check_fail: "warn" and go on, "raise" `CheckError`, or "finite-difference".

    Raises:
        ValueError: for anything else, and for finite differences of the "native" loss, which are rounding alone.
    """

    loss_fn: LossFunction | None = None
    mode: Mode = "train"
    seed: int = 0
    dtype: str | torch.dtype = "float32"
    curvature: str = "hessian"
    on_check_fail: str = "warn"

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

    def loss(self, module: nn.Module, space: ParameterSpace) -> TrainingLoss:
        """The loss to be opened for a probe."""
        is_wide = self.curvature == "finite-difference"
        return self._loss(module, space, torch.float64 if is_wide else self._narrowest)

    def operator(self, loss: TrainingLoss, sample: Sample) -> Hessian:
        """The Hessian over the sample's first part, at an open loss."""
        if self.curvature == "hessian":
            return Hessian(loss, sample.hessian)
        widest = loss.space.widest_dtype(loss.module, self._narrowest or torch.float32)
        return FiniteDifferenceHessian(loss, sample.hessian, dtype=widest)

    def check(self, module: nn.Module, space: ParameterSpace, sample: Sample) -> SelfCheck:
        """The self-check on a few examples of the sample; on the whole batch where it cannot be cut.

        Raises:
            LossError: when the loss cannot be evaluated, or gives two values for one batch.
        """
        result = self._compare(module, space, sample)
        self._evaluate_twice(module, space, sample)
        return result

    def _compare(self, module: nn.Module, space: ParameterSpace, sample: Sample) -> SelfCheck:
        if self.curvature == "finite-difference":
            return SelfCheck(CheckOutcome.SKIPPED, float("nan"), "", "there is no product to compare")
        check = partial(self_check, self._loss(module, space, torch.float64), seed=self.seed)
        few = few_examples(sample.hessian[0], CHECKED_EXAMPLES)
        result = check(few)
        if result.outcome is CheckOutcome.INCONCLUSIVE and few is not sample.hessian[0]:
            result = check(sample.hessian[0])
        return result

    def _evaluate_twice(self, module: nn.Module, space: ParameterSpace, sample: Sample) -> None:
        with self.loss(module, space) as loss:
            values = [loss(sample.hessian[0]).value.item() for _ in range(2)]
        if abs(values[0] - values[1]) > REPEATED * max(map(abs, values)):
            raise LossError(
                f"the loss is not a function: two evaluations of one batch gave {values[0]} and {values[1]}, so it "
                "depends on something outside of the module, perhaps a random generator; pass loss_fn=, a loss without."
            )

    def after(self, check: SelfCheck) -> tuple[Choice, str | None]:
        """What to go on with after the self-check, and what to tell the user about it, once.

        Raises:
            CheckError: when the check has failed, with `on_check_fail="raise"`.
        """
        if check.outcome not in (CheckOutcome.FAILED, CheckOutcome.UNAVAILABLE):
            return self, None
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

    def _loss(self, module: nn.Module, space: ParameterSpace, dtype: torch.dtype | None) -> TrainingLoss:
        return TrainingLoss(module, space, self.loss_fn, mode=self.mode, dtype=dtype, seed=self.seed)


def _check(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.")
