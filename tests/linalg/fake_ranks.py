"""Ranks as threads: collectives that meet at a barrier, and vectors cut into slices."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_subspace.linalg import EigshResult, eigsh

from .spectra import Operator, normal


class FakeRanks:
    """A world of ``size`` ranks, each with a slice of the same length, the last ones padded with zeros."""

    def __init__(self, size: int, dimension: int) -> None:
        self.size = size
        self.dimension = dimension
        self.length = -(-dimension // size)
        self._barrier = threading.Barrier(size, timeout=60)
        self._shared: list[Tensor] = [torch.zeros(0)] * size

    def cut(self, vector: Tensor, rank: int) -> Tensor:
        padded = torch.nn.functional.pad(vector, (0, self.length * self.size - self.dimension))
        return padded[rank * self.length : (rank + 1) * self.length]

    def gather(self, local: Tensor, rank: int) -> list[Tensor]:
        self._shared[rank] = local
        self._barrier.wait()
        everybody = [tensor.clone() for tensor in self._shared]
        self._barrier.wait()
        return everybody

    def run(self, program: Callable[[int], EigshResult]) -> list[EigshResult]:
        """What ``program(rank)`` returns on every rank."""

        def guarded(rank: int) -> EigshResult:
            try:
                return program(rank)
            except BaseException:
                self._barrier.abort()  # or the others would wait for ever
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))


def eigsh_on_ranks(operator: Operator, k: int, size: int, **arguments: object) -> tuple[list[EigshResult], Tensor]:
    """The results of all ranks, and the eigenvectors put together."""
    ranks = FakeRanks(size, operator.n)

    def program(rank: int) -> EigshResult:
        def matvec(local: Tensor) -> Tensor:
            vector = torch.cat(ranks.gather(local, rank))[: operator.n]
            return ranks.cut(operator(vector), rank)

        return eigsh(
            matvec,
            ranks.length,
            k,
            all_sum=lambda local: torch.stack(ranks.gather(local, rank)).sum(0),
            random=lambda seed, i: ranks.cut(normal(operator.n, 1000 * seed + i), rank),
            dimension=operator.n,
            **arguments,  # type: ignore[arg-type]
        )

    results = ranks.run(program)
    return results, torch.cat([result.eigenvectors for result in results], dim=1)[:, : operator.n]
