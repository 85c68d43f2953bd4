"""When a run stops, as a table."""

import math

import pytest
import torch

from lightning_subspace.linalg import Outcome
from lightning_subspace.linalg.selection import Ritz
from lightning_subspace.linalg.stopping import Progress, Rules, Verdict, decide


def rules(**changed: object) -> Rules:
    arguments = {
        "k": 2,
        "which": "LA",
        "tol": 1e-3,
        "tightest": 1e-4,
        "subspace_tol": 0.03,
        "ncv": 14,
        "max_matvecs": 200,
        "verify": True,
        "delta": 0.01,
        "dimension": 1000,
        "max_asymmetry": 1e-4,
    }
    return Rules(**(arguments | changed))  # type: ignore[arg-type]


STALLED = Progress(num_matvecs=150, best_matvec=50)
SPENT = Progress(num_matvecs=200, best_matvec=200)
FRESH = Progress(num_matvecs=20, best_matvec=20)
ANSWERED, CERTAIN = {"answered": True}, {"answered": True, "certain": True, "verified": True}
VERDICTS = [
    ("nothing has happened", FRESH, {}, None),
    ("converged, but copies may be missed", FRESH, ANSWERED, None),
    ("verified", FRESH, CERTAIN, Verdict(Outcome.CONVERGED, verified=True)),
    ("verified with the last product", SPENT, CERTAIN, Verdict(Outcome.CONVERGED, verified=True)),
    ("the whole space", FRESH, {"size": 1000}, Verdict(Outcome.EXACT, verified=True)),
    ("the whole space with the last product", SPENT, {"size": 1000}, Verdict(Outcome.EXACT, verified=True)),
    ("no product is left", SPENT, {}, Verdict(Outcome.MAX_MATVECS)),
    ("no product is left to verify with", SPENT, ANSWERED, Verdict(Outcome.CONVERGED)),
    ("no progress", STALLED, {}, Verdict(Outcome.STAGNATED)),
    ("no progress a product before", Progress(num_matvecs=149, best_matvec=50), {}, None),
    ("no progress, of fewer than k pairs", STALLED, {"size": 1}, None),
    ("asymmetric", FRESH, {"asymmetric": True, "settled": True}, Verdict(Outcome.ASYMMETRIC)),
    ("asymmetric, as far as scale can tell", FRESH, {"asymmetric": True}, None),
    ("verified, but asymmetric", FRESH, {**CERTAIN, "asymmetric": True}, Verdict(Outcome.ASYMMETRIC)),
    ("no product is left, and asymmetric", SPENT, {"asymmetric": True}, Verdict(Outcome.ASYMMETRIC)),
]


@pytest.mark.parametrize(
    ("progress", "changed", "expected"), [row[1:] for row in VERDICTS], ids=[row[0] for row in VERDICTS]
)
def test_verdict(progress: Progress, changed: dict[str, object], expected: Verdict | None) -> None:
    state = {"size": 10, "answered": False, "certain": False, "verified": False, "asymmetric": False, "settled": False}
    assert decide(rules(), progress, **(state | changed)) == expected  # type: ignore[arg-type]


def test_without_verification_nothing_is_verified() -> None:
    verdict = decide(
        rules(verify=False), FRESH, 10, answered=True, certain=True, verified=False, asymmetric=False, settled=True
    )
    assert verdict == Verdict(Outcome.CONVERGED, verified=False)


@pytest.mark.parametrize(
    ("tol", "subspace_tol", "gap", "expected"),
    [
        (1e-3, None, 0.01, [1e-3, 1e-3]),
        (1e-3, 0.03, 1.0, [1e-3, 1e-3]),  # a wide gap asks for no more
        (1e-3, 0.03, 0.01, [3e-4, 3e-4]),
        (1e-3, 0.03, 1e-6, [1e-4, 1e-4]),  # nor does a narrow one for what cannot be reached
        (1e-3, 0.03, math.nan, [1e-4, 1e-4]),
        (1e-3, 0.03, math.inf, [1e-3, 1e-3]),
        (1e-2, None, 0.01, [1e-2, 1e-3]),  # a loose test is relative to each eigenvalue
    ],
)
def test_thresholds(tol: float, subspace_tol: float | None, gap: float, expected: list[float]) -> None:
    wanted = torch.tensor([1.0, 0.1], dtype=torch.float64)
    found = rules(tol=tol, subspace_tol=subspace_tol).thresholds(wanted, gap, scale=1.0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def ritz(*residuals: float) -> Ritz:
    found = torch.tensor(residuals, dtype=torch.float64)
    return Ritz(torch.ones_like(found), torch.eye(len(found)), found, found)


def test_a_loose_test_is_passed_twice_in_a_row() -> None:
    progress = Progress()
    loose = rules(tol=1e-2)
    passed = []
    for worst in (1e-4, 0.5, 1e-4, 1e-4):
        progress.num_matvecs += 1
        passed.append(progress.test(loose, ritz(0.0, worst), math.inf, 1.0, invariant=False, verifying=False))
    assert passed == [False, False, False, True]
    progress.reset()
    assert progress.test(loose, ritz(0.0, 1e-4), math.inf, 1.0, invariant=True, verifying=False)


def test_the_space_is_given_up_before_the_eigenvalues() -> None:
    progress = Progress()
    passed = []
    for _ in range(26):
        progress.num_matvecs += 1
        passed.append(progress.test(rules(), ritz(0.0, 5e-4), 1e-3, 1.0, invariant=False, verifying=False))
    assert passed == [False] * 25 + [True]  # a quarter of `patience` after the last progress
    assert progress.best_matvec == 1


def test_fewer_pairs_than_wanted_do_not_pass() -> None:
    assert not Progress().test(rules(), ritz(0.0), math.inf, 1.0, invariant=True, verifying=False)
