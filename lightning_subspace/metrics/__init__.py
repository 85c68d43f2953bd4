"""Fractions, overlaps and angles of subspaces as torchmetrics, usable without the monitor.

The same quantities as its measurements, from the same functions in `lightning_subspace.subspace`. Here they are for
tensors from elsewhere: eigenvectors from a file, two gradients, the bases of two solvers.
"""

from lightning_subspace.metrics.functional import gradient_fraction, principal_angles, subspace_overlap
from lightning_subspace.metrics.modular import GradientFraction, PrincipalAngles, SubspaceOverlap

__all__ = [
    "GradientFraction",
    "PrincipalAngles",
    "SubspaceOverlap",
    "gradient_fraction",
    "principal_angles",
    "subspace_overlap",
]
