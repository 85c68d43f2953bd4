"""What the solver asks of a CUDA device: one wait a product, few calls, the same numbers; on one that is none."""

from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_subspace.linalg import EigshResult, Outcome, blocked, eigsh, normals, quadrature

from .fake_card import CARD, OnCard, fake_card
from .spectra import spectra

N = 500
# An image is copied in. Twice: products, their sum, the columns left over, added; converted; subtracted. Both sums are
# put together and read, and the vector is divided.
CALLS = 2 * (4 + 1 + 1) + 3


def on_card(**arguments: object) -> tuple[EigshResult, Counter[str], Counter[str]]:
    spectrum = torch.linspace(0.0, 1.0, N)  # slow to converge
    with fake_card() as (waits, launches):
        held = OnCard(spectrum)
        result = eigsh(lambda v: held * v, N, 5, device="cuda", verify="never", **arguments)  # type: ignore[arg-type]
    return result, waits, launches


def test_one_wait_and_few_calls_a_product() -> None:
    (_, waits, launches), (result, more_waits, more_launches) = (
        on_card(max_matvecs=count, ncv=25, tol=1e-5) for count in (10, 20)
    )
    assert result.outcome is Outcome.MAX_MATVECS
    assert result.num_restarts == 0
    assert sum((more_waits - waits).values()) == 10
    assert (more_waits - waits) == {"_to_copy to the host": 10}
    # The user's product is one call.
    assert sum((more_launches - launches).values()) == 10 * (CALLS + 1)
    # Beside those: the device is tried, the length is summed, the start vector is looked at and made a unit vector, and
    # the eigenvectors are rotated and multiplied.
    assert sum(waits.values()) - 10 <= 7


def test_a_restart_sends_one_matrix() -> None:
    result, waits, _ = on_card(ncv=10, max_matvecs=60, tol=1e-4)
    assert result.num_restarts >= 3
    assert waits["to to the card"] <= result.num_restarts + 2
    assert waits["_to_copy to the host"] <= result.num_matvecs + 6


def test_sums_over_ranks_are_not_waited_for() -> None:
    """With NCCL they stay on the device, too."""
    sums: list[torch.device] = []

    def all_sum(local: Tensor) -> Tensor:
        sums.append(local.device)
        return local.clone()

    def random(seed: int, i: int) -> Tensor:
        return normals.normals(seed, i, [range(N)], torch.float32, CARD)

    result, waits, _ = on_card(all_sum=all_sum, random=random, max_matvecs=12, ncv=25)
    assert waits["_to_copy to the host"] <= result.num_matvecs + 6
    assert sums.count(CARD) >= 2 * result.num_matvecs


@pytest.mark.parametrize("name", ["power law", "ninefold", "indefinite"])
def test_eigenpairs_are_those_of_a_cpu(name: str) -> None:
    spectrum = spectra(N)[name]
    expected = eigsh(lambda v: spectrum * v, N, 10, dtype=torch.float64)
    with fake_card(), mock.patch.object(blocked, "_PIECE", 64):
        held = OnCard(spectrum)
        found = eigsh(lambda v: held * v, N, 10, dtype=torch.float64, device="cuda")
    assert found.verified
    assert isinstance(found.eigenvectors, OnCard)
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-6, atol=1e-6)
    assert found.orthogonality < 1e-12


def test_a_quadrature_waits_once_a_product() -> None:
    spectrum = spectra(N)["power law"]
    expected = quadrature(lambda v: spectrum * v, N, steps=12, vectors=2, dtype=torch.float64)
    with fake_card() as (waits, _):
        held = OnCard(spectrum)
        found = quadrature(lambda v: held * v, N, steps=12, vectors=2, dtype=torch.float64, device="cuda")
    torch.testing.assert_close(found.nodes, expected.nodes, rtol=1e-9, atol=1e-9)
    assert waits["_to_copy to the host"] <= 24 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_numbers_are_made_on_the_device_and_have_the_same_bits(dtype: torch.dtype) -> None:
    ranges = [range(5, 70_000), range(3), range(10, 11)]
    with fake_card() as (waits, launches):
        found = normals.normals(3, 1, ranges, dtype, "cuda")
    assert isinstance(found, OnCard)
    assert torch.equal(found.held, normals.normals(3, 1, ranges, dtype))
    assert not waits
    assert sum(launches.values()) < 120


def test_a_sum_that_is_not_finite_ends_the_run_on_a_card() -> None:
    def failing(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        calls = iter(range(100))
        return lambda v: of(v) * (float("nan") if next(calls) == 7 else 1.0)

    spectrum = spectra(N)["power law"].float()
    with fake_card():
        held = OnCard(spectrum)
        result = eigsh(failing(lambda v: held * v), N, 5, device="cuda")
    assert result.outcome is Outcome.NONFINITE
    assert result.num_matvecs == 8
    assert result.eigenvectors.held.isfinite().all()  # type: ignore[attr-defined]
