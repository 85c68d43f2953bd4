"""Linear operators made of derivatives of the training loss."""

from lightning_subspace.curvature.batch_mean import BatchMean as BatchMean
from lightning_subspace.curvature.central_difference import FiniteDifferenceHessian as FiniteDifferenceHessian
from lightning_subspace.curvature.empirical_fisher import EmpiricalFisher as EmpiricalFisher
from lightning_subspace.curvature.forward_difference import ForwardDifferenceHessian as ForwardDifferenceHessian
from lightning_subspace.curvature.forward_difference import smoothness_check as smoothness_check
from lightning_subspace.curvature.gauss_newton import GaussNewton as GaussNewton
from lightning_subspace.curvature.gauss_newton import gauss_newton_check as gauss_newton_check
from lightning_subspace.curvature.gradient_mean import NoProductsError as NoProductsError
from lightning_subspace.curvature.hessian import Hessian as Hessian
from lightning_subspace.curvature.selection import CheckError as CheckError
from lightning_subspace.curvature.selection import CurvatureConfig as CurvatureConfig
from lightning_subspace.curvature.self_check import CheckOutcome as CheckOutcome
from lightning_subspace.curvature.self_check import SelfCheck as SelfCheck
from lightning_subspace.curvature.self_check import self_check as self_check

Operator = BatchMean  # the name by which the solver and the measurements know it
