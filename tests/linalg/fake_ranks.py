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
        self.num_collectives = [0] * size
        self._barrier = threading.Barrier(size, timeout=10)  # if one does not come, the others fail
        self._shared: list[Tensor] = [torch.zeros(0)] * size

    def cut(self, vector: Tensor, rank: int) -> Tensor:
        padded = torch.nn.functional.pad(vector, (0, self.length * self.size - self.dimension))
        return padded[rank * self.length : (rank + 1) * self.length]

    def gather(self, local: Tensor, rank: int) -> list[Tensor]:
        self.num_collectives[rank] += 1
        self._shared[rank] = local
        self._barrier.wait()
        everybody = [tensor.clone() for tensor in self._shared]
        self._barrier.wait()
        return everybody

    def run(self, program: Callable[[int], EigshResult]) -> list[EigshResult | Exception]:
        """What ``program(rank)`` returns or raises on every rank."""

        def kept(rank: int) -> EigshResult | Exception:
            try:
                return program(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(kept, range(self.size)))


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

    results = []
    for result in ranks.run(program):
        if isinstance(result, Exception):
            raise result
        results.append(result)
    return results, torch.cat([result.eigenvectors for result in results], dim=1)[:, : operator.n]
