"""A failure on one rank ends the run on all of them, and they agree on how."""

import traceback
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_subspace.linalg import EigshResult, Outcome, eigsh
from tests.thorough import usual

from .fake_ranks import FakeRanks
from .spectra import Operator, normal, spectra

N = 303
K = 3
OPERATOR = Operator(spectra(N)["power law"])
FIRST_RESTART = 6  # matvecs before it, which is ncv


class InjectedError(RuntimeError):
    pass


class Faults:
    """One rank's operator, random source and progress callback, of which one raises when its turn comes."""

    def __init__(
        self, ranks: FakeRanks, rank: int, cut: Callable[[Tensor], Tensor], where: str = "", at: int = 0
    ) -> None:
        self._ranks, self._rank, self._cut = ranks, rank, cut
        self._where, self._at = where, at
        self._count = 0
        self.communicating = False

    def _is_turn(self, where: str) -> bool:
        self._count += where == self._where
        return where == self._where and self._count == self._at

    def _reach(self, where: str) -> None:
        if self._is_turn(where):
            raise InjectedError(where)

    def _gather(self, local: Tensor) -> list[Tensor]:
        self.communicating = True
        everybody = self._ranks.gather(local, self._rank)
        self.communicating = False
        return everybody

    def matvec(self, local: Tensor) -> Tensor:
        vector = torch.cat(self._gather(local))
        self._reach("matvec")
        return self._cut(OPERATOR(vector))[self._is_turn("image") :]  # too short by one

    def random(self, seed: int, i: int) -> Tensor:
        self._reach("random")
        return self._cut(normal(N, 1000 * seed + i))

    def on_matvec(self, count: int, residual: float) -> None:
        self._reach("on_matvec")

    def all_sum(self, local: Tensor) -> Tensor:
        return torch.stack(self._gather(local)).sum(0)


class FailingOperation(TorchDispatchMode):
    """Counts the operations of this thread on data as long as ``length``, and raises instead of the ``at``-th one."""

    def __init__(self, faults: Faults, length: int, at: int) -> None:
        super().__init__()
        self.count = 0
        self._faults, self._length, self._at = faults, length, at

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        leaves = tree_leaves((args, kwargs))
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)] or [leaves]  # or one is about to be made
        is_large = any(self._length in shape for shape in shapes)
        if not (function.is_view or self._faults.communicating) and is_large:
            self.count += 1
            if self.count == self._at:
                raise InjectedError(str(function))
        return function(*args, **kwargs or {})


def lengths(size: int, empty: bool) -> list[int]:
    """Those of the slices; the second may be empty."""
    if not empty:
        return [N // size + (rank < N % size) for rank in range(size)]
    return [N, 0] if size == 2 else [N // 2, 0, N - N // 2]


def run(
    sizes: list[int], failing: int, where: str = "", at: int = 0, operation: int = 0, **wrong: object
) -> tuple[list[EigshResult | Exception], int]:
    """What eigsh ends with on every rank, and how many operations rank ``failing`` did on its slice.

    That rank fails where it is told, or in that operation, or is given ``wrong`` arguments.
    """
    ranks = FakeRanks(len(sizes), N)
    num_operations = 0

    def program(rank: int) -> EigshResult:
        nonlocal num_operations
        fails = rank == failing
        faults = Faults(ranks, rank, lambda vector: vector.split(sizes)[rank], where if fails else "", at)
        counter = FailingOperation(faults, sizes[rank], operation)

        def solve() -> EigshResult:
            right: dict[str, object] = {
                "matvec": faults.matvec,
                "n": sizes[rank],
                "k": K,
                "ncv": FIRST_RESTART,
                "dtype": torch.float64,
                "all_sum": faults.all_sum,
                "random": faults.random,
                "on_matvec": faults.on_matvec,
                "dimension": N if "dimension" in wrong else None,
            }
            return eigsh(**(right | wrong if fails else right))  # type: ignore[arg-type]

        if not fails or where or wrong:
            return solve()
        try:
            with counter:
                return solve()
        finally:
            num_operations = counter.count

    results = ranks.run(program)
    assert len(set(ranks.num_collectives)) == 1
    return results, num_operations


def check(results: list[EigshResult | Exception], failing: int, num_matvecs: int | None = None) -> None:
    others = [result for rank, result in enumerate(results) if rank != failing]
    assert {getattr(result, "outcome", result) for result in others} == {Outcome.NONFINITE}
    (spent,) = {result.num_matvecs for result in others if isinstance(result, EigshResult)}
    assert num_matvecs is None or spent == num_matvecs
    for result in others:
        assert isinstance(result, EigshResult)
        assert not result.verified
        assert result.eigenvectors.isfinite().all()
        assert torch.equal(result.eigenvalues, others[0].eigenvalues)  # type: ignore[union-attr]


ranks_and_slices = pytest.mark.parametrize(
    ("size", "failing", "empty"),
    [
        (2, 0, False),
        (2, 1, False),
        (3, 0, False),
        (3, 1, False),
        (3, 2, False),
        (2, 0, True),
        (2, 1, True),
        (3, 1, True),
    ],
)


@pytest.mark.parametrize(
    ("where", "at", "num_matvecs"),
    [
        ("matvec", 1, 1),
        ("matvec", 2, 2),
        ("matvec", FIRST_RESTART + 1, FIRST_RESTART + 1),
        ("matvec", 10, 10),
        ("on_matvec", 1, 2),
        ("on_matvec", FIRST_RESTART, FIRST_RESTART + 1),
        ("random", 1, 0),  # the start
        ("random", 2, None),  # that of the verification
    ],
)
@ranks_and_slices
def test_failure_of_what_the_caller_gave(
    size: int, failing: int, empty: bool, where: str, at: int, num_matvecs: int | None
) -> None:
    results, _ = run(lengths(size, empty), failing, where, at)
    check(results, failing, num_matvecs)
    error = results[failing]
    assert isinstance(error, InjectedError)
    assert "_reach" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize("last", ["on_matvec", "matvec"])
def test_failure_in_the_last_step(last: str) -> None:
    clean, _ = run(lengths(2, False), 0, where="nothing")
    assert isinstance(clean[0], EigshResult)
    assert clean[0].converged
    assert clean[0].num_restarts > 0
    num_matvecs = clean[0].num_matvecs
    results, _ = run(lengths(2, False), 1, last, at=num_matvecs)
    check(results, 1, num_matvecs)
    assert isinstance(results[1], InjectedError)


@pytest.mark.parametrize(("size", "failing"), usual([(3, 0)], thorough=[(2, 0), (2, 1), (3, 1), (3, 2)]))
def test_failure_of_any_operation_on_a_slice(size: int, failing: int) -> None:
    """Out of memory may be anywhere: in the basis, an inner product, a restart, the answer."""
    sizes = lengths(size, empty=False)
    clean, count = run(sizes, failing)
    assert all(isinstance(result, EigshResult) and result.converged for result in clean)
    reached = set()
    # The first and the last ones, and some of those between: others on each rank.
    for operation in [*range(1, 13), *range(13 + 5 * failing, count - 12, 11), *range(count - 12, count + 1)]:
        results, _ = run(sizes, failing, operation=operation)
        check(results, failing)
        error = results[failing]
        assert isinstance(error, InjectedError)
        reached |= {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    assert reached >= {
        "__init__",
        "inject",
        "expand",
        "contract",
        "_subtract",
        "_divide",
        "rotated",
    }


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"v0": torch.full((101,), torch.nan)}, ValueError, "^v0: expected .*finite"),
        ({"v0": torch.ones(7)}, ValueError, "^v0: expected .*\\(7,\\)"),
        ({"v0": [1.0]}, TypeError, "^v0: expected .*list"),
        ({"random": lambda seed, i: torch.full((101,), torch.inf)}, ValueError, "^random: expected .*finite"),
        ({"random": lambda seed, i: torch.ones(7)}, ValueError, "^random: expected .*\\(7,\\)"),
        ({"n": -1, "dimension": N}, ValueError, "^n: expected .*-1"),
    ],
)
def test_wrong_start_on_one_rank(wrong: dict[str, object], error: type[Exception], match: str) -> None:
    results, _ = run([101, 101, 101], failing=1, **wrong)
    check(results, 1, num_matvecs=0)
    with pytest.raises(error, match=match):
        raise results[1]  # type: ignore[misc]


def test_wrong_length_on_one_rank_leaves_the_dimension_unknown() -> None:
    results, _ = run([101, 101, 101], failing=1, n=101.0)
    assert [type(result) for result in results] == [ValueError, TypeError, ValueError]
    assert all(str(result).startswith("n: expected") for result in results)


def test_wrong_image_on_one_rank() -> None:
    results, _ = run([101, 101, 101], failing=1, where="image", at=4)
    check(results, 1, num_matvecs=4)
    assert isinstance(results[1], ValueError)


def test_sum_that_fails_too_does_not_hide_the_failure() -> None:
    num_sums = 0

    def all_sum(local: Tensor) -> Tensor:
        nonlocal num_sums
        num_sums += 1
        if local.isnan().any():
            raise ConnectionError
        return local

    def matvec(vector: Tensor) -> Tensor:
        raise InjectedError

    with pytest.raises(InjectedError) as caught:
        eigsh(matvec, N, K, all_sum=all_sum, random=lambda seed, i: normal(N, i))
    assert isinstance(caught.value.__context__, ConnectionError)
    assert num_sums == 4  # the dimension, two for the start, and the first with nan


def test_single_process_stops_at_once() -> None:
    num_matvecs = 0

    def matvec(vector: Tensor) -> Tensor:
        nonlocal num_matvecs
        num_matvecs += 1
        return OPERATOR(vector)

    def on_matvec(count: int, residual: float) -> None:
        if count == 5:
            raise InjectedError

    with pytest.raises(InjectedError):
        eigsh(matvec, N, K, on_matvec=on_matvec)
    assert num_matvecs == 5
