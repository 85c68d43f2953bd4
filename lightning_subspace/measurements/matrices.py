"""Gradients of single weight matrices: rank, and motion of their space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_subspace._arguments import require_integer, require_patterns
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.dealt_matrices import Round, chosen_matrices, rounds, shares_inside
from lightning_subspace.measurements.left_space import LeftSpace, space_overlap
from lightning_subspace.measurements.memory import kind
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.measurements.reliability import GRADIENT

SMALL_SIDE = 256  # up to here the halves and the weights are decomposed wholly, too
NUMBERS = ("energy", "stable_rank", "effective_rank", "overlap_halves", "weight_top_singular")  # of the owner


class Matrices(Measurement):
    """`matrices/...`: rank of each weight matrix's gradient, and motion of its space.

    G is the gradient of one weight matrix over the gradient sample, laid so that its m rows are the shorter side
    (kernels of convolutions as (out, in * k * k)), s_i its singular values, U its first r left singular vectors: the
    space onto which GaLore (Zhao et al. 2024, arXiv 2403.03507, section 3) and what came after it project. Logged as
    `matrices/<key>/<name of the parameter>`, and as `matrices/<key>` the mean over matrices:

    - `energy`: sum_{i<=r} s_i^2 / sum s_i^2 in [0, 1]; .38 for a Gaussian 64 x 64 matrix and r = 8.
    - `stable_rank`: |G|_F^2 / s_1^2; `effective_rank`: exp of the entropy of s_i^2 / sum s^2 (left out for m > 1024).
      Both from 1 to m.
    - `overlap_previous`, `overlap_anchor`: |U^T U'|_F^2 / r in [0, 1] with the last probe's space, and with that of the
      first probe at or after `anchor_step`; r/m for random spaces.
    - `overlap_halves`: the same between two halves of the sample. A space that moves from batch to batch is mostly
      noise of the batches: this is the ceiling of what halves of the sample can track, to be read beside the two above.
    - `hessian_inside`: sum_i |U^T V_i|^2 / sum_i |V_i|^2 in [0, 1] over the parts V_i of the top k eigenvectors of the
      Hessian: how much of the top space lies in the gradient's; r/m for random ones.
    - `weight_top_singular`: sigma_1 of the weights themselves.

    Ranks are bounded by the number of examples (of tokens, in a batch of text), and gradients of embeddings are sparse
    by rows. Numbers of one sample size do not compare with those of another.

    Costs one gradient over the gradient sample, for the halves, and O(m^2 c + m^3) a matrix, or O(m c r) for m > 1024,
    by a randomised SVD that starts at the last probe's space (energies to 1e-3; sigma_1 of weights, from m = 257 on, to
    1 %). It keeps 2 m r numbers
    a matrix between probes, also in checkpoints. On several ranks three to four sums of the size of each matrix.

    Args:
        rank: r.
        modules: shell-style patterns of matrices, by the name of the parameter or of its module (`["blocks.*.attn"]`);
            by default all whose shorter side is longer than `rank`.
        anchor_step: the anchor is the first probe at or after this step.
        every: taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for a `rank` or `every` that is no positive integer, an `anchor_step` below 0, or other patterns.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=10, measurements=[Matrices(modules=["*.attn.*", "head"])])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(
        self, rank: int = 8, modules: Sequence[str] | None = None, anchor_step: int = 0, every: int = 1
    ) -> None:
        self.rank = positive("rank", rank)
        self.modules = require_patterns("modules", modules)
        self.anchor_step = int(require_integer("anchor_step", anchor_step, 0))
        self.every = positive("every", every)
        self._previous: _Bases | None = None
        self._anchor: _Bases | None = None

    def expected_products(self, prospect: Prospect) -> float:
        """The gradients of the halves."""
        sample = prospect.sample
        return GRADIENT * (1.0 + len(sample.extra) / len(sample.hessian))

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """A decomposition of each matrix."""
        if probe.number == 0:
            self._previous = self._anchor = None
        partition = probe.partition
        matrices = chosen_matrices(partition, self.modules, self.rank)
        if not matrices:
            return {}
        weights = partition.flatten(probe.parameters, like=probe.gradient)
        vectors = probe.gradient, weights, *_halves(probe)
        found: dict[str, dict[str, float]] = {}
        bases: dict[str, Tensor] = {}
        for together in rounds(partition, matrices):
            for matrix, (numbers, basis) in zip(together.matrices, self._taken(together, vectors), strict=True):
                others = {"previous": self._previous, "anchor": self._anchor}
                for key, held in others.items():
                    if held is not None and held.step != probe.step:  # one of this step is its own, taken again
                        numbers[f"overlap_{key}"] = held.overlap(matrix.name, basis)
                if probe.subspace is not None and probe.subspace.trusted:
                    numbers["hessian_inside"] = shares_inside(partition, matrix, basis, probe.top.basis)
                found[matrix.name], bases[matrix.name] = numbers, basis.to("cpu", probe.gradient.dtype)
        self._previous = _Bases(probe.step, bases)
        if self._anchor is None and probe.step >= self.anchor_step:
            self._anchor = self._previous
        return _keyed(found)

    def state_dict(self) -> Mapping[str, Any]:
        """The spaces of the last probe and of the anchor."""
        kept = {"previous": self._previous, "anchor": self._anchor}
        return {name: {"step": one.step, "bases": one.of} for name, one in kept.items() if one is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these."""
        loaded = [None if name not in state else _Bases.from_state(state[name]) for name in ("previous", "anchor")]
        self._previous, self._anchor = loaded

    def _taken(self, together: Round, vectors: Sequence[Tensor]) -> list[tuple[dict[str, float], Tensor]]:
        """Numbers and spaces of W matrices, found by their owners. A collective."""
        gradient, weights, *halves = (together.collect(vector) for vector in vectors)
        own, packed = together.own, None
        if own is not None and gradient is not None and weights is not None:
            before = None if self._previous is None else self._previous.of.get(own.name)
            space = LeftSpace.of(gradient, self.rank, before)
            first, second = (
                (LeftSpace.of(half, self.rank, space.basis, SMALL_SIDE).basis for half in halves if half is not None)
                if halves
                else (torch.zeros_like(space.basis),) * 2
            )
            numbers = [space.energy, space.stable_rank, space.effective_rank, space_overlap(first, second)]
            numbers.append(LeftSpace.of(weights, 1, exact_side=SMALL_SIDE).norm)
            packed = torch.cat([space.basis.new_tensor(numbers), space.basis.reshape(-1)])
        ranks = [min(self.rank, matrix.side) for matrix in together.matrices]
        sizes = [len(NUMBERS) + matrix.side * r for matrix, r in zip(together.matrices, ranks, strict=True)]
        pieces = zip(together.matrices, ranks, together.share(packed, sizes, vectors[0]), strict=True)
        return [
            (
                dict(zip(NUMBERS, piece[: len(NUMBERS)].tolist(), strict=True)),
                piece[len(NUMBERS) :].view(matrix.side, r),
            )
            for matrix, r, piece in pieces
        ]


@dataclass(frozen=True, eq=False)
class _Bases:
    """The spaces of one probe, (m, r), by name of their matrix."""

    step: int
    of: Mapping[str, Tensor]

    def overlap(self, name: str, basis: Tensor) -> float:
        """Overlap with a space of now; nan where there was none."""
        held = self.of.get(name)
        return space_overlap(basis, held) if held is not None and held.shape == basis.shape else math.nan

    @classmethod
    def from_state(cls, state: Any) -> _Bases:
        """The spaces that gave a state.

        Raises:
            ValueError: for what `Matrices.state_dict` cannot have returned.
        """
        if not isinstance(state, Mapping) or not isinstance(bases := state.get("bases"), Mapping):
            raise ValueError(f"expected the spaces of a probe, got {kind(state)}")
        step = state.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step: expected an integer of at least 0, got {kind(step)}")
        for name, basis in bases.items():
            is_basis = isinstance(basis, Tensor) and basis.ndim == 2 and basis.is_floating_point()
            if not isinstance(name, str) or not is_basis or not basis.isfinite().all():
                raise ValueError(f"bases: expected finite matrices by name, got {kind(basis)} for {name!r:.40}")
        return cls(step, {name: basis.detach().cpu() for name, basis in bases.items()})


def _halves(probe: Probe) -> list[Tensor]:
    """Gradients over even and odd micro-batches; none of a single one."""
    if len(probe.sample.hessian) + len(probe.sample.extra) < 2:
        return []
    halves = [torch.zeros_like(probe.gradient) for _ in range(2)]
    for number, (batch, gradient) in enumerate(probe.batch_gradients()):
        halves[number % 2].add_(gradient, alpha=batch.weight)  # their lengths do not matter
    return halves


def _keyed(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Numbers by key and matrix, and by key their means over matrices."""
    metrics: dict[str, float] = {}
    for name, numbers in found.items():
        metrics.update({f"matrices/{key}/{name}": value for key, value in numbers.items()})
    for key in {key for numbers in found.values() for key in numbers}:
        values = [numbers[key] for numbers in found.values() if math.isfinite(numbers.get(key, math.nan))]
        if values:
            metrics[f"matrices/{key}"] = sum(values) / len(values)
    return metrics
