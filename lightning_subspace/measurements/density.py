"""Density of the whole spectrum, its trace, norm and negative part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lightning_subspace._arguments import require_seed
from lightning_subspace.linalg import Quadrature, quadrature
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.block_traces import BlockTraces
from lightning_subspace.measurements.density_state import decode_densities, encode_densities
from lightning_subspace.measurements.grouping import Grouping, Groups, checked_groups
from lightning_subspace.measurements.memory import remember
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.subspace.solver import agreed_product
from lightning_subspace.subspace.spectral_density import SpectralDensity, trace_metrics
from lightning_subspace.subspace.subspace import Subspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST_VECTOR = 2_000  # number of the first random vector, far from those of the eigensolver


class Density(Measurement):
    """Density of all n eigenvalues, by stochastic Lanczos quadrature.

    phi(s) = (1/n) (sum_{i<=k} N(s; lambda_i, w^2) + (n - k) mean_u sum_j w_uj N(s; theta_uj, w^2)) (Ghorbani, Krishnan
    and Xiao 2019, arXiv 1901.10159, section 2; see `lightning_subspace.linalg.quadrature`). The top k eigenpairs of the
    probe are taken out first, so that the Lanczos runs, from `vectors` random vectors u, resolve the rest. Logged are:

    - `trace`, `trace_error`, `frobenius_norm`, `frobenius_error`: see `Trace`.
    - `lowest_eigenvalue`: the smallest node, at least lambda_n and usually close to it.
    - `negative_share` in [0, 1]: the share of the n eigenvalues below -1e-3 times the largest |eigenvalue| (closer to
      zero the sign is rounding). `negative_share_low`, `_high`: its range, from the bounds that so many steps leave,
      and two standard errors; wide where many eigenvalues are near zero.
    - `negative_mass`, `negative_mass_error`: the sum of the |lambda_i| of these over the sum of all, in [0, 1], with
      its standard error.

    Costs `steps * vectors` products, and (k + steps + 1) n floats while it lasts. The random vectors are the same at
    every probe, so that the change of a number is better known than the number. `history` has a `SpectralDensity` of
    32 `steps * vectors` bytes a probe; with more than `keep`, every second one of its older half is dropped. It is in
    checkpoints, and goes on after a resume.

    Args:
        steps: Lanczos steps from each vector: the resolution.
        vectors: random vectors: the standard errors fall with its square root.
        every: taken at each probe whose number is a multiple of this.
        keep: densities kept in `history` at most.
        seed: of the random vectors, 0 to 2**63 - 1.

    Raises:
        ValueError: for `steps`, `vectors`, `every` or `keep` that is not a positive integer, or a `seed` out of range.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> density = Density(every=10)
        >>> monitor = SubspaceMonitor(k=10, measurements=[density])
        >>> len(density.history)
        0
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self, steps: int = 40, vectors: int = 2, every: int = 1, keep: int = 200, seed: int = 0) -> None:
        self.steps = positive("steps", steps)
        self.vectors = positive("vectors", vectors)
        self.every = positive("every", every)
        self.keep = positive("keep", keep)
        self.seed = require_seed("seed", seed)
        self._history: list[SpectralDensity] = []

    @property
    def history(self) -> Sequence[SpectralDensity]:
        """The densities of this run, oldest first."""
        return tuple(self._history)

    def expected_products(self, prospect: Prospect) -> float:
        """`steps * vectors`."""
        return float(self.steps * self.vectors)

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """`steps * vectors` products."""
        if probe.number == 0:
            self._history.clear()
        spectrum = spectrum_of(probe, self.steps, self.vectors, self.seed)
        if not spectrum.finite:
            return {}
        found = SpectralDensity(probe.step, _compact(spectrum))
        remember(self._history, found, self.keep)
        return found.metrics()

    def state_dict(self) -> Mapping[str, Any]:
        """The history."""
        return encode_densities(self._history)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a history."""
        self._history = decode_densities(state, self.keep)

    def plot(self) -> Figure:
        """A matplotlib Figure: the last density, on a logarithmic scale."""
        from lightning_subspace.report.density_figure import density_figure  # matplotlib takes a while to import

        return density_figure(self._history)

    def plot_ridge(self) -> Figure:
        """A matplotlib Figure: the densities over the steps, one above another."""
        from lightning_subspace.report.density_figure import ridge_figure  # matplotlib takes a while to import

        return ridge_figure(self._history)


class Trace(Measurement):
    """`trace`, `frobenius_norm`, each with `_error`: tr H and |H|_F with standard errors.

    The eigenpairs of the probe enter exactly, the rest by random vectors, as in Hutch++ (Meyer et al. 2021, arXiv
    2010.09649) with the top eigenspace in the place of a sketch: tr H = sum lambda_i + (n - k) mean_u u.Hu.
    `trace_error` is sqrt(2/`vectors`) times |H|_F of the rest. tr H <= 2/lr is a condition of linear stability of SGD
    (Wu and Su 2023). In units of an eigenvalue, as is `frobenius_error`.

    Costs 2 `vectors` products, the second of each for |H|_F, and (k + 3) n floats. With k = 0 nothing is taken out.
    `Density` gives the same numbers.

    With `groups`, `trace/<group>` and `trace_error/<group>` from the same products: the trace of the block H_ll of each
    group l is sum_i lambda_i |v_il|^2 + (n - k) mean_u u_l.(Hu)_l; over l they sum to `trace`. One vector has about the
    variance 2 sum_{i,j in l} R_ij^2 + sum_{i in l, j not in l} R_ij^2, where R is H without its top pairs: what couples
    the group to others enters, too. The error is that of the mean over the vectors; for one vector it is not known.

    Args:
        vectors: random vectors.
        every: taken at each probe whose number is a multiple of this.
        seed: of the random vectors, 0 to 2**63 - 1.
        groups: those of `Layers`; None for the whole alone.

    Raises:
        ValueError: for `vectors` or `every` that is not a positive integer, a `seed` out of range, other `groups`, and,
            before training, for a pattern without a match.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=10, measurements=[Trace(vectors=8, groups="types")])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self, vectors: int = 6, every: int = 1, seed: int = 0, groups: Groups | None = None) -> None:
        self.vectors = positive("vectors", vectors)
        self.every = positive("every", every)
        self.seed = require_seed("seed", seed)
        self.groups = None if groups is None else checked_groups(groups)

    def require_space(self, space: ParameterSpace) -> None:
        """Refuse patterns without a match."""
        if self.groups is not None:
            Grouping.by(space, self.groups)

    def expected_products(self, prospect: Prospect) -> float:
        """2 `vectors`."""
        return 2.0 * self.vectors

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Two products a vector."""
        if self.groups is None:
            return trace_metrics(spectrum_of(probe, 2, self.vectors, self.seed))
        blocks = BlockTraces(Grouping.by(probe.space, self.groups), probe.partition)
        whole = trace_metrics(spectrum_of(probe, 2, self.vectors, self.seed, blocks))
        return {**whole, **blocks.metrics(_known(probe))}


def _compact(spectrum: Quadrature) -> Quadrature:
    """The same without the matrices that its diagonals are views of."""
    return replace(spectrum, chains=tuple((diagonal.clone(), beside) for diagonal, beside in spectrum.chains))


def spectrum_of(probe: Probe, steps: int, vectors: int, seed: int, blocks: BlockTraces | None = None) -> Quadrature:
    """Quadrature of the probe's operator, without the eigenpairs of the probe.

    `blocks` watch its products.
    """
    operator, partition, space = probe.operator, probe.partition, _known(probe)

    def random(seed: int, number: int) -> Tensor:
        return partition.random(seed, FIRST_VECTOR + number, operator.dtype, operator.device)

    with partition.ranks.unchecked():
        return quadrature(
            agreed_product(operator, None if blocks is None else blocks.watching(operator.matvec)),
            operator.n,
            steps=steps,
            vectors=vectors,
            known=None if space is None else (space.eigenvalues, space.residuals, space.basis),
            seed=seed,
            dtype=operator.dtype,
            device=operator.device,
            all_sum=partition.ranks.all_reduce if partition.ranks.count > 1 else None,
            random=random if blocks is None else blocks.drawing(random),
            dimension=partition.n,
        )


def _known(probe: Probe) -> Subspace | None:
    """The eigenpairs that are taken out first."""
    return probe.subspace if probe.subspace is not None and probe.subspace.converged else None
