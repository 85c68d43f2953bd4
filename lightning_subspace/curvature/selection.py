"""Choice of the operator by `curvature=`, its precision, and the self-check.

`operators.py` has one row a word; README.md says what each of them is. A run begins as its user asked. Where an
operation has no second derivative, "hessian" goes on with differences by itself; where the second derivatives are
wrong, or could not be checked, `on_check_fail` decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_subspace.curvature.batch_mean import BatchMean
from lightning_subspace.curvature.consequence import CheckError as CheckError
from lightning_subspace.curvature.consequence import consequence
from lightning_subspace.curvature.diagnosis import check_in_stages
from lightning_subspace.curvature.first_evaluation import can_evaluate, require_value
from lightning_subspace.curvature.fsdp_difference import ShardedDifferenceHessian, check_differences, check_gradient
from lightning_subspace.curvature.gradient_mean import GradientMean, ShardedGradientMean
from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.curvature.joining import joined_operator, most_joined
from lightning_subspace.curvature.operators import OPERATORS, WITHOUT_PRODUCTS, Order, Row
from lightning_subspace.curvature.rounding import chosen
from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck, self_check
from lightning_subspace.curvature.whole_copies import whole_copies
from lightning_subspace.data.micro_batch import MicroBatch, few_examples
from lightning_subspace.data.sample import Sample
from lightning_subspace.linalg.result import Outcome
from lightning_subspace.loss.copied_bytes import copied_bytes
from lightning_subspace.loss.fsdp_loss import ShardedLoss
from lightning_subspace.loss.loss_function import LossFunction
from lightning_subspace.loss.mode import Mode
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.fsdp import fsdp_modules, replacements, unsupported_reason
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.subspace.subspace import Subspace

Precision = Literal["float32", "float64", "native"]
Curvature = Literal["hessian", "ggn", "finite-difference", "empirical-fisher", "none"]
OnCheckFail = Literal["warn", "raise", "finite-difference", "omit"]


@dataclass(frozen=True)
class CurvatureConfig:
    """Settings of the loss (see `TrainingLoss`) and of its derivatives.

    Raises:
        ValueError: for any other word, and for finite differences of the "native" loss, which are rounding alone.
    """

    loss_fn: LossFunction | None = None
    mode: Mode = "train"
    seed: int = 0
    dtype: str | torch.dtype = "float32"  # a `Precision`, or float32 or float64 itself; see README.md
    curvature: str = "hessian"  # a key of `OPERATORS`
    on_check_fail: str = "warn"  # an `OnCheckFail`; see README.md
    has_passed: bool = False  # whether the self-check has passed
    is_plain: bool = False  # whether that was without fused kernels alone
    remark: str = ""  # what was chosen, where there was a choice
    omits_products: bool = False  # whether numbers that rest on second derivatives are left out
    most_joined: int = 1  # how many micro-batches become one for products, at most
    joined_bytes: float = math.inf  # what the data of such a one may have, at most
    marks: tuple[tuple[str, float], ...] = ()  # metrics of every record, by key, that say what the self-check found

    def __post_init__(self) -> None:
        for name in ("curvature", "on_check_fail"):
            object.__setattr__(self, name, getattr(self, name).replace("_", "-"))
        dtypes = get_args(Precision) if isinstance(self.dtype, str) else (torch.float32, torch.float64)
        words = {"mode": get_args(Mode), "curvature": tuple(OPERATORS), "on_check_fail": get_args(OnCheckFail)}
        for name, choices in {**words, "dtype": dtypes}.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.")
        if self.dtype == "native" and OPERATORS[self.curvature].is_wide:
            raise ValueError(
                f"dtype: expected 'float32' or 'float64' (of the solver) with curvature={self.curvature!r}, got "
                "'native'; finite differences are taken in float64, since in a narrower type they are rounding alone."
            )

    def loss(self, module: nn.Module, space: ParameterSpace, ranks: Ranks | None = None) -> TrainingLoss:
        """The loss to be opened for a probe; a collective."""
        ranks = Ranks() if ranks is None else ranks
        if self._is_on_shards(module):
            buffers = replacements(module, ranks, whole=False)
            options: dict[str, Any] = {"mode": self.mode, "seed": self.seed, "replacements": buffers, "ranks": ranks}
            return ShardedLoss(module, space, self.loss_fn, **options)
        return self._loss(module, space, ranks, self._narrowest_of_loss, self._row.order)

    def operator(
        self,
        loss: TrainingLoss,
        sample: Sample,
        partition: Partition | None = None,
        footprint: Footprint | None = None,
    ) -> BatchMean:
        """The operator over the sample's first part; no `partition`: of this process."""
        partition = Partition.even(loss.space) if partition is None else partition
        footprint = Footprint() if footprint is None else footprint
        is_on_shards = isinstance(loss, ShardedLoss)
        footprint.copies = copied_bytes(loss.module, self._narrowest_of_loss, whole=not is_on_shards)
        footprint.itemsize = loss.dtype.itemsize
        if is_on_shards:
            made = ShardedDifferenceHessian if self.has_products else ShardedGradientMean
            return made(loss, sample.hessian, partition=partition)
        options: dict[str, Any] = {"footprint": footprint} if self._row.keeps_graphs else {}
        if self._row.joins and self.most_joined > 1:
            options["nbytes"] = self.joined_bytes
            return joined_operator(self._row.operator, loss, sample.hessian, partition, self.most_joined, **options)
        if self._row.is_wide:
            options = {"dtype": self._widest(loss.module, loss.space)}
            footprint.itemsize = options["dtype"].itemsize
        return self._row.operator(loss, sample.hessian, partition=partition, **options)

    def mean(self, loss: TrainingLoss, sample: Sample, partition: Partition) -> BatchMean:
        """Mean loss and gradient over the sample's first part, without products."""
        made = ShardedGradientMean if isinstance(loss, ShardedLoss) else GradientMean
        return made(loss, sample.hessian, partition=partition)

    def check(self, module: nn.Module, sample: Sample, partition: Partition | None = None) -> SelfCheck:
        """The self-check on a few examples of the sample's first micro-batch.

        Every rank checks the first rank's batch, and the first rank's result counts. A batch that cannot be cut, or
        whose part has no loss, is taken whole. No `partition`: all parameters, this process alone.

        Raises:
            LossError: when the loss cannot be evaluated, or gives two values for one batch; when FSDP2's gradients are
                not those of the mean loss.
        """
        partition = Partition.even(ParameterSpace.of(module)) if partition is None else partition
        if self._is_on_shards(module):
            return self._check_on_shards(module, sample, partition)
        first, whole = partition.ranks.broadcast_object, sample.hessian[0]
        batch = few_examples(whole, OPERATORS[self.curvature].check_examples)
        is_part = first(batch is not whole)
        batch = first(batch)
        loss, ranks = self.loss(module, partition.space, partition.ranks), partition.ranks
        if is_part and not first(can_evaluate(loss, batch)):
            batch, is_part = first(whole), False
        require_value(loss, batch, sample, ranks)  # before: what it refuses would make a check inconclusive
        result = first(self._compare(module, batch, partition))
        if result.outcome is CheckOutcome.INCONCLUSIVE and is_part:
            result = first(self._compare(module, first(whole), partition))
        return result

    def follow(
        self, check: SelfCheck, module: nn.Module, sample: Sample, partition: Partition
    ) -> tuple[CurvatureConfig, str | None]:
        """The configuration after the self-check, itself checked if new. A collective.

        Raises:
            CheckError: see `after_check`.
        """
        after, notice = self.after_check(check)
        if after.curvature != self.curvature:
            again = after.check(module, sample, partition)  # differences have conditions of their own
            if again.outcome is CheckOutcome.FAILED:
                return after.after_check(again)
        return after, notice

    def after_check(self, check: SelfCheck) -> tuple[CurvatureConfig, str | None]:
        """The configuration after the self-check, and a notice to the user.

        Raises:
            CheckError: when the check has not passed, with `on_check_fail="raise"`, or where nothing can be measured in
                place of what has failed.
        """
        row = OPERATORS[self.curvature]
        has_passed = check.outcome is CheckOutcome.PASSED
        changed: dict[str, Any] = {"omits_products": False, "most_joined": 1, "marks": ()}
        fresh = replace(self, has_passed=has_passed, is_plain=check.is_plain, **changed)
        if check.outcome in (CheckOutcome.PASSED, CheckOutcome.SKIPPED):
            fresh = replace(fresh, remark="" if row.narrow_check is None else chosen(check))
            return fresh, f"{row.not_passed}: {check.reason}." if row.not_passed and not fresh.has_passed else None
        changes, notice = consequence(self.on_check_fail, check, self.curvature, has_differences=row.has_differences)
        if changes.get("curvature") == "finite-difference" and self.dtype == "native":
            changes["dtype"] = "float32"
        return replace(fresh, **changes), notice

    def after_solve(self, found: Subspace | None) -> CurvatureConfig:
        """The configuration after an eigensolve.

        Forward differences that turned out asymmetric are not used again.
        """
        if found is None or found.outcome is not Outcome.ASYMMETRIC or not self.has_passed:
            return self
        if OPERATORS[self.curvature].narrow_check is None:
            return self
        check = SelfCheck(CheckOutcome.SKIPPED, reason="in a probe the solver has found forward ones asymmetric")
        return self.after_check(check)[0]

    def joining(self, module: nn.Module, sample: Sample, partition: Partition) -> CurvatureConfig:
        """The configuration that joins micro-batches for products. A collective.

        It is the same where there are few of them, or the operator takes them one by one.

        Raises:
            JoinError: when they cannot be joined, with the reason.
            LossError: when the loss cannot be evaluated.
        """
        if not self._row.joins:
            return self
        space, ranks = partition.space, partition.ranks
        loss = self._loss(module, space, ranks, self._narrowest, self._row.order)
        wide = self._loss(module, space, ranks, torch.float64, 1)
        most, nbytes = most_joined(loss, wide, sample.hessian, ranks, seed=self.seed)
        return replace(self, most_joined=most, joined_bytes=nbytes)

    def require_no_obstacle(self, module: nn.Module) -> None:
        """Refuse what cannot be measured on the shards of FSDP2.

        Raises:
            ValueError: for finite differences on shards whose gradients are narrower than float32.
        """
        if self._is_on_shards(module) and (refusal := unsupported_reason(module)) is not None:
            raise ValueError(refusal)

    def _compare(self, module: nn.Module, batch: MicroBatch, partition: Partition) -> SelfCheck:
        row, space, ranks = OPERATORS[self.curvature], partition.space, partition.ranks
        if row.check is None:
            return SelfCheck(CheckOutcome.SKIPPED, reason="it has no check")

        def made(check: Callable[..., SelfCheck], order: Order) -> SelfCheck:
            def loss_of(dtype: torch.dtype) -> TrainingLoss:
                return self._loss(module, space, ranks, dtype, order)

            return check_in_stages(check, loss_of, batch, seed=self.seed, first=ranks.broadcast_object)

        result = made(row.check, row.check_order)
        if row.is_wide:
            if result.outcome is CheckOutcome.FAILED and not result.is_no_gradient:  # at a kink, which is at this theta
                return SelfCheck(CheckOutcome.SKIPPED, reason=result.reason)
            if result.outcome is CheckOutcome.PASSED and self._widest(module, space) != torch.float32:
                return SelfCheck(CheckOutcome.SKIPPED, reason="differences of float64 gradients need none")
            if result.outcome is CheckOutcome.PASSED and row.narrow_check is not None:
                losses = partial(self._loss, module, space, ranks, torch.float32)
                return row.narrow_check(losses, batch, seed=self.seed, first=ranks.broadcast_object)
        elif result.outcome in (CheckOutcome.FAILED, CheckOutcome.UNAVAILABLE) and not row.has_differences:
            # What a message advises has been tried: the Hessian has the same faults, or others.
            return replace(result, diagnosis=made(self_check, 2).diagnosis)
        return result

    def _check_on_shards(self, module: nn.Module, sample: Sample, partition: Partition) -> SelfCheck:
        """The check of gradients and differences on shards."""
        with self.loss(module, partition.space, partition.ranks) as loss:
            operator = ShardedDifferenceHessian(loss, sample.hessian[: partition.ranks.count], partition=partition)
            return check_differences(operator, self.seed) if self.has_products else check_gradient(operator)

    @property
    def has_products(self) -> bool:
        """Whether anything rests on second derivatives."""
        return self.curvature != "none" and not self.omits_products

    @property
    def _row(self) -> Row:
        if self.omits_products:
            return WITHOUT_PRODUCTS
        row = OPERATORS[self.curvature]
        if not self.has_passed or row.passed is None:
            return row
        return replace(row.passed, order=2) if self.is_plain else row.passed

    @property
    def _narrowest(self) -> torch.dtype | None:
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        return {"float32": torch.float32, "float64": torch.float64}.get(self.dtype)

    @property
    def _narrowest_of_loss(self) -> torch.dtype | None:
        return torch.float64 if self._row.is_wide else self._narrowest

    def _widest(self, module: nn.Module, space: ParameterSpace) -> torch.dtype:
        """The dtype of the solver's vectors."""
        return space.widest_dtype(module, self._narrowest or torch.float32)

    def _is_on_shards(self, module: nn.Module) -> bool:
        """Whether gradients are taken by FSDP2, on its shards."""
        return self.curvature in ("finite-difference", "none") and bool(fsdp_modules(module))

    def _loss(
        self, module: nn.Module, space: ParameterSpace, ranks: Ranks, dtype: torch.dtype | None, order: Order
    ) -> TrainingLoss:
        return TrainingLoss(
            module,
            space,
            self.loss_fn,
            mode=self.mode,
            dtype=dtype,
            seed=self.seed,
            order=order,
            replacements=whole_copies(module, ranks, dtype),
            ranks=ranks,
        )
