"""Linear algebra of symmetric operators that are known by their products with vectors. Pure torch.

Reading order: `eigsh` (what it does), `search` (how it decides), `lanczos` (how a basis grows), `certificate` (why no
copy of a multiple eigenvalue is missed).
"""

from lightning_subspace.linalg.eigsh import eigsh as eigsh
from lightning_subspace.linalg.result import EigshResult as EigshResult
from lightning_subspace.linalg.result import Outcome as Outcome
from lightning_subspace.linalg.which import Which as Which
