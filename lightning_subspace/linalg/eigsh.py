"""A few extreme eigenpairs of a symmetric operator that is known by its products with vectors only.

The mechanism is in `lanczos.py`, the decisions are in `search.py`; here is the function that everybody calls.

Source: K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal.
Appl. 22 (2000), 602-616. What `eigsh` does differently from `scipy.sparse.linalg.eigsh`:

1. Eigenvectors are rows; eigenvalues are listed best first.
2. ``tol`` is relative to the largest eigenvalue, not to each one, and is tested after every product.
3. The gap behind the wanted eigenvalues tightens the test, so that the eigenspace is right too.
4. Multiple eigenvalues are found as often as they occur.
5. A failure is an outcome, not an exception.
6. Vectors may be spread over ranks.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_subspace.linalg import _arguments as arguments
from lightning_subspace.linalg.agreement import Agreement, AllSum
from lightning_subspace.linalg.lanczos import Lanczos, MatVec
from lightning_subspace.linalg.result import EigshResult
from lightning_subspace.linalg.selection import Which
from lightning_subspace.linalg.stopping import Rules
from lightning_subspace.linalg.verification import Progress, Search

RandomVector = arguments.RandomVector


def eigsh(
    matvec: MatVec,
    n: int,
    k: int,
    *,
    which: Which = "LA",
    tol: float = 1e-3,
    subspace_tol: float | None = 0.03,
    ncv: int | None = None,
    max_matvecs: int = 200,
    v0: Tensor | None = None,
    verify: Literal["always", "never"] = "always",
    delta: float = 0.01,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    all_sum: AllSum | None = None,
    random: RandomVector | None = None,
    on_matvec: Progress | None = None,
    dimension: int | None = None,
    max_asymmetry: float = 1e-4,
) -> EigshResult:
    """Compute ``k`` extreme eigenpairs of a symmetric operator by thick-restart Lanczos.

    The wanted pairs pass when every residual estimate is at most ``tol * scale``, where scale is the largest absolute
    Ritz value, and at most ``subspace_tol`` times the gap behind the wanted eigenvalues (but never less than a tenth of
    the former is asked for). The first makes the eigenvalues right, the second the eigen*space*: its angle to the true
    one has a sine of about residual / gap. With ``tol > 1e-3`` the residual must also be small relative to its own
    eigenvalue, on two consecutive matvecs, since pairs may pass a loose test before the right ones have appeared.

    A failure on one rank only, be it memory that runs out or an exception in ``matvec``, ``random`` or ``on_matvec``,
    ends the run on all ranks at the same matvec: that rank raises its exception, the others return
    `Outcome.NONFINITE`. The arguments, except ``n``, ``v0`` and what the functions do, have to be equal on all ranks.

    Memory: ``(ncv + 1) * n`` numbers, and ``k * n`` more for the answer.

    Args:
        matvec: Maps a vector of shape ``(n,)`` to its image, of the same shape. It is given a view of the basis, and
            must not write to it. It is called in the caller's autograd mode, on all ranks equally often. If it
            communicates, it must do all of that before it raises: eigsh cannot do so in its stead.
        n: Length of a vector; under ranks, of this rank's slice.
        k: Number of eigenpairs, 1 <= k <= dimension.
        which: "LA" largest, "SA" smallest, "LM" largest magnitude, "BE" half from each end, an odd one from the high.
        tol: Residual allowed, relative to scale. Raised to 1e-5 in float32 and 1e-12 in float64, with a warning.
        subspace_tol: Residual allowed, relative to the gap; not insisted on where residuals stop falling. None asks for
            eigenvalues only.
        ncv: Largest size of the basis, at least k + 3; default ``min(dimension, 2 * k + 10)``.
        max_matvecs: Products that may be spent.
        v0: Starting vector, shape ``(n,)``; default random.
        verify: "always": exclude missed copies of multiple eigenvalues, typically for 4 to 13 more matvecs at k = 10; a
            copy within ``0.03 * scale`` of the k-th eigenvalue is not looked for. "never": stop at convergence.
        delta: Risk that the verification overlooks a copy, in (0, 1).
        seed: Of the random vectors. The global random generators are not touched.
        dtype: float32 or float64, of the basis. Half precision is refused: its Lanczos vectors are not orthogonal.
        device: Of the basis and of the vectors given to ``matvec``.
        all_sum: Sums a small float64 tensor over ranks, to the same bits on all; every rank calls it equally often.
            Needs ``random``. None if there is one process, which then raises any exception at once.
        random: ``random(seed, i)`` gives this rank's slice, shape ``(n,)``, of the i-th global random normal vector.
        on_matvec: Called after each matvec with their number and the largest wanted residual estimate relative to scale
            (infinity while there are fewer than k).
        dimension: Dimension of the whole space where it is not the sum of all ``n``: slices padded with zeros.
        max_asymmetry: Largest asymmetry seen in the operator, relative to scale, that is taken for rounding. Whatever
            it is, no residual is reported below it. Deterministic float32 operators stay below 2e-6; minibatches that
            are drawn anew exceed 5e-3.

    Returns:
        The eigenpairs and what is known about them. Numerical trouble is an `Outcome`, never an exception.

    Raises:
        ValueError: An argument is out of range, or ``matvec`` returns a wrong shape.
        TypeError: An argument, or what ``matvec`` returns, is of a wrong type.

    Example:
        >>> eigenvalues = torch.tensor([9.0, 5.0, 5.0, 1.0, 0.5, 0.0, -0.5, -7.0])
        >>> result = eigsh(lambda v: eigenvalues * v, n=8, k=3)
        >>> [round(value, 4) for value in result.eigenvalues.tolist()]
        [9.0, 5.0, 5.0]
        >>> result.converged, result.verified
        (True, True)
    """
    draw = arguments.random_vectors(all_sum, random, n, seed, dtype)
    agreement = Agreement(all_sum)
    device = torch.device(device)
    dimension = arguments.global_dimension(dimension, n, agreement, device)
    arguments.check(k, which, dimension, max_matvecs, verify, delta, dtype)
    tol, tightest = arguments.tolerances(tol, subspace_tol, dtype)
    ncv = arguments.basis_size(ncv, k, dimension)
    is_verified = verify == "always"
    rules = Rules(k, which, tol, tightest, subspace_tol, ncv, max_matvecs, is_verified, delta, dimension, max_asymmetry)
    lanczos = Lanczos(matvec, n, ncv, dimension=dimension, dtype=dtype, device=device, agreement=agreement)
    arguments.start(lanczos, v0, n, draw)
    search = Search(lanczos, rules, draw, on_matvec)
    while (result := search.step()) is None:
        pass
    agreement.settle()
    return result
