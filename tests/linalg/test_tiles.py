"""Rows in tiles: the numbers of whole rows, the same bits wherever the tiles lie, and what is moved for them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_subspace.linalg import blocked, eigsh, tiles
from lightning_subspace.linalg.tiles import Tiles
from tests.thorough import covering

from .fake_card import OnCard, fake_card
from .spectra import Operator, spectra

N, WIDTH, M = 500, 64, 5
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]


@contextmanager
def elsewhere() -> Iterator[None]:
    """The host's memory is another one than that of the CPU's tensors."""
    with mock.patch.object(tiles, "is_staged", lambda place, device: place == "cpu"):
        yield


def filled(rows: Tensor, place: tiles.BasisPlace = "device") -> Tiles:
    with elsewhere():
        made = Tiles(len(rows), rows.shape[1], dtype=rows.dtype, device=CPU, place=place)
    for number, row in enumerate(rows):
        made.write(number, row)
    return made


def random_rows(count: int = M, n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("width", [WIDTH, N, N + 1, 1])
@pytest.mark.parametrize("place", ["device", "cpu"])
def test_operations_are_those_of_whole_rows(
    width: int, place: tiles.BasisPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "WIDTH", width)
    rows = random_rows()
    made = filled(rows, place)

    def is_as(expected: Tensor) -> None:
        torch.testing.assert_close(made.whole(M), expected, rtol=1e-12, atol=1e-12)

    is_as(rows)
    torch.testing.assert_close(made.products(1, 4, normed=True), rows[1:5] @ rows[4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.products(1, 4, normed=False), rows[1:4] @ rows[4], rtol=1e-12, atol=1e-12)
    coefficients = torch.tensor([0.5, -2.0], dtype=torch.float64)
    made.subtract(1, 3, coefficients)
    rows[3] -= coefficients @ rows[1:3]
    made.divide(3, 4.0)
    rows[3] /= 4.0
    is_as(rows)
    rotation = torch.linalg.qr(random_rows(4, 2)).Q
    torch.testing.assert_close(made.rotated(rotation), rotation.T @ rows[:4], rtol=1e-12, atol=1e-12)
    is_as(rows)
    made.contract(rotation)
    rows[:2], rows[2] = rotation.T @ rows[:4], rows[4].clone()
    is_as(rows)


@pytest.mark.parametrize("n", [0, 1, 2 * WIDTH, 2 * WIDTH + 1, 5 * WIDTH - 1])
def test_any_length_is_held(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WIDTH", WIDTH)
    rows = random_rows(3, n)
    for place in ("device", "cpu"):
        made = filled(rows, place)  # type: ignore[arg-type]
        assert torch.equal(made.whole(3), rows)
        assert made.nbytes >= rows.nbytes
        made.contract(torch.eye(2, 1, dtype=torch.float64))
        assert torch.equal(made.read(0), rows[0])
        assert torch.equal(made.read(1), rows[2])


def test_rows_in_one_tile_are_lent_and_take_no_more_than_they_have() -> None:
    made = filled(random_rows())
    assert made.nbytes == M * N * 8
    assert made.read(1).data_ptr() == made.whole(2)[1].data_ptr()


@pytest.mark.parametrize(("name", "dtype"), covering(["power law", "ninefold", "indefinite", "heavy tail"], DTYPES))
def test_eigenpairs_are_the_same_to_the_bit_wherever_the_basis_lies(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "WIDTH", WIDTH)
    monkeypatch.setattr(blocked, "_CHUNK", 24)  # several in a tile, the last one shorter
    operator = Operator(spectra(N)[name])
    with elsewhere():
        found = [eigsh(operator, N, 5, dtype=dtype, ncv=10, max_matvecs=80, basis=place) for place in ("device", "cpu")]
    one, other = found
    assert one.num_restarts == other.num_restarts > 0
    assert one.num_matvecs == other.num_matvecs
    assert (one.outcome, one.verified, one.orthogonality, one.asymmetry) == (
        other.outcome,
        other.verified,
        other.orthogonality,
        other.asymmetry,
    )
    for name in ("eigenvalues", "eigenvectors", "residuals"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_eigenpairs_of_tiles_are_those_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(spectra(N)["power law"])
    whole = eigsh(operator, N, 5, dtype=torch.float64)
    monkeypatch.setattr(tiles, "WIDTH", WIDTH)
    cut = eigsh(operator, N, 5, dtype=torch.float64)
    assert whole.num_matvecs == cut.num_matvecs
    torch.testing.assert_close(cut.eigenvalues, whole.eigenvalues, rtol=1e-12, atol=1e-12)


class Stream:
    """Does at once what is asked of it, and remembers the turns."""

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: object) -> None:
        assert event is Stream

    def record_event(self) -> object:
        return Stream


class Runtime:
    """Remembers what is pinned."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.pinned, self.calls = error, {}, Counter[str]()  # type: ignore[var-annotated]

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.calls["register"] += 1
        if not self.error:
            self.pinned[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.pinned.pop(address)
        return 0


@contextmanager
def card_with_streams(runtime: Runtime) -> Iterator[None]:
    current = Stream()

    @contextmanager
    def within(stream: Stream | None) -> Iterator[None]:
        assert isinstance(stream, Stream)
        yield

    with (
        fake_card(),
        mock.patch.multiple(
            torch.cuda,
            Stream=lambda device: Stream(),
            stream=within,
            current_stream=lambda device: current,
            synchronize=lambda device: None,
            cudart=lambda: runtime,
        ),
    ):
        yield


@pytest.mark.parametrize(("error", "width"), covering([0, 1], [WIDTH, N]))
def test_a_card_computes_with_pinned_rows_of_the_host(error: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they cannot be pinned, too."""
    monkeypatch.setattr(tiles, "WIDTH", width)
    spectrum = spectra(N)["power law"]
    runtime = Runtime(error)
    results, sizes = [], []
    with card_with_streams(runtime):
        held = OnCard(spectrum)

        def product(v: Tensor) -> Tensor:
            sizes.append(sum(runtime.pinned.values()))
            assert isinstance(v, OnCard)
            return held * v

        for place in ("device", "cpu"):
            results.append(eigsh(product, N, 5, ncv=10, dtype=torch.float64, device="cuda", basis=place))  # type: ignore[arg-type]
        assert not runtime.pinned  # given back when the solve is over
    assert runtime.calls["register"] == -(-N // width)
    assert (sizes[-1] >= 11 * N * 8) is (error == 0)
    assert sizes[0] == 0
    one, other = (result.eigenvectors.held for result in results)  # type: ignore[attr-defined]
    assert torch.equal(one, other)
    assert torch.equal(results[0].eigenvalues, results[1].eigenvalues)


def test_a_product_moves_every_row_of_the_basis_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 m + 14 rows for product m: what the README's model of the transfer is made of."""
    moved: Counter[str] = Counter()
    monkeypatch.setattr(tiles, "WIDTH", WIDTH)
    original = tiles._Stage.run

    def run(self: tiles._Stage, first: int, last: int, changed: tuple[int, int]) -> Iterator[Tensor]:
        moved["in"] += last - first
        moved["back"] += changed[1] - changed[0]
        return original(self, first, last, changed)

    counts: list[int] = []

    def product(v: Tensor) -> Tensor:
        counts.append(moved.total() + 2 * len(counts))  # the vector is read, and its image written
        return operator(v)

    operator = Operator(torch.linspace(0.0, 1.0, N))
    with elsewhere():
        monkeypatch.setattr(tiles._Stage, "run", run)
        eigsh(product, N, 5, ncv=20, max_matvecs=15, verify="never", tol=1e-5, basis="cpu")
    differences = [after - before for before, after in pairwise(counts)]
    assert differences[1:] == [2 * m + 14 for m in range(2, 2 + len(differences) - 1)]  # from product m to the next one
