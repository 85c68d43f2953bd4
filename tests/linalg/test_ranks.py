"""Any number of ranks gives the answer of one."""

import pytest
import torch

from lightning_subspace.linalg import Outcome, Which

from .fake_ranks import eigsh_on_ranks
from .spectra import Operator, spectra

N = 301  # no multiple of 2 or 3: the last slices are padded


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("name", "which", "ncv"),
    [("power law", "LA", None), ("power law", "LA", 15), ("indefinite", "BE", None), ("softmax model", "LA", None)],
)
def test_ranks_agree_with_one(name: str, which: Which, ncv: int | None, size: int) -> None:
    operator = Operator(spectra(N)[name])
    arguments = {"which": which, "ncv": ncv, "dtype": torch.float64, "delta": 1e-3}
    (single,), vectors = eigsh_on_ranks(operator, 10, 1, **arguments)
    results, gathered = eigsh_on_ranks(operator, 10, size, **arguments)
    for result in results:
        torch.testing.assert_close(result.eigenvalues, single.eigenvalues, rtol=0, atol=1e-10)
        torch.testing.assert_close(result.residuals, single.residuals, rtol=0, atol=1e-8)
        assert result.num_matvecs == single.num_matvecs
        assert result.num_restarts == single.num_restarts
        assert result.outcome is single.outcome
        assert result.subspace_error == pytest.approx(single.subspace_error, rel=1e-3)
        assert result.orthogonality < 1e-12
    if single.subspace_error < 0.1:
        torch.testing.assert_close(gathered.T @ gathered, vectors.T @ vectors, rtol=0, atol=1e-8)


def test_more_ranks_than_dimensions() -> None:
    operator = Operator(torch.tensor([3.0, 2.0], dtype=torch.float64))
    results, gathered = eigsh_on_ranks(operator, 2, 3, dtype=torch.float64)
    assert {result.outcome for result in results} == {Outcome.EXACT}
    torch.testing.assert_close(gathered @ operator.dense() @ gathered.T, torch.diag(operator.eigenvalues))


def test_nan_of_one_rank_ends_all() -> None:
    class Failing(Operator):
        def __call__(self, vector: torch.Tensor) -> torch.Tensor:
            image = super().__call__(vector)
            image[-1] = float("nan")  # in the slice of the last rank
            return image

    results, _ = eigsh_on_ranks(Failing(spectra(N)["power law"]), 5, 3)
    assert [result.outcome for result in results] == [Outcome.NONFINITE] * 3
