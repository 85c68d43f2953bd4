"""Maps of curvature, gradient and update over layers and types of modules."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_subspace._arguments import wrong
from lightning_subspace.measurements.base import Found, Measurement, Needs, Probe, positive
from lightning_subspace.measurements.grouping import Grouping, Groups, checked_groups, checked_patterns
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.subspace.subspace import Subspace, inner_products
from lightning_subspace.subspace.table import MOST_GROUPS, Table

NAME = "layers"  # of the table, and in front of the keys
FOURTH_POWERS = "fourth_powers"  # mean of v_ij^4 over i, summed over j in the group
# A block counts where what is behind the pairs is at most half of it. Of indefinite Hessians, before training, blocks
# from the pairs were up to 20 times too large; those all lay below 1.3 times the next eigenvalue.
CLEAR = 2.0
IN_TABLE = ("participation", "gradient", "block_sharpness")


class LayerMap(Measurement):
    """Table `layers` of a record: shares of top space, gradient, update.

    For figures, in TensorBoard's tab and in loggers that take pictures; scalars are those of `Layers`. The groups are
    modules, as deep in the tree as there are at most 16. A row has a number for each of them:

    - `participation`: the mean of |v_il|^2 over the top eigenvectors v_i; it sums to 1.
    - `gradient`, `update`: |g_l|^2 / |g|^2 and |u_l|^2 / |u|^2; they sum to 1.
    - `null`: n_l / n, what each of these is in a random direction.
    - `block_sharpness`: as in `Layers`.

    Costs no product, but k^2 n multiplications. With k = 0 there are the gradient and the update.
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self) -> None:
        self._held: tuple[Grouping, Grouping] | None = None

    def measure(self, probe: Probe) -> Found:
        """No product."""
        _, coarse = self._groupings(probe.space)
        return {NAME: _table(coarse, _at_point(probe, coarse))}

    def after_step(self, probe: Probe, gradient: Tensor | None, update: Tensor) -> Found:
        """No product."""
        _, coarse = self._groupings(probe.space)
        return {NAME: Table.of(coarse.names, {"update": _shares(probe, coarse, update)})}

    def _groupings(self, space: ParameterSpace) -> tuple[Grouping, Grouping]:
        """That of scalars and that of the table."""
        if self._held is None or self._held[0].space != space:
            self._held = self._made(space)
        return self._held

    def _made(self, space: ParameterSpace) -> tuple[Grouping, Grouping]:
        coarse = Grouping.coarse(space, MOST_GROUPS)
        return coarse, coarse


class Layers(LayerMap):
    """`layers/...`: top space, gradient, update and curvature by group of parameters.

    For each group l of coordinates, each parameter tensor by default, with the eigenpairs lambda_i, v_i of the probe:

    - `layers/participation/<l>` in [0, 1]: the mean of |v_il|^2 over i; `layers/participation_weighted/<l>`: weighted
      by |lambda_i|. Both sum to 1 over l, as do these (Wang et al. 2025, arXiv 2502.19002, compare types of modules):
    - `layers/gradient/<l>`, `layers/update/<l>`: |g_l|^2 / |g|^2, and the same of the step that was taken.
    - `layers/gradient_curvature/<l>`: g_l.(Hg)_l / |g|^2 in units of an eigenvalue; it sums to `gradient_curvature`.
    - `layers/block_sharpness/<l>`: the largest eigenvalue of the k x k matrix D V_l V_l^T D with D_ii = sqrt(lambda_i),
      which is that of the diagonal block of sum_i lambda_i v_i v_i^T. The block of H has at most lambda_{k+1} more, and
      no less where no other eigenvalue is negative: with "ggn" and a loss convex in the outputs it is a bound from
      below. With the Hessian it is an estimate; on MLPs, CNNs and a small GPT it was .97 to 1.24 of the truth where
      given. Left out below 2 lambda_{k+1}, as all were before training, and for another end of the spectrum than "LA".
    - `layers/block_sharpness_exact/<l>` for `exact` groups: the largest eigenvalue of the block by Lanczos on
      v -> (H v_l)_l, or 0 where that is negative.
    - `layers/inverse_participation`: the mean of n sum_j v_ij^4 over i; 3 for a random vector, n for one coordinate
      (arXiv 2606.30226). Loggers get it with `log="all"`.

    Compare a share with n_l / n, that of a random direction, and over time rather than between architectures: scales
    that a norm layer takes out of the loss move it. A tied parameter counts once, in the group of its first name. A
    block says nothing about what couples layers, which is most of lambda_1: on those networks the sharpest block had
    .27 to .74 of it.

    Costs nothing beside the probe, as the product is that of `gradient_curvature`; `exact` an eigensolve for one pair,
    about 20 products, a group. The table `layers` has these groups, too, or a coarser cut where they are more than 16.

    Args:
        groups: "tensors"; "modules", those that hold parameters themselves; "types", classes of these, as "Linear"; or
            a mapping from names to a pattern or a list of patterns of parameter names, as `{"attention": "*.attn.*"}`.
            The first group with a pattern that fits takes a parameter, those that fit none are "other". A tied one may
            be given by any of its names.
        exact: True for the exact block of each group, or patterns of names of groups.
        every: taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for other `groups` or `exact`, an `every` that is not a positive integer, and, before training, for
            a pattern without a match.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> layers = Layers(groups={"attention": "*.attn.*", "mlp": ["*.up.*", "*.down.*"]}, exact=["mlp"])
        >>> monitor = SubspaceMonitor(k=10, measurements=[layers])
    """

    extra: ClassVar[frozenset[str]] = frozenset({f"{NAME}/inverse_participation"})

    def __init__(self, groups: Groups = "tensors", exact: bool | Sequence[str] = False, every: int = 1) -> None:
        super().__init__()
        self.groups = checked_groups(groups)
        self.exact = exact
        self._exact = ("*",) if exact is True else () if exact is False else checked_patterns("exact", exact)
        self.every = positive("every", every)

    def require_space(self, space: ParameterSpace) -> None:
        """Refuse patterns without a match."""
        self._exact_groups(self._groupings(space)[0])

    def expected_products(self, prospect: Prospect) -> float:
        """An eigensolve for one pair for each exact group."""
        if prospect.space is None:
            return 0.0
        return len(self._exact_groups(self._groupings(prospect.space)[0])) * prospect.solve(k=1)

    def measure(self, probe: Probe) -> Found:
        """The product of `gradient_curvature`, and those of exact blocks."""
        fine, coarse = self._groupings(probe.space)
        rows = _at_point(probe, fine, probe.gradient_image)
        found: dict[str, float | Table] = {NAME: _table(coarse, rows if coarse == fine else _at_point(probe, coarse))}
        if FOURTH_POWERS in rows:
            found[f"{NAME}/inverse_participation"] = probe.partition.n * sum(rows.pop(FOURTH_POWERS))
        if probe.operator.has_products and probe.which == "LA":
            blocks = {group: _exact_block(probe, fine.members(group)) for group in self._exact_groups(fine)}
            rows["block_sharpness_exact"] = [blocks.get(group, math.nan) for group in range(len(fine.names))]
        return found | _keyed(fine, rows)

    def after_step(self, probe: Probe, gradient: Tensor | None, update: Tensor) -> Found:
        """No product."""
        fine, _ = self._groupings(probe.space)
        return {**super().after_step(probe, gradient, update), **_keyed(fine, {"update": _shares(probe, fine, update)})}

    def _made(self, space: ParameterSpace) -> tuple[Grouping, Grouping]:
        fine = Grouping.by(space, self.groups)
        if len(fine.names) > MOST_GROUPS and self.groups in ("tensors", "modules"):
            return fine, Grouping.coarse(space, MOST_GROUPS)
        return fine, fine.at_most(MOST_GROUPS)

    def _exact_groups(self, grouping: Grouping) -> list[int]:
        for pattern in self._exact:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in grouping.names):
                raise wrong("exact", f"patterns of the groups {', '.join(grouping.names)}", pattern)
        return [i for i, name in enumerate(grouping.names) if any(fnmatch.fnmatchcase(name, p) for p in self._exact)]


def _at_point(probe: Probe, grouping: Grouping, image: Tensor | None = None) -> dict[str, list[float]]:
    """Rows of what is known at theta_t, by one all-reduce.

    `image` is H g / |g|.
    """
    space = probe.subspace
    basis = space.basis if space is not None and space.trusted else probe.gradient.new_zeros(0, len(probe.gradient))

    def values(part: slice) -> Tensor:
        v, g = basis[:, part], probe.gradient[None, part]
        along = g if image is None else torch.cat([g, image[None, part].to(g)])
        squares = v.square()
        fourth_powers = inner_products(squares, squares).diagonal()
        return torch.cat([inner_products(v, v).flatten(), fourth_powers, inner_products(g, along)[0]])

    k = len(basis)
    gram, fourth_powers, along = grouping.sums(probe.partition, values).tensor_split([k * k, k * k + k], dim=1)
    square = float(along[:, 0].sum())
    rows = {"gradient": along[:, 0] / square}
    if image is not None:
        rows["gradient_curvature"] = along[:, 1] / square**0.5
    if space is not None and k:
        gram = gram.view(-1, k, k)
        shares, sizes = gram.diagonal(dim1=1, dim2=2), space.eigenvalues.abs()
        rows["participation"] = shares.mean(dim=1)
        rows["participation_weighted"] = shares @ sizes / sizes.sum()
        rows[FOURTH_POWERS] = fourth_powers.mean(dim=1)
        if probe.which == "LA":
            rows["block_sharpness"] = _block_sharpness(space, gram)
    return {name: row.tolist() for name, row in rows.items()}


def _block_sharpness(space: Subspace, gram: Tensor) -> Tensor:  # (groups, k, k) to (groups,)
    """Largest eigenvalues of blocks of sum_i lambda_i v_i v_i^T.

    nan where what is behind the pairs may be more.
    """
    root = space.eigenvalues.clamp(min=0.0).sqrt()
    found = torch.linalg.eigvalsh(root[:, None] * gram * root)[:, -1]
    rest = space.largest_next if math.isnan(space.next_eigenvalue) else space.next_eigenvalue
    return torch.where((found > 0.0) & ~(found < CLEAR * rest), found, math.nan)  # a rest of nan: there is none, k = n


def _exact_block(probe: Probe, members: set[str]) -> float:
    """Largest eigenvalue of a block of H, or 0 where negative."""
    places = [slice(place.start, place.stop) for name, _, place in probe.partition.locate() if name in members]

    def inside(v: Tensor) -> Tensor:
        kept = torch.zeros_like(v)
        for place in places:
            kept[place] = v[place]
        return kept

    found = probe.solve(lambda v: inside(probe.operator.matvec(inside(v))), k=1)
    return float(found.eigenvalues[0]) if found.converged else math.nan


def _shares(probe: Probe, grouping: Grouping, vector: Tensor) -> list[float]:
    """|v_l|^2 / |v|^2 of each group; nan for v = 0."""

    def values(part: slice) -> Tensor:
        return inner_products(vector[None, part], vector[None, part])[0]

    squares = grouping.sums(probe.partition, values)[:, 0]
    return (squares / squares.sum()).tolist()


def _table(grouping: Grouping, rows: Mapping[str, Sequence[float]]) -> Table:
    known = {name: rows[name] for name in IN_TABLE if name in rows}
    return Table.of(grouping.names, {**known, "null": grouping.shares})


def _keyed(grouping: Grouping, rows: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {
        f"{NAME}/{name}/{group}": value
        for name, row in rows.items()
        for group, value in zip(grouping.names, row, strict=True)
    }
