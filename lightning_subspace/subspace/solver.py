"""Settings of the eigensolver, and one call of it for a probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_subspace.linalg import eigsh
from lightning_subspace.linalg.selection import Which
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace.room import BasisChoice, Place, Room
from lightning_subspace.subspace.subspace import Subspace, inner_products

MAX_TOL = 0.1  # with a larger one an eigenvector has hardly begun to show
WARM_START = 1_000  # number of the random vector in a warm start, far from those that the solver draws
# Expected products of a solve: a constant, a number a pair (of an untrained and of a trained network), and more for the
# certificate. It is the middle of what was measured at tol = 1e-3 for k = 1 to 20, which is wide: for k = 10, 22 to 54
# products at the start, 14 to 30 later.
PRODUCTS, PRODUCTS_A_PAIR, PRODUCTS_OF_CERTIFICATE = 5.0, (4.5, 2.0), 12.0


class Footprint(Protocol):
    """The bytes of an operator, as `curvature.graph_memory` has them."""

    @property
    def of_product(self) -> int:
        """Bytes that a product takes for a while."""
        ...

    def free_memory(self, device: torch.device) -> float:
        """Bytes that are free on a device."""
        ...

    def see_basis(self, place: Place) -> None:
        """Take down where a basis lies."""
        ...


class Operator(Protocol):
    """The attributes of a symmetric operator that the solver uses; see `curvature.Operator`."""

    n: int
    dtype: torch.dtype
    device: torch.device
    partition: Partition
    raises_after_collectives: bool
    max_asymmetry: float

    @property
    def footprint(self) -> Footprint:
        """What it holds."""
        ...

    def matvec(self, v: Tensor) -> Tensor:
        """A v, (n,) -> (n,)."""
        ...


@dataclass(frozen=True)
class Solver:
    """Settings of the eigensolver; see `lightning_subspace.linalg.eigsh`."""

    k: int = 10
    which: Which = "LA"
    tol: float = 1e-3
    ncv: int | None = None
    max_matvecs: int = 200
    seed: int = 0
    basis: BasisChoice = "auto"

    def expected_products(self, *, trained: bool, verify: bool = False) -> float:
        """Expected number of products, right to a factor of about two.

        Args:
            trained: whether the network is past its first steps.
            verify: exclude missed copies of equal eigenvalues.
        """
        pairs = PRODUCTS_A_PAIR[trained] * self.k
        return min(PRODUCTS + pairs + verify * PRODUCTS_OF_CERTIFICATE, self.max_matvecs) if self.k else 0.0

    def solve(
        self,
        operator: Operator,
        matvec: Callable[[Tensor], Tensor] | None = None,
        *,
        start: Tensor | None = None,  # (k, n)
        verify: bool = True,
        on_matvec: Callable[[int, float], None] | None = None,
    ) -> Subspace:
        """The eigenspace of an operator; a collective.

        Args:
            operator: gives dtype, device, and the partition of vectors.
            matvec: a product in place of the operator's own.
            start: eigenvectors of a nearby operator; their sum plus a random vector is the start, which saves a few
                products at best. Never the gradient: an unconverged space would then contain it.
            verify: exclude missed copies of equal eigenvalues.
            on_matvec: called with (number of products, worst relative residual).

        Raises:
            NoRoomError: on all ranks, when the basis would not fit in the memory of one.
            SubspaceIntegrityError: when the eigenvectors are not orthonormal to 1e-4.
        """
        partition = operator.partition
        footprint = operator.footprint
        place = self.place(
            partition, operator.dtype, operator.device, reserved=footprint.of_product, free=footprint.free_memory
        )
        footprint.see_basis(place)
        v0 = None if start is None else self._warm_start(operator, start)
        with partition.ranks.unchecked():
            result = eigsh(
                agreed_product(operator, matvec),
                operator.n,
                self.k,
                which=self.which,
                tol=self.tol,
                ncv=place.size,
                max_matvecs=self.max_matvecs,
                v0=v0,
                verify="always" if verify else "never",
                seed=self.seed,
                dtype=operator.dtype,
                device=operator.device,
                all_sum=partition.ranks.all_reduce if partition.ranks.count > 1 else None,
                random=partial(partition.random, dtype=operator.dtype, device=operator.device),
                on_matvec=on_matvec,
                dimension=partition.n,
                max_asymmetry=operator.max_asymmetry,
                basis=place.basis,
            )
        return Subspace.of(result, partition)

    def place(
        self,
        partition: Partition,
        dtype: torch.dtype,
        device: torch.device,
        *,
        reserved: int,
        free: Callable[[torch.device], float],
    ) -> Place:
        """Where the basis would lie now; see `Room`. A collective."""
        room = Room(partition.local_n, dtype.itemsize, reserved, device, partition.ranks, free)
        return room.place(self.k, self.ncv, partition.n, self.basis)

    def _warm_start(self, operator: Operator, vectors: Tensor) -> Tensor:
        noise = operator.partition.random(self.seed, WARM_START, operator.dtype, operator.device)
        # Rounding decides the signs of eigenvectors: taken towards the noise, they are those of any number of ranks.
        towards = inner_products(vectors, noise[None], operator.partition.ranks)[:, 0]
        total = (torch.where(towards < 0.0, -1.0, 1.0).to(vectors) @ vectors).to(noise)
        parts = torch.stack([total, noise])
        squares = torch.linalg.vector_norm(parts, dim=1, dtype=torch.float64).square()
        norms: Tensor = operator.partition.ranks.all_reduce(squares).sqrt()
        return (parts / norms[:, None].to(parts)).sum(dim=0)


def agreed_product(operator: Operator, matvec: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """A product that ends on all ranks, even after a failure.

    It is for use inside of `Ranks.unchecked`. `matvec` takes the place of the operator's own product, which may need no
    agreement (`raises_after_collectives`).
    """
    if matvec is None and operator.raises_after_collectives:
        return operator.matvec

    def product(vector: Tensor) -> Tensor:
        with operator.partition.ranks.agree():
            return (operator.matvec if matvec is None else matvec)(vector)

    return product
