"""A few extreme eigenpairs of a symmetric operator, from products with vectors.

Thick-restart Lanczos. The loop is `_solve` below; how a basis grows and shrinks is in `lanczos.py`, when to stop in
`stopping.py`, which missed copies are looked for in `verification.py`.

Source: K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal.
Appl. 22 (2000), 602-616. README.md lists the differences from `scipy.sparse.linalg.eigsh`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_subspace._arguments import require_word
from lightning_subspace.linalg import _arguments as arguments
from lightning_subspace.linalg.agreement import Agreement, AllSum
from lightning_subspace.linalg.lanczos import Lanczos, MatVec
from lightning_subspace.linalg.result import EigshResult, Outcome
from lightning_subspace.linalg.selection import Neighbour, Ritz, Which, closest_of, neighbours, report_order, ritz_pairs
from lightning_subspace.linalg.stopping import VALUE_ERROR, Progress, Rules, Verdict, decide
from lightning_subspace.linalg.tiles import BasisPlace
from lightning_subspace.linalg.verification import Verification

OnMatvec = Callable[[int, float], None]

_ROUNDING = 10  # in units of eps: no residual estimate means anything below, relative to scale
_PRODUCTS_OF_CAUSE = 4  # spent on why an operator is not symmetric
_EXPLAINED = 0.02  # the share of the asymmetry that another rounding shows at least, where rounding is its cause
_SETTLED = 1.1  # scale has settled if it grew by less than this factor in a matvec


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
    random: arguments.RandomVector | None = None,
    on_matvec: OnMatvec | None = None,
    dimension: int | None = None,
    max_asymmetry: float = 1e-4,
    basis: BasisPlace = "device",
) -> EigshResult:
    """Compute k extreme eigenpairs of a symmetric operator by thick-restart Lanczos.

    The wanted pairs pass when every residual estimate is at most `tol * scale`, where scale is the largest absolute
    Ritz value, and at most `subspace_tol` times the gap behind the wanted eigenvalues (or `tol * scale / 10`, if that
    is more). The first test makes the eigenvalues right, the second the eigen*space*: the sine of its angle to the true
    one is about residual / gap. With `tol > 1e-3` the residual must also be small relative to its own eigenvalue, on
    two consecutive matvecs, since pairs may pass a loose test before the right ones have appeared.

    A failure on one rank only, out of memory or an exception in `matvec`, `random` or `on_matvec`, ends the run on all
    ranks at the same matvec: that rank raises its exception, the others return `Outcome.NONFINITE`. All arguments but
    `n`, `v0` and what the functions do must be equal on all ranks.

    Memory: `(ncv + 1) * n` numbers, and `k * n` more for the answer.

    Args:
        matvec: maps a vector of shape (n,), a view that it must not write to, to its image, of the same shape. It is
            called in the caller's autograd mode, equally often on all ranks. It raises after any communication.
        n: length of a vector; under ranks, of this rank's slice.
        k: number of eigenpairs, 1 <= k <= dimension.
        which: "LA" largest, "SA" smallest, "LM" largest magnitude, "BE" half from each end, an odd one from the high.
        tol: residual allowed, relative to scale. Raised to 1e-5 in float32 and 1e-12 in float64, with a warning.
        subspace_tol: residual allowed, relative to the gap; given up where residuals stop falling. None asks for
            eigenvalues only.
        ncv: largest size of the basis, at least k + 3; by default `min(dimension, 2 * k + 10)`.
        max_matvecs: products that may be spent.
        v0: start vector, shape (n,); by default random.
        verify: "always" excludes missed copies of multiple eigenvalues, for 7 to 19 more matvecs at k = 10 (Hessians of
            small networks). Close to the k-th eigenvalue it does so for at most as many as before, or 20; if that is
            too few, the result is not `verified`, or its gap is given up. "never" stops at convergence.
        delta: risk that the verification overlooks a copy, in (0, 1).
        seed: of the random vectors, 0 to 2**63 - 1. The global random generators are not touched.
        dtype: float32 or float64, of the basis. Half precision is refused: its Lanczos vectors are not orthogonal.
        device: of the basis and of the vectors given to `matvec`.
        all_sum: sums a small float64 tensor over ranks, to the same bits on all; every rank calls it equally often.
            Needs `random`. None if there is one process, which then raises any exception at once.
        random: `random(seed, i)` gives this rank's slice, shape (n,), of the i-th global random normal vector.
        on_matvec: called after each matvec with their number and the largest wanted residual estimate relative to scale
            (infinity while there are fewer than k).
        dimension: of the whole space where it is not the sum of all `n`: slices padded with zeros.
        max_asymmetry: largest asymmetry of the operator, relative to scale, that counts as rounding. No residual is
            reported below the asymmetry seen. Deterministic float32 operators stay below 2e-6; minibatches that are
            drawn anew exceed 5e-3.
        basis: where it lies: "device", or "cpu": in the host's memory, from where it is copied to the device in tiles
            for every pass, twice. The numbers are the same.

    Returns:
        The eigenpairs and what is known about them. Numerical trouble is an `Outcome`, never an exception.

    Raises:
        ValueError: for an argument out of range, or an image of a wrong shape.
        TypeError: for a number or a vector that is none, or an image of a wrong type.

    Example:
        >>> eigenvalues = torch.tensor([9.0, 5.0, 5.0, 1.0, 0.5, 0.0, -0.5, -7.0])
        >>> result = eigsh(lambda v: eigenvalues * v, n=8, k=3)
        >>> [round(value, 4) for value in result.eigenvalues.tolist()]
        [9.0, 5.0, 5.0]
        >>> result.converged, result.verified
        (True, True)
    """
    arguments.check_functions(matvec, all_sum, random, on_matvec)
    device = arguments.usable_device(device)
    draw = arguments.random_vectors(all_sum, random, n, seed, dtype, device)
    agreement = Agreement(all_sum)
    dimension = arguments.global_dimension(dimension, n, agreement, device)
    arguments.check(k, which, dimension, max_matvecs, verify, delta, dtype, max_asymmetry)
    require_word("basis", basis, get_args(BasisPlace))
    tol, tightest = arguments.tolerances(tol, subspace_tol, dtype)
    ncv = arguments.basis_size(ncv, k, dimension)
    is_verified = verify == "always"
    rounding = _ROUNDING * torch.finfo(dtype).eps
    rules = Rules(
        k, which, tol, tightest, subspace_tol, ncv, max_matvecs, is_verified, delta, dimension, max_asymmetry, rounding
    )
    lanczos = Lanczos(matvec, n, ncv, dimension=dimension, dtype=dtype, device=device, agreement=agreement, place=basis)
    if not lanczos.inject(lambda: draw(0) if v0 is None else arguments.vector("v0", v0, n, dtype)):
        raise ValueError("v0: expected a vector other than zero, got zero; pass None for a random one.")
    result = _solve(lanczos, rules, draw, on_matvec)
    agreement.settle()
    return result


def _solve(lanczos: Lanczos, rules: Rules, draw: Callable[[int], Tensor], on_matvec: OnMatvec | None) -> EigshResult:
    """Run the loop, from a factorisation whose first vector is pending.

    Invariant at its head: A V = T V + b q, V V^T = I, V q = 0, |q| = 1, up to rounding and to dropped residuals (see
    `lanczos.py`), unless q is not finite, which ends the run. V has fewer than ncv rows, so that the image of q fits;
    during a verification the first k of them are the pairs found. All numbers decided upon are equal on all ranks.

    Raises:
        ValueError: when `random` gives a vector inside the span of those before it.
    """
    k, which = rules.k, rules.which
    progress, verification = Progress(), Verification(rules)
    verdict: Verdict | None
    while True:
        # 1. Expand: spend one matvec on the pending vector q, and diagonalise the projected matrix T.
        scale_before = lanczos.scale
        expansion = None
        if lanczos.agreement.finite:
            expansion = lanczos.expand()
            progress.num_matvecs += 1
        ritz = ritz_pairs(lanczos, which)
        if expansion is None:
            verdict, converged = Verdict(Outcome.NONFINITE), False
            break

        # 2. Test: has a missed copy turned up, have the wanted pairs converged, is that reason enough to stop?
        scale, invariant = lanczos.scale, lanczos.invariant
        behind = neighbours(ritz, k, which, verification.behind)
        closest = closest_of(behind)
        if verification.active:
            verification.follow(expansion)
            if verification.see(ritz, scale):
                progress.reset()  # search on with the basis as it is, until the copy has converged too
        converged = progress.test(rules, ritz, closest.gap, scale, invariant=invariant, verifying=verification.active)
        if on_matvec is not None:
            worst = float(ritz.residuals[:k].max()) if lanczos.size >= k else math.inf
            with lanczos.agreement.local():
                on_matvec(progress.num_matvecs, worst / scale if scale else worst)
        answered = converged or verification.active  # a verification begins after convergence
        certain = answered and verification.is_over(ritz, closest, scale, progress.num_matvecs)
        verified = rules.verify and verification.verifies_values(ritz, scale)
        asymmetric = lanczos.asymmetry > rules.max_asymmetry * scale
        settled = scale <= _SETTLED * scale_before
        if verdict := decide(rules, progress, lanczos.size, answered, certain, verified, asymmetric, settled):
            break

        # 3. Verify: keep the wanted Ritz vectors and start again from a random direction, to find what was missed.
        if not verification.active and (converged or invariant):
            kept = min(lanczos.size, k)
            if kept == k:  # fewer span an invariant space that is too small: then the search itself starts again
                verification.begin(ritz, behind, scale, progress.num_matvecs)
            lanczos.contract(ritz.rotation[:, :kept])
            progress.reset()
            progress.num_draws += 1
            if not lanczos.inject(partial(draw, progress.num_draws)):
                raise ValueError(
                    f"random: expected vectors outside the span of the {kept} found, got one inside from "
                    f"random(seed, {progress.num_draws}); check random, and dimension if slices are padded."
                )

        # 4. Restart: compress a full basis to its best Ritz vectors. During a verification the pairs found stay.
        elif lanczos.size == rules.ncv:
            best = ritz_pairs(lanczos, which, num_locked=k) if verification.active else ritz
            rotation = best.rotation[:, : rules.num_kept]
            lanczos.contract(rotation)
            if verification.active:
                verification.contract(rotation)
            progress.num_restarts += 1

    if verdict.outcome is Outcome.ASYMMETRIC and rules.max_matvecs - progress.num_matvecs >= _PRODUCTS_OF_CAUSE:
        progress.num_matvecs += _PRODUCTS_OF_CAUSE
        # A call that differs from one before is no function of its vector. What another scaling of the vector changes
        # is rounding alone, and only a part of it: numbers that do not depend on the vector are rounded as before.
        least = _EXPLAINED * lanczos.asymmetry
        if lanczos.variation(1.0) < least <= lanczos.variation(1 / 3):
            verdict = Verdict(Outcome.ROUNDING)
    if verification.active and not converged:  # nothing better was found: the pairs it began with are the answer
        ritz = ritz_pairs(lanczos, which, num_locked=k)
    behind = neighbours(ritz, k, which, verification.behind)
    return _result(lanczos, rules, progress, ritz, behind, verdict, has_gap=verification.verifies_gap())


def _result(
    lanczos: Lanczos,
    rules: Rules,
    progress: Progress,
    ritz: Ritz,
    behind: Sequence[Neighbour],
    verdict: Verdict,
    *,
    has_gap: bool,
) -> EigshResult:
    """Record of the run; spends the last sum over ranks."""
    num_pairs = min(lanczos.size, rules.k)
    closest = closest_of(behind, default_gap=math.inf if rules.k == rules.dimension else 0.0)
    order = report_order(num_pairs, rules.which)
    # Whatever was dropped on the way, nothing of it lies outside a basis of the whole space.
    estimates = torch.zeros_like(ritz.residuals) if lanczos.size == rules.dimension else ritz.residuals
    rounding = max(lanczos.asymmetry, rules.rounding * lanczos.scale)
    residuals, next_residual = estimates[order].clamp(min=rounding), max(closest.residual, rounding)
    if rules.verify and verdict.outcome is not Outcome.EXACT:
        # Missed copies closer than the floor may have moved a value by as much: of a small one nothing is known.
        floor = rules.floor(lanczos.scale)
        is_small = VALUE_ERROR * ritz.values[order].abs() < floor
        residuals = torch.where(is_small, residuals.clamp(min=floor), residuals)
    # Where a copy of the last wanted value may have been missed, the eigenvalue behind it may be that.
    is_unsure = rules.verify and verdict.outcome is not Outcome.EXACT and not has_gap
    claims = rules.claims_space(float(residuals.max()) if num_pairs else 0.0, closest.gap, lanczos.scale)
    # A rank that could not form its part of the eigenvectors says so in this sum, and nothing can fail after it.
    eigenvectors, gram = lanczos.rotated(ritz.rotation[:, order])
    deviation = (gram - torch.eye(num_pairs, dtype=torch.float64, device="cpu")).abs()
    if not lanczos.agreement.finite:
        verdict = Verdict(Outcome.NONFINITE)
    return EigshResult(
        eigenvalues=ritz.values[order],
        eigenvectors=eigenvectors,
        residuals=residuals,
        outcome=verdict.outcome,
        verified=verdict.verified,
        num_matvecs=progress.num_matvecs,
        num_restarts=progress.num_restarts,
        orthogonality=float(deviation.max()) if num_pairs else 0.0,
        asymmetry=lanczos.asymmetry / lanczos.scale if lanczos.scale else 0.0,
        scale=lanczos.scale,
        next_eigenvalue=closest.value,
        next_residual=max(next_residual, closest.gap) if is_unsure else next_residual,
        gap=closest.gap,
        gap_given_up=is_unsure and claims,
    )
