"""Inner products of rows, in blocks and in one call, against exact sums."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_subspace.linalg import blocked

from .spectra import generator

PIECE = blocked._PIECE
FORMS = [blocked._in_blocks, blocked._in_one_call]
# Of |row| |vector|. In whatever order L products are added, they lose at most L eps / 2, and what is tested here on a
# CPU, which adds a piece one after the other, is that it does not grow with the number of pieces. A card adds in
# parallel, and loses 4e-9.
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
LENGTH = {blocked._in_blocks: 1 << 13, blocked._in_one_call: PIECE}


def rows_of(count: int, n: int, dtype: torch.dtype) -> Tensor:
    """Rows of a larger basis, neither its first nor all, whose sums cancel in part or not at all."""
    basis = torch.randn(count + 3, n, generator=generator(n), dtype=torch.float64)
    basis[2:] += 1.0
    return basis.to(dtype)[2 : count + 2]


def errors(rows: Tensor, found: Tensor) -> Tensor:
    """Of inner products with the last row, in units of the product of the norms."""
    exact = rows.double()  # of float32 numbers all products are exact in float64
    sums = [math.fsum((row * exact[-1]).tolist()) for row in exact[: len(found)]]
    norms = exact.norm(dim=1)[: len(found)] * exact[-1].norm()
    return (found - torch.tensor(sums, dtype=torch.float64)).abs() / norms


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("n", [1, 5, 1000, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 17])
def test_products_are_right_in_either_form(n: int, dtype: torch.dtype) -> None:
    for count in (1, 2, 6):
        rows = rows_of(count, n, dtype)
        for form in FORMS:
            normed, plain = form(rows, normed=True), form(rows, normed=False)
            assert normed.dtype == plain.dtype == torch.float64
            assert normed.shape == (count,)
            assert plain.shape == (count - 1,)
            for found in (normed, plain):
                largest = (min(n, LENGTH[form]) / 2 + 4) * EPS[dtype]
                assert found.numel() == 0 or float(errors(rows, found).max()) <= largest


@pytest.mark.parametrize("length", [64, 1024])
@pytest.mark.parametrize("n", [63, 1024, 100_000])
def test_short_pieces_lose_little(length: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of the pieces adds nothing to what they lose themselves."""
    monkeypatch.setattr(blocked, "_PIECE", length)
    rows = rows_of(5, n, torch.float32)
    assert float(errors(rows, blocked._in_one_call(rows, normed=True)).max()) <= 1e-6


def test_a_long_sum_loses_no_more_than_a_short_one() -> None:
    """All terms are equal: added one after the other in float32, 30 pieces would lose 15 times as much as two."""
    rows = torch.full((2, 30 * PIECE), 1.1)
    short, long = (blocked._in_one_call(rows[:, : count * PIECE], normed=True) for count in (2, 30))
    torch.testing.assert_close(long, 15 * short, rtol=1e-15, atol=0)


def test_rows_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batched product gets views, in which the rows keep their distance."""
    given: list[Tensor] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: given.extend([a, b]) or bmm(a, b))
    rows = rows_of(4, 2 * PIECE + 7, torch.float32)
    blocked._in_one_call(rows, normed=True)
    (matrix, vector) = given
    assert matrix.data_ptr() == rows.data_ptr()
    assert vector.data_ptr() == rows[-1].data_ptr()
    assert matrix.shape == (2, 4, PIECE)
    assert matrix.stride() == (PIECE, 2 * PIECE + 7, 1)


def on_card(dtype: torch.dtype) -> Tensor:
    """What `is_one_call` asks of rows on a CUDA device."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype)  # type: ignore[return-value]


def test_a_cpu_goes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not blocked.is_one_call(torch.zeros(2, 3))
    monkeypatch.setattr(blocked, "_in_one_call", None)
    assert blocked.products(torch.ones(2, 4), normed=True).tolist() == [4.0, 4.0]


def test_a_card_takes_one_call_unless_it_rounds_to_tf32() -> None:
    precision = torch.get_float32_matmul_precision()
    try:
        for level, is_exact in (("highest", True), ("high", False), ("medium", False)):
            torch.set_float32_matmul_precision(level)
            assert blocked.is_one_call(on_card(torch.float32)) == is_exact
            assert blocked.is_one_call(on_card(torch.float64))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert blocked.is_one_call(on_card(torch.float32))


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch >= 2.9")
@pytest.mark.parametrize(
    ("everywhere", "matmul", "is_exact"),
    [("none", "none", True), ("tf32", "none", False), ("tf32", "ieee", True), ("ieee", "tf32", False)],
)
def test_the_newer_interface_is_heard(everywhere: str, matmul: str, is_exact: bool) -> None:
    places = (torch.backends, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]  # type: ignore[attr-defined]
    try:
        for place, value in zip(places, (everywhere, matmul), strict=True):
            place.fp32_precision = value  # type: ignore[attr-defined]
        assert blocked.is_one_call(on_card(torch.float32)) == is_exact
    finally:
        for place, value in reversed(list(zip(places, before, strict=True))):
            place.fp32_precision = value  # type: ignore[attr-defined]


def test_the_older_interface_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    for allows in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allows))
        assert blocked.is_one_call(on_card(torch.float32)) is not allows
