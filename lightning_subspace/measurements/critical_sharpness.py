"""Critical sharpness: how far the loss falls along the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_subspace._arguments import require_integer, require_word
from lightning_subspace.measurements.base import Measurement, Needs, Probe
from lightning_subspace.measurements.optimizer_rules import Notice, next_step, why_unknown
from lightning_subspace.measurements.prospect import Prospect

Along = Literal["update", "gradient", "taken"]

TOLERANCE = 0.02  # relative, of the multiple of a step
FACTOR = 4.0  # the multiple changes by at most this from one evaluation to the next, until it is bracketed
ROUNDING = 20.0  # a change of the loss below this, times eps and the loss, may be rounding


class CriticalSharpness(Measurement):
    """`critical_sharpness`, `critical_step`: distance along the step at which the loss rises.

    Let u be the step that the optimizer would take from theta with the mean gradient, and a the smallest multiple at
    which L(theta + a u) > L(theta). `critical_step` is a: below 1 the step raises the loss. `critical_sharpness` is
    2 / (a lr), in units of an eigenvalue (Kalra et al. 2026, arXiv 2601.16979, section 2): for gradient descent on a
    quadratic it is g.Hg / |g|^2, at most lambda_1. It needs no second derivatives and no eigenvectors (k = 0).

    Costs one forward pass over the Hessian's sample for each point: 3 on a quadratic, at most `max_points`, and one for
    the loss at theta. The search starts at the multiple of the last probe and uses the secant of
    (L(theta + a u) - L(theta)) / a, which is a straight line on a quadratic. It misses a bump between its points.
    Dropout masks stay. Of several learning rates lr is the largest. Left out where the step is no direction of descent,
    where the loss does not rise within `max_points`, where its changes are rounding, and, with one warning, for an
    unknown optimizer.

    Args:
        along: "update" of the optimizer in use (those that `Stability` knows), with its momentum, preconditioner and
            weight decay; "gradient" for u = -g, lr = 1, and no `critical_step`; "taken" for the step that was taken, of
            any optimizer and with the noise of its batch, where the loss is the same one after it. Several optimizers
            have no one lr: for them there is `critical_step` alone.
        max_points: displaced points at most, 2 or more.

    Raises:
        ValueError: for another `along`, or `max_points` that is no integer of at least 2.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=0, measurements=[CriticalSharpness()])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self, along: Along = "update", max_points: int = 10) -> None:
        require_word("along", along, get_args(Along))
        self.along = along
        self.max_points = int(require_integer("max_points", max_points, 2))
        self._last: tuple[int, float, float] | None = None  # step, first point and result of the last search
        self._notice = Notice()

    def expected_products(self, prospect: Prospect) -> float:
        """A few forward passes, each a fifth of a product or so."""
        return 1.0

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """A few forward passes over the Hessian's sample."""
        if probe.number == 0:
            self._last = None
        if self.along == "taken":
            return {}
        rate, step = 1.0, -probe.gradient
        if self.along == "update":
            update = next_step(probe)
            if update is None or probe.optimizer is None:
                reason = why_unknown(probe.optimizer)
                text = f"CriticalSharpness: {reason}, so that it is left out; pass along='taken' or 'gradient'."
                self._notice.say(probe, text)
                return {}
            rate, step = largest_rate(probe.optimizer), update
        slope = probe.dot(probe.operator.gradient(), step)
        if not slope < 0.0:
            return {}
        loss = probe.operator.value(None)
        rounding = ROUNDING * torch.finfo(probe.operator.dtype).eps * abs(loss)
        first = 1.0 if self.along == "update" else 0.1 / probe.norm(step)
        return self._found(probe, lambda a: probe.operator.value(step * a) - loss, slope, first, rate, rounding)

    def after_step(self, probe: Probe, gradient: Tensor | None, update: Tensor) -> Mapping[str, float]:
        """A few forward passes, along the step that was taken."""
        arrival = probe.arrival
        if self.along != "taken" or arrival is None or probe.sample_gradient is None:
            return {}
        slope = probe.dot(probe.sample_gradient, update)
        if not slope < 0.0 or not arrival.is_same_loss:
            return {}

        def change(a: float) -> float:
            return arrival.value(update * (a - 1.0)) - arrival.loss

        rate = None if probe.optimizer is None else largest_rate(probe.optimizer)
        return self._found(probe, change, slope, 1.0, rate, arrival.rounding)

    def _found(
        self,
        probe: Probe,
        change: Callable[[float], float],
        slope: float,
        first: float,
        rate: float | None,  # None: there is no one learning rate, only a multiple of the step
        rounding: float,
    ) -> dict[str, float]:
        """Search along a step, from the last multiple found."""
        start = first
        if self._last is not None:  # a probe that is taken again behind a checkpoint starts where it did
            start = self._last[1] if self._last[0] == probe.step else self._last[2]
        found = critical_multiple(change, slope, start, self.max_points, rounding)
        if found is None:
            return {}
        self._last = probe.step, start, found
        metrics = {} if rate is None else {"critical_sharpness": 2.0 / (found * rate)}
        return metrics if self.along == "gradient" else {**metrics, "critical_step": found}

    def state_dict(self) -> Mapping[str, Any]:
        """Where the last search was, and what it found."""
        return {} if self._last is None else dict(zip(("step", "start", "found"), self._last, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start the next search there."""
        step, start, found = (state.get(name) for name in ("step", "start", "found"))
        are_points = all(isinstance(point, float) and 0.0 < point < math.inf for point in (start, found))
        if state and not (isinstance(step, int) and are_points):
            raise ValueError(f"step, start, found: expected a step and two positive numbers, got {dict(state)!r:.80}")
        self._last = (step, start, found) if state else None  # type: ignore[assignment]


def largest_rate(optimizer: Optimizer) -> float:
    """The largest learning rate."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def critical_multiple(
    change: Callable[[float], float], slope: float, start: float, max_points: int, rounding: float = 0.0
) -> float | None:
    """Smallest a with change(a) > 0, to 2 %, or None.

    Args:
        change: with change(0) = 0; a value that is not finite counts as a rise.
        slope: its derivative at 0, negative.
        start: the first a tried.
        max_points: evaluations at most.
        rounding: changes below it are not trusted.

    Example:
        >>> critical_multiple(lambda a: -2.0 * a + 0.5 * a * a, slope=-2.0, start=1.0, max_points=10)
        4.0
    """
    # phi(a) = change(a) / a rises through zero at the multiple sought, and is a straight line for a quadratic.
    low, high = (0.0, slope), (math.inf, math.inf)
    a = start
    for _ in range(max_points):
        difference = change(a)
        phi = difference / a if math.isfinite(difference) else math.inf
        if phi <= 0.0:
            low = (a, phi)
        else:
            high = (a, phi)
        is_near = abs(phi) <= TOLERANCE * abs(slope)
        if is_near or high[0] <= low[0] * (1.0 + TOLERANCE):
            if rounding >= TOLERANCE * abs(slope) * a:
                return None
            return a * slope / (slope - phi) if is_near else math.sqrt(low[0] * high[0])
        a = _next(low, high, slope)
    return None


def _next(low: tuple[float, float], high: tuple[float, float], slope: float) -> float:
    """The next point: the root of the secant, kept within bounds."""
    if math.isinf(high[0]):
        bend = (low[1] - slope) / low[0]
        return min(max(-slope / bend if bend > 0.0 else math.inf, 1.05 * low[0]), FACTOR * low[0])
    if math.isinf(high[1]):  # the loss is not finite there, so that there is no secant
        return math.sqrt(max(low[0], high[0] / FACTOR**2) * high[0])
    width = high[0] - low[0]
    a = low[0] - low[1] * width / (high[1] - low[1])
    return max(min(max(a, low[0] + 0.1 * width), high[0] - 0.1 * width), high[0] / FACTOR**2)
