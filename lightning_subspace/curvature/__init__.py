"""Linear operators made of derivatives of the training loss."""

from lightning_subspace.curvature.batch_mean import BatchMean
from lightning_subspace.curvature.central_difference import FiniteDifferenceHessian
from lightning_subspace.curvature.empirical_fisher import EmpiricalFisher
from lightning_subspace.curvature.forward_difference import ForwardDifferenceHessian, smoothness_check
from lightning_subspace.curvature.gauss_newton import GaussNewton, gauss_newton_check
from lightning_subspace.curvature.gradient import backward_gradient
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.curvature.selection import CheckError, CurvatureConfig, exact_hessian
from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck, self_check

Operator = BatchMean  # what solver and measurements know of it

__all__ = [
    "BatchMean",
    "CheckError",
    "CheckOutcome",
    "CurvatureConfig",
    "EmpiricalFisher",
    "FiniteDifferenceHessian",
    "ForwardDifferenceHessian",
    "GaussNewton",
    "Hessian",
    "Operator",
    "SelfCheck",
    "backward_gradient",
    "exact_hessian",
    "gauss_newton_check",
    "self_check",
    "smoothness_check",
]
