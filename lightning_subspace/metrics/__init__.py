"""Fractions, overlaps and angles of subspaces as torchmetrics, usable without the monitor.

The same quantities as its measurements, from the same functions in `lightning_subspace.subspace`, for tensors from
elsewhere: eigenvectors from a file, two gradients, the bases of two solvers.
"""

from lightning_subspace.metrics.functional import gradient_fraction as gradient_fraction
from lightning_subspace.metrics.functional import principal_angles as principal_angles
from lightning_subspace.metrics.functional import subspace_overlap as subspace_overlap
from lightning_subspace.metrics.modular import GradientFraction as GradientFraction
from lightning_subspace.metrics.modular import PrincipalAngles as PrincipalAngles
from lightning_subspace.metrics.modular import SubspaceOverlap as SubspaceOverlap
