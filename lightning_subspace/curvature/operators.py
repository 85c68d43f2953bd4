"""Operators by the words of `curvature`, each with its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lightning_subspace.curvature.batch_mean import BatchMean
from lightning_subspace.curvature.central_difference import FiniteDifferenceHessian
from lightning_subspace.curvature.empirical_fisher import EmpiricalFisher, examples_check
from lightning_subspace.curvature.forward_difference import ForwardDifferenceHessian, smoothness_check
from lightning_subspace.curvature.gauss_newton import GaussNewton, gauss_newton_check
from lightning_subspace.curvature.gradient_mean import GradientMean
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.curvature.rounding import kernels_check
from lightning_subspace.curvature.self_check import SelfCheck, self_check

Order = Literal[1, 2]


@dataclass(frozen=True)
class Row:
    """The operator of one word for `curvature`, and its self-check."""

    operator: Callable[..., BatchMean]  # called with (loss, batches, partition=), and `dtype=` where it `is_wide`
    order: Order = 2  # how often the loss has to be differentiable
    keeps_graphs: bool = False  # or gradients: called with `footprint=`, too
    is_wide: bool = False  # whether the loss is evaluated in float64, whatever the solver computes in
    check: Callable[..., SelfCheck] | None = None  # called with (a float64 loss, not open, a few examples, seed=)
    check_order: Order = 2  # how often the loss has to be differentiable there
    check_examples: int = 8  # how many it gets; the code path is the same for eight as for a thousand
    narrow_check: Callable[..., SelfCheck] | None = None  # called besides, in float32, with losses for what takes over
    passed: Row | None = None  # what takes over where both have passed
    not_passed: str = ""  # the notice, without its reason, where the check has not passed
    joins: bool = False  # whether micro-batches may be joined for its products, as a `RetainedGraphs`
    has_differences: bool = False  # whether finite differences measure the same matrix


OPERATORS: dict[str, Row] = {
    "hessian": Row(Hessian, keeps_graphs=True, check=self_check, joins=True, has_differences=True),
    "ggn": Row(GaussNewton, keeps_graphs=True, check=gauss_newton_check, joins=True),
    "finite-difference": Row(
        FiniteDifferenceHessian,
        is_wide=True,
        check=smoothness_check,
        check_order=1,
        check_examples=64,  # among 64 the networks of ReLU that were tried met some kinks in every direction
        narrow_check=kernels_check,
        passed=Row(ForwardDifferenceHessian, order=1),
    ),
    "empirical-fisher": Row(
        partial(EmpiricalFisher, examples=False),
        order=1,
        keeps_graphs=True,
        check=examples_check,
        check_order=1,
        passed=Row(EmpiricalFisher, order=1, keeps_graphs=True),
        not_passed="The empirical Fisher is taken over micro-batches here, not over single examples, which changes its "
        "scale by about the number of examples in one",
    ),
    "none": Row(GradientMean, order=1),
}

WITHOUT_PRODUCTS = OPERATORS["none"]
