"""Linear operators made of derivatives of the training loss."""

from lightning_subspace.curvature.choice import CheckError, Choice
from lightning_subspace.curvature.finite_difference import FiniteDifferenceHessian
from lightning_subspace.curvature.gradient import backward_gradient, mean_gradient
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck, self_check

__all__ = [
    "CheckError",
    "CheckOutcome",
    "Choice",
    "FiniteDifferenceHessian",
    "Hessian",
    "SelfCheck",
    "backward_gradient",
    "mean_gradient",
    "self_check",
]
