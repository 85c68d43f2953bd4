"""Every way to the top eigenpairs that is compared: ours, and those of the packages that one could use instead.

Each is a function of (case, k, ...) that does all the work from a network and a batch to eigenpairs, so that it can be
timed as a whole. Peers are imported where they are used: `pip install -e '.[benchmark]'`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
from scipy.sparse.linalg import eigsh as arpack
from torch import Tensor, nn

from lightning_subspace.curvature import CurvatureConfig, Hessian
from lightning_subspace.linalg import eigsh
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.subspace.solver import Solver
from tests.benchmarks.accuracy import Answer
from tests.benchmarks.workloads import Case, cross_entropy

Product = Callable[[Tensor], Tensor]
# A peer that has not reached the tolerance by then is given up.
MOST_MATVECS = 400


def ours(
    case: Case,
    k: int,
    tol: float,
    *,
    verify: bool = False,
    start: Tensor | None = None,
    choice: CurvatureConfig | None = None,
) -> Answer:
    """What a probe does: graphs of the sample, then the solver with its defaults."""
    choice = CurvatureConfig(cross_entropy) if choice is None else choice
    with choice.loss(case.module, case.space) as loss:
        hessian = choice.operator(loss, case.sample)
        found = Solver(k=k, tol=tol).solve(hessian, start=start, verify=verify)
    return Answer(found.eigenvalues, found.basis, found.num_matvecs, found.converged)


def ours_as_the_peers(case: Case, k: int, tol: float) -> Answer:
    """Asked for residuals alone, as the peers are, and not for a space that the gap behind it makes certain."""
    choice = CurvatureConfig(cross_entropy)
    with choice.loss(case.module, case.space) as loss:
        hessian = choice.operator(loss, case.sample)
        found = eigsh(hessian.matvec, hessian.n, k, tol=tol, subspace_tol=None, verify="never")
    return Answer(found.eigenvalues, found.eigenvectors, found.num_matvecs, found.converged)


def choice_of(case: Case, curvature: str) -> CurvatureConfig:
    """As a run would choose after its self-check, which is made once and not a part of the cost of a probe."""
    choice = CurvatureConfig(cross_entropy, curvature=curvature)
    return choice.after_check(choice.check(case.module, case.sample))[0]


@contextlib.contextmanager
def cheap_product(case: Case) -> Iterator[Product]:
    """The same Hessian at the least cost, to find the smallest sufficient budget of a peer with."""
    with TrainingLoss(case.module, case.space, cross_entropy) as loss:
        yield Hessian(loss, case.sample.hessian).matvec


# hessian-eigenthings: Lanczos for a fixed number of steps; flags tell which pairs have converged


def eigenthings(case: Case, k: int, steps: int | None, tol: float, *, tuned: bool) -> Answer:
    """`steps` None: its default. `tuned`: reorthogonalised also beyond 50 steps, where it does not by default."""
    from hessian_eigenthings import HessianOperator, lanczos

    with _math_attention():
        operator = HessianOperator(case.module, [case.batch], cross_entropy)
        found = lanczos(
            operator, k=k, max_iter=steps, tol=tol, which="LA", seed=0, reorthogonalize=True if tuned else None
        )
    return Answer(found.eigenvalues, found.eigenvectors, found.iterations, bool(found.converged.all()))


def eigenthings_product(case: Case) -> Tensor:
    from hessian_eigenthings import HessianOperator

    with _math_attention():
        return HessianOperator(case.module, [case.batch], cross_entropy).matvec(torch.ones(case.space.n))


def smallest_budget(n: int, k: int, tol: float, product: Product, device: str = "cpu") -> int | None:
    """The fewest steps after which its own residuals are below tol * lambda_1; None for more than `MOST_MATVECS`."""
    from hessian_eigenthings import LambdaOperator, lanczos

    seen: list[Tensor] = []  # the first steps of a longer run are those of a shorter one

    for steps in range(k, MOST_MATVECS):
        calls = iter(range(steps))

        def replayed(v: Tensor, calls: Iterator[int] = calls) -> Tensor:
            place = next(calls)
            if place == len(seen):
                seen.append(product(v))
            return seen[place]

        operator = LambdaOperator(replayed, n, device=device)
        found = lanczos(operator, k=k, max_iter=steps, which="LA", seed=0, reorthogonalize=True)
        if float(found.residuals.max()) <= tol * float(found.eigenvalues[0]):
            return steps
    return None


def doubled(case: Case, k: int, tol: float) -> Answer:
    """Its default budget, doubled until its own flags are all up."""
    steps, spent = 2 * k, 0
    while True:
        answer = eigenthings(case, k, steps, tol, tuned=False)
        spent += answer.matvecs
        if answer.claims or spent > MOST_MATVECS:
            return Answer(answer.values, answer.vectors, spent, answer.claims, f"max_iter = {steps} in the end")
        steps *= 2


# curvlinops: a SciPy operator, for ARPACK


@dataclass(frozen=True)
class Setting:
    """Of ARPACK: its tolerance, relative to each eigenvalue, and its basis."""

    tol: float
    ncv: int | None = None


def curvlinops(case: Case, k: int, setting: Setting, *, check: bool = True) -> Answer:
    """`check`: its test for a deterministic function, which is on by default."""
    from curvlinops import HessianLinearOperator

    parameters = list(case.module.parameters())
    with _math_attention():
        operator = HessianLinearOperator(
            case.module, nn.CrossEntropyLoss(), parameters, [case.batch], check_deterministic=check
        )
        scipy_operator = operator.to_scipy()
        return _arpack(lambda v: scipy_operator.matvec(v.astype(np.float32)), case.space.n, k, setting)


def curvlinops_product(case: Case) -> Tensor:
    from curvlinops import HessianLinearOperator

    parameters = list(case.module.parameters())
    with _math_attention():
        operator = HessianLinearOperator(
            case.module, nn.CrossEntropyLoss(), parameters, [case.batch], check_deterministic=False
        )
        return operator @ torch.ones(case.space.n)


def best_setting(case: Case, k: int, tol: float, product: Product) -> Setting | None:
    """The setting with the fewest products whose true residuals are below tol * lambda_1."""

    best: tuple[int, Setting] | None = None
    for ncv in (None, 3 * k + 10):
        seen: list[np.ndarray] = []  # a looser run takes the first steps of a tighter one
        for loose in (100 * tol, 30 * tol, 10 * tol, 3 * tol, tol):
            answer = _arpack(_replayed(product, seen), case.space.n, k, Setting(loose, ncv))
            if best is not None and answer.matvecs >= best[0]:
                break
            residuals = [
                float((product(x) - value * x).norm())
                for value, x in zip(answer.values.float(), answer.vectors.float(), strict=True)
            ]
            if max(residuals, default=float("inf")) <= tol * float(answer.values.max()):
                best = (answer.matvecs, Setting(loose, ncv))
                break
    return None if best is None else best[1]


def _replayed(product: Product, seen: list[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The products already `seen`, in their order, and new ones after them."""
    count = 0

    def replayed(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        if count > len(seen):
            seen.append(product(torch.tensor(v, dtype=torch.float32)).double().numpy())
        return seen[count - 1].copy()

    return replayed


def _arpack(product: Callable[[np.ndarray], np.ndarray], n: int, k: int, setting: Setting) -> Answer:
    count = 0

    def matvec(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return product(v.reshape(-1))

    start = np.random.default_rng(0).standard_normal(n)
    operator = LinearOperator((n, n), matvec=matvec, dtype=np.float64)
    claims = True
    try:
        values, vectors = arpack(operator, k, which="LA", tol=setting.tol, ncv=setting.ncv, v0=start, maxiter=30)
    except ArpackNoConvergence as stopped:
        values, vectors, claims = stopped.eigenvalues, stopped.eigenvectors, False
    return Answer(torch.tensor(values), torch.tensor(vectors.T.copy()), count, claims)


# PyHessian: one power iteration a pair, for the largest absolute values


class _TooManyError(Exception):
    pass


def pyhessian(case: Case, k: int) -> Answer | None:
    """With its defaults; None where that takes too many products."""
    peer: Any = importlib.import_module("pyhessian.hessian")  # the package has a class of the same name

    count = 0
    original = peer.hessian_vector_product

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > MOST_MATVECS:
            raise _TooManyError
        return original(*args)

    module = copy.deepcopy(case.module)  # it changes modes and gradients
    peer.hessian_vector_product = counted
    try:
        # It prints nothing useful, and autograd warns of the cycle that its backward(create_graph=True) leaves.
        with _math_attention(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            computer = peer.hessian(module, nn.CrossEntropyLoss(), data=case.batch, cuda=False)
            values, vectors = computer.eigenvalues(top_n=k)
    except _TooManyError:
        return None
    finally:
        peer.hessian_vector_product = original
        for p in module.parameters():
            p.grad = None
    rows = torch.stack([torch.cat([piece.reshape(-1) for piece in vector]) for vector in vectors])
    return Answer(torch.tensor(values), rows, count)


def _math_attention() -> Any:
    """The only attention kernel with a second derivative; the peers leave it to their user to know that."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
