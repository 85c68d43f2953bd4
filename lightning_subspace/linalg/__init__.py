"""Linear algebra of symmetric operators known by products with vectors; pure torch.

Reading order: `eigsh` (the loop), `lanczos` (how a basis grows and shrinks), `stopping` (when to stop), `verification`
and `certificate` (why no copy of a multiple eigenvalue is missed), `quadrature` (sums over the whole spectrum).
"""

from lightning_subspace.linalg.eigsh import eigsh as eigsh
from lightning_subspace.linalg.quadrature import Estimate as Estimate
from lightning_subspace.linalg.quadrature import Quadrature as Quadrature
from lightning_subspace.linalg.quadrature import quadrature as quadrature
from lightning_subspace.linalg.result import EigshResult as EigshResult
from lightning_subspace.linalg.result import Outcome as Outcome
from lightning_subspace.linalg.selection import Which as Which
