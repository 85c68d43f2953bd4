"""Gain, curvature and stability of the step that was taken.

For u = theta_{t+1} - theta_t, of any optimizer, with g and L of the probe's samples and not of the batch of the step.
By values of the loss alone:

    change    D = L(theta + u) - L(theta)
    curvature kappa = 2 (D - g.u) / |u|^2, the mean of u.H(theta + s u)u / |u|^2 over s in [0, 1] with weight 2 (1 - s)
    ratio     rho = (D - g.u) / (-g.u) = 1 - D / (g.u)

so that where the step descends, g.u < 0, rho > 1 just where it has raised the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_subspace._arguments import require_flag
from lightning_subspace.measurements.arrival import Arrival
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace.record import Record

CHECKED_EVERY = 5  # probes, where the loss is known to be the same before and after a step


class Step(Measurement):
    """`step/...`: gain, loss change, curvature and edge ratio of a step.

    By one forward pass, for any optimizer, without second derivatives (k = 0 too):

    - `step/gain`: -g.u, what the loss falls by to first order; in units of the loss.
    - `step/change`: L(theta + u) - L(theta), over the Hessian's sample; positive where the step has raised the loss.
    - `step/curvature`: 2 (change - g.u)/|u|^2, the loss's secant along the step, in units of an eigenvalue. It sees the
      kinks of ReLU, which the Hessian does not.
    - `step/edge_ratio`: rho = 1 - change/(g.u): the second order of the change over the first. With the full batch it
      is 1 at the edge of stability, for any optimizer (GD: u.Hu/(2|u|^2/lr)); with mini-batches it is 1 where the loss
      oscillates as fast as it falls, which is no edge. Of a single step with momentum it is erratic.
    - `step/edge_ratio_pooled`: the sum of the second orders over the sum of the gains, of the last `pool` probes; and
      `step/uphill`, the share of these probes whose step had no gain (`edge_ratio` is not defined there).
    - `step/norm`, `step/relative_norm`: |u|, and |u|/|theta|.
    - `step/cosine_previous`: of u with the update before, in [-1, 1]: 1 below the edge, -1 at the edge of gradient
      descent, 0 for independent steps. Where the step of a probe was not foreseen it is missing.

    u has all that the optimizer does: clipping, momentum, weight decay. Left out are change, curvature and ratio where
    the loss at theta is another one after the step (see `Arrival.is_same_loss`), and curvature and ratio where the
    second order is within the rounding of the loss, 20 eps L.

    Costs a forward pass over the Hessian's sample (on the shards of FSDP2 by differences a gradient), and one vector:
    the gradient over the Hessian's sample, where the gradient's is larger. The update before is kept on the CPU.

    Gain and directional sharpness: arXiv 2606.04662. On a quadratic the critical step along u (arXiv 2601.16979) is
    u/rho.

    Args:
        pool: number of probes for the pooled ratio.

    Raises:
        ValueError: for a `pool` that is not a positive integer.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=0, measurements=[Step(pool=10)])  # in place of the default one
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    extra: ClassVar[frozenset[str]] = frozenset(
        f"step/{name}"
        for name in ("gain", "change", "norm", "relative_norm", "cosine_previous", "edge_ratio_pooled", "uphill")
    )
    window: int = 1

    def __init__(self, pool: int = 20) -> None:
        self.pool = positive("pool", pool)
        self._before: tuple[int, Tensor] | None = None  # the last update before a probe, on the CPU
        self._is_same = False  # whether the loss was the same one before and after a step, when last looked at

    def expected_products(self, prospect: Prospect) -> float:
        """A forward pass, less than half of a product."""
        return 0.45

    def see_update(self, step: int, update: Tensor, partition: Partition) -> None:
        """Keep the update."""
        self._before = step, update.cpu()

    def after_step(self, probe: Probe, gradient: Tensor | None, update: Tensor) -> Mapping[str, float]:
        """One forward pass, and at some probes that of a micro-batch."""
        before = self._before[1] if self._before is not None and self._before[0] == probe.step else None
        if before is not None and before.shape != update.shape:  # of other parameters than are measured now
            before = None
        self._before = None
        arrival, slope = _known(probe)
        norm, start = probe.norm(update), probe.norm(arrival.theta)
        found = {"step/gain": -probe.dot(probe.gradient, update), "step/norm": norm}
        if start > 0.0:
            found["step/relative_norm"] = norm / start
        if probe.partition.ranks.all_reduce_min(int(before is not None)):
            found["step/cosine_previous"] = _cosine(probe, update, before)
        if norm == 0.0:
            return found
        if probe.number % CHECKED_EVERY == 0 or not self._is_same:
            self._is_same = arrival.is_same_loss
        if self._is_same:
            change = arrival.value() - arrival.loss
            found |= {"step/change": change, **bend(change, probe.dot(slope, update), norm, arrival.rounding)}
        earlier = probe.history[-(self.pool - 1) :] if self.pool > 1 else ()
        return found | pooled([*earlier, Record(probe.step, found)])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the update behind."""
        return {**vars(self), "_before": None}


class StepCurvature(Measurement):
    """`step/curvature_secant`, `step/edge_ratio_secant`: curvature of the step taken, by gradients.

    kappa_S = (g(theta + u) - g(theta)).u/|u|^2, the mean of u.H(theta + s u)u/|u|^2 over s in [0, 1], in units of an
    eigenvalue, from one gradient more: without second derivatives, so also under fused attention, compiled or sharded,
    with `curvature="none"`. Its difference from `step/curvature` is of third order. Where |u| is small it is far less
    sensitive to rounding. `step/edge_ratio_secant` is kappa_S |u|^2/(-2 g.u), left out where the step has no gain.

    With `hessian`, `step/curvature_hessian` and `step/edge_ratio_hessian` too: u.Hu/|u|^2 at theta, for a graph and a
    product; left out where products are differences of gradients. On a network of ReLU it misses the kinks that the
    step has crossed, and can be far below the secants.

    All over the Hessian's sample, as g. Left out where the loss is another one after the step, as in `Step`.

    Args:
        hessian: whether to take the product.
        every: taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for a `hessian` that is no truth value, or `every` that is not a positive integer.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=0, measurements=[StepCurvature(hessian=True)])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self, hessian: bool = False, every: int = 1) -> None:
        require_flag("hessian", hessian)
        self.hessian = hessian
        self.every = positive("every", every)

    def expected_products(self, prospect: Prospect) -> float:
        """A gradient, and a graph with a product."""
        return 0.7 + 1.7 * self.hessian

    def after_step(self, probe: Probe, gradient: Tensor | None, update: Tensor) -> Mapping[str, float]:
        """One gradient."""
        arrival, slope = _known(probe)
        norm, along = probe.norm(update), probe.dot(slope, update)
        if norm == 0.0 or not arrival.is_same_loss:
            return {}
        bends = {"secant": probe.dot(arrival.gradient(), update) - along}
        if self.hessian:
            bends["hessian"] = arrival.curvature()
        found = {f"step/curvature_{name}": value / norm**2 for name, value in bends.items()}
        if along < 0.0:
            found |= {f"step/edge_ratio_{name}": value / (-2.0 * along) for name, value in bends.items()}
        return found


def bend(change: float, slope: float, norm: float, rounding: float) -> dict[str, float]:
    """Curvature and edge ratio of a step, by its loss change.

    Args:
        change: of the loss.
        slope: g.u.
        norm: |u|, positive.
        rounding: a second order below it is not trusted.

    Example:
        >>> bend(change=-0.75, slope=-1.0, norm=0.5, rounding=0.0)  # u.Hu / 2 = .25
        {'step/curvature': 2.0, 'step/edge_ratio': 0.25}
    """
    second = change - slope
    if not abs(second) > rounding:
        return {}
    found = {"step/curvature": 2.0 * second / norm**2}
    return {**found, "step/edge_ratio": second / -slope} if slope < 0.0 else found


def pooled(records: Sequence[Record]) -> dict[str, float]:
    """Edge ratio over several probes, and the share without a gain.

    Example:
        >>> one = {"step/gain": 1.0, "step/norm": 1.0, "step/curvature": 3.0}
        >>> other = {"step/gain": -0.5, "step/norm": 1.0, "step/curvature": -2.0}
        >>> pooled([Record(0, one), Record(1, other)])
        {'step/uphill': 0.5, 'step/edge_ratio_pooled': 1.0}
    """
    wanted = ("step/gain", "step/norm", "step/curvature")
    known = [tuple(r.metrics[key] for key in wanted) for r in records if all(key in r.metrics for key in wanted)]
    if not known:
        return {}
    found = {"step/uphill": sum(gain <= 0.0 for gain, _, _ in known) / len(known)}
    gain, second = sum(gain for gain, _, _ in known), sum(kappa * norm**2 / 2.0 for _, norm, kappa in known)
    return {**found, "step/edge_ratio_pooled": second / gain} if gain > 0.0 else found


def _known(probe: Probe) -> tuple[Arrival, Tensor]:
    """The loss after the step, and the gradient before it."""
    assert probe.arrival is not None, "it is there in `after_step`"
    assert probe.sample_gradient is not None, "every probe has it"
    return probe.arrival, probe.sample_gradient


def _cosine(probe: Probe, update: Tensor, before: Tensor | None) -> float:
    assert before is not None, "on all ranks"
    before = before.to(update)
    lengths = probe.norm(update) * probe.norm(before)
    return min(max(probe.dot(update, before) / lengths, -1.0), 1.0) if lengths > 0.0 else math.nan
