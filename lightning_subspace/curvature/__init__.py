"""Linear operators made of derivatives of the training loss."""

from lightning_subspace.curvature.gradient import mean_gradient
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck, self_check

__all__ = ["CheckOutcome", "Hessian", "SelfCheck", "mean_gradient", "self_check"]
