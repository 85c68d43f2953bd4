"""Slices of the loss along the top eigenvectors of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_subspace._arguments import is_integer, is_list_like, require_flag, require_integer, require_number, wrong
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.memory import remember
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.measurements.slices_state import decode_slices, encode_slices
from lightning_subspace.subspace.loss_slices import LossSlices, grid, slice_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORWARD = 0.2  # of a Hessian product: a forward pass is .4 of a gradient, a product 1.5 to 2.3 gradients


class Slices(Measurement):
    """The loss along v_1, v_2, v_3 and on (v_1, v_2).

    phi_i(a) = L(theta + a v_i) and L + a g.v_i + a^2 lambda_i / 2 for a in [-a_i, a_i], with a_i = sqrt(2 c/|lambda_i|)
    and c = `share` |L|: the quadratic term is c at both ends, so that `share` 1 shows the whole valley and .1 the range
    of the model. Rescaling weights that the loss does not depend on by scale leaves the picture the same, without
    normalising filters. The gradient, the Hessian and L are those of the Hessian's sample; v_i points uphill.

    `slices/even_1`, `_2`, `_3`: the even part at the ends over the quadratic, (phi(a) + phi(-a) - 2 L) / (2 c): 1 for a
    quadratic, below 1 where the walls are lower, above 1 where they are steeper. Kinks of ReLU, which the Hessian does
    not see, make it 1.5 to 3 early in training. `slices/range_1`, ...: a_i, a length in the space of all parameters.
    `history` has a `LossSlices` a probe, with all points. A figure goes to loggers that take figures.

    With batch normalisation in train mode L depends on how the examples are batched: these slices are with the
    micro-batches of the eigensolve, their own statistics, and running statistics as they were. `mode="eval"` shows
    another function. Dropout masks are the same at all points.

    Costs 1 + d (p - 1) forward passes over the Hessian's sample for d directions of p points, and (p - 1)^2 for the
    plane: 131 in all, 25 to 50 products, and two vectors of length n. On several ranks each evaluates its part of the
    sample, also on the shards of FSDP2. Left out where the eigensolver did not converge, and where L or lambda_i is 0.

    Args:
        at: the steps to take it at: each at the first probe at or after it; None: at every probe.
        directions: d, the number of eigenvectors; all where there are fewer.
        share: c over the loss.
        points: p, of a line, and along each side of the plane; odd, as theta is one of them.
        plane: False leaves out the plane.
        every: taken at each probe whose number is a multiple of this.
        keep: slices kept in `history` at most; with more, every second one of its older half is dropped.

    Raises:
        ValueError: for `at` that is not a list of steps, `directions`, `every` or `keep` that is not a positive
            integer, `share` that is not a positive number, `points` that is not an odd integer of at least 3, or
            `plane` that is not True or False.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> slices = Slices(at=[0, 500])
        >>> monitor = SubspaceMonitor(k=10, every_n_steps=100, measurements=[slices])
        >>> len(slices.history)
        0
    """

    needs: ClassVar[Needs] = Needs.EIGENVALUES

    def __init__(
        self,
        at: Sequence[int] | None = None,
        directions: int = 3,
        share: float = 1.0,
        points: int = 11,
        plane: bool = True,
        every: int = 1,
        keep: int = 20,
    ) -> None:
        self.at = _require_steps(at)
        self.directions = positive("directions", directions)
        self.share = require_number("share", share, "a positive number", lambda x: 0.0 < x < math.inf)
        if not require_integer("points", points, 3) % 2:
            raise wrong("points", "an odd integer of at least 3", points)
        self.points = int(points)
        require_flag("plane", plane)
        self.plane = plane
        self.every = positive("every", every)
        self.keep = positive("keep", keep)
        self._history: list[LossSlices] = []
        self._drawn = -1  # step of the last figure

    @property
    def history(self) -> Sequence[LossSlices]:
        """The slices of this run, oldest first."""
        return tuple(self._history)

    def expected_products(self, prospect: Prospect) -> float:
        """The forward passes; none where they are few steps of many."""
        if self.at is not None and not (prospect.number == 0 and 0 in self.at):
            return 0.0
        directions, sides = min(self.directions, prospect.solver.k), self.points - 1
        has_plane = self.plane and directions > 1
        return FORWARD * (1 + directions * sides + has_plane * sides**2)

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Forward passes over the Hessian's sample."""
        if probe.number == 0:
            self._history.clear()
        if not self._is_due(probe):
            return {}
        found = self._slices(probe)
        if found is None:
            return {}
        remember(self._history, found, self.keep)
        return found.metrics()

    def state_dict(self) -> Mapping[str, Any]:
        """The history."""
        return encode_slices(self._history)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a history."""
        self._history = decode_slices(state, self.keep)
        self._drawn = -1

    def figures(self) -> Iterator[tuple[str, int, Figure]]:
        """New slices: each of the listed steps, or else the last."""
        new = [slices for slices in self._history if slices.step > self._drawn]
        if new:
            from lightning_subspace.report.slices_figure import slices_figure  # matplotlib takes a while to import

            self._drawn = new[-1].step
            for slices in new if self.at is not None else new[-1:]:
                yield "slices", slices.step, slices_figure(slices)

    def plot(self) -> Figure:
        """A matplotlib Figure: the last slices."""
        from lightning_subspace.report.slices_figure import slices_figure  # matplotlib takes a while to import

        return slices_figure(self._history[-1] if self._history else None)

    def _is_due(self, probe: Probe) -> bool:
        """Whether a listed step has come since the last probe."""
        last = probe.history[-1].step if probe.history else -1
        return self.at is None or any(last < step <= probe.step for step in self.at)

    def _slices(self, probe: Probe) -> LossSlices | None:
        operator, top = probe.operator, probe.top
        count = min(self.directions, top.k)
        gradient, loss = operator.gradient(), operator.value(None)
        values = [float(value) for value in top.eigenvalues[:count]]
        ranges = [slice_range(self.share, loss, value) for value in values]
        if not math.isfinite(loss) or any(map(math.isnan, ranges)):
            return None
        slopes = [probe.dot(gradient, v) for v in top.basis[:count]]
        # An eigenvector has no sign of its own; uphill it has one that does not depend on the solver.
        sides = [v * math.copysign(a, slope) for v, a, slope in zip(top.basis, ranges, slopes, strict=False)]
        lines = self._lines(probe, loss, sides)
        return LossSlices(
            step=probe.step,
            loss=loss,
            eigenvalues=torch.tensor(values, dtype=torch.float64),
            slopes=torch.tensor(slopes, dtype=torch.float64).abs(),
            ranges=torch.tensor(ranges, dtype=torch.float64),
            lines=lines,
            plane=self._plane(probe, lines, *sides[:2]) if self.plane and count > 1 else None,
        )

    def _lines(self, probe: Probe, loss: float, sides: Sequence[Tensor]) -> Tensor:  # (d, p)
        units = grid(self.points).tolist()
        rows = [[probe.operator.value(side * x) if x else loss for x in units] for side in sides]
        return torch.tensor(rows, dtype=torch.float64)

    def _plane(self, probe: Probe, lines: Tensor, across: Tensor, up: Tensor) -> Tensor:  # (p, p)
        """Its axes are two of the lines."""
        units, middle = grid(self.points).tolist(), self.points // 2
        found = torch.empty(self.points, self.points, dtype=torch.float64)
        found[middle], found[:, middle] = lines[0], lines[1]
        for row, y in enumerate(units):
            for column, x in enumerate(units):
                if x and y:
                    found[row, column] = probe.operator.value(across * x + up * y)
        return found


def _require_steps(at: Any) -> tuple[int, ...] | None:
    if at is None:
        return None
    found = tuple(at) if is_list_like(at) else ()
    if not found or not all(is_integer(step) and step >= 0 for step in found):
        raise wrong("at", "a list of steps, at least one, or None", at)
    return tuple(sorted(set(map(int, found))))
