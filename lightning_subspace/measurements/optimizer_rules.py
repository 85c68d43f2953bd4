"""Stability edge and next step of the optimizer, from its rule.

How an edge follows from a rule: on a quadratic with curvature h along a direction, with the preconditioner P held fixed
(and schedules with it), a step is a linear recursion in (theta, momentum). Its characteristic polynomial z^2 - p z + q
has both roots inside the unit circle while |q| < 1 and |p| < 1 + q. In each rule here -p < 1 + q fails first, at
z = -1, as h grows: the threshold is where the iterate flips its sign at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adamax, NAdam, Optimizer, RAdam, RMSprop

from lightning_subspace.measurements.base import Probe
from lightning_subspace.measurements.optimizer_view import Diagonal, OptimizerView, Settings
from lightning_subspace.measurements.optimizer_view import why_unknown as why_unknown
from lightning_subspace.state.notice import warn

RECTIFIED = 5.0  # RAdam divides by a second moment once its length of average is above this
# Optimizers whose steps have a length of their own, whatever the gradient: no eigenvalue is a threshold for them.
FIXED_LENGTHS = {
    "Lion": "Lion moves every coordinate by the same length, so that no eigenvalue is a threshold for it",
    "Muon": "Muon moves every matrix by the same length, so that no eigenvalue is a threshold for it "
    "(SpectralSharpness measures in its norm)",
}


@dataclass(frozen=True)
class StabilityEdge:
    """Curvature at which an optimizer becomes unstable.

    There the largest eigenvalue of S (H + D) is 1. On a quadratic, full-batch steps with heavy-ball momentum b and
    learning rate r diverge above H + D = (2 + 2 b) / r. Where steps are divided by P, coordinate by coordinate, that
    holds for P^-1 (H + D). S is P^-1 over the threshold.

    Attributes:
        scale: the diagonal of S; 0 for a parameter that is not moved.
        shift: the diagonal of D, the weight decay that is added to the gradient, without the decoupled one of `AdamW`.
        threshold: for P^-1 H; nan where parameter groups differ in it.
    """

    scale: Diagonal
    shift: Diagonal
    threshold: float


def edge(probe: Probe) -> StabilityEdge | None:
    """Stability edge at the present learning rates, or None if unknown.

    With lr the rate, b a momentum, and state and schedules of the last step taken, the t-th:

    - SGD: 2/lr; (2 + 2b)/lr with heavy-ball momentum, (2 + 2b)/(lr (1 + 2b)) with Nesterov's (Cohen et al. 2021, arXiv
      2103.00065, appendix B).
    - RMSprop: (2 + 2b)/lr with P = sqrt(v) + eps.
    - Adam, AdamW: (2 + 2b)/((1 - b) lr), as their momentum is an average, with P = (1 - b^t) (sqrt(v^) + eps) (Cohen
      et al. 2022, arXiv 2207.14484, section 2). Adamax: the same with P = (1 - b^t) u, u the decaying maximum.
    - RAdam: the same with P = (1 - b^t) (sqrt(v) + eps) / (r sqrt(1 - b2^t)), r its rectification; 1 - b^t before that.
    - NAdam: theta' = theta - (a h theta + c m')/P with m' = b m + (1 - b) h theta has q = b (1 - a h) and
      p = 1 + b - h (a + c (1 - b)), so the edge is (2 + 2b)/(a (1 + b) + c (1 - b)) with P = sqrt(v^) + eps. In torch
      a = lr (1 - mu_t)/(1 - prod_t mu), c = lr mu_(t+1)/(1 - prod_(t+1) mu): late (2 + 2b)/(lr (1 - b) (1 + 2b)).
    - Adagrad: 2 (1 + (t - 1) lr_decay)/lr with P = sqrt(sum of squares) + eps. P grows with every step.
    """
    view = OptimizerView.of(probe)
    if view is None or not any(view.moved):
        return None
    kind, moved = type(view.optimizer), view.spread(view.moved)
    ages = view.age.clamp(min=1.0) if isinstance(view.age, Tensor) else max(view.age, 1.0)
    divisor: Diagonal = 1.0
    if kind is SGD:
        thresholds = view.setting(_sgd_threshold)
    elif kind is RMSprop:
        divisor = (view.state("square_avg") - view.state("grad_avg").square()).clamp(min=0.0).sqrt()
        divisor += view.setting("eps")
        thresholds = view.setting(lambda group: (2.0 + 2.0 * group["momentum"]) / _rate(group))
    elif kind is Adagrad:
        divisor = view.state("sum").sqrt() + view.setting("eps")
        thresholds = 2.0 * (1.0 + (ages - 1.0) * view.setting("lr_decay")) / view.setting(_rate)
    elif kind is NAdam:
        divisor = (view.state("exp_avg_sq") / (1.0 - view.setting("beta2") ** ages)).sqrt() + view.setting("eps")
        thresholds = view.each(_nadam_threshold)
    else:
        thresholds = view.setting(lambda g: (2.0 + 2.0 * g["beta1"]) / ((1.0 - g["beta1"]) * _rate(g)))
        if kind is Adamax:
            divisor = view.state("exp_inf")
        elif kind is RAdam:
            divisor = _rectified(view, view.state("exp_avg_sq"), ahead=0.0)
        else:
            key = "max_exp_avg_sq" if any("max_exp_avg_sq" in state for state in view.states) else "exp_avg_sq"
            divisor = (view.state(key) / (1.0 - view.setting("beta2") ** ages)).sqrt() + view.setting("eps")
        divisor = divisor * (1.0 - view.setting("beta1") ** ages)
    if isinstance(moved, Tensor) and isinstance(divisor, Tensor):
        divisor = torch.where(moved > 0.0, divisor, 1.0)  # there is no state at the others, and 0 / 0 is no 0
    threshold = float("nan") if isinstance(thresholds, Tensor) else thresholds
    return StabilityEdge(moved / (divisor * thresholds), view.setting("coupled_decay"), threshold)


def next_step(probe: Probe) -> Tensor | None:  # (n,)
    """Next step with the mean gradient, or None if unknown."""
    view = OptimizerView.of(probe)
    if view is None:
        return None
    rates, kind = view.setting("lr"), type(view.optimizer)
    theta = probe.partition.flatten(probe.parameters, like=probe.gradient)
    gradient = probe.gradient + theta * view.setting("coupled_decay")
    if kind is SGD:
        keep, is_nesterov = view.setting("momentum"), view.setting("nesterov")
        velocity = keep * view.state("momentum_buffer") + gradient
        return -rates * (is_nesterov * (gradient + keep * velocity) + (1.0 - is_nesterov) * velocity)
    if kind is RMSprop:
        keep = view.setting("alpha")
        square = keep * view.state("square_avg") + (1.0 - keep) * gradient.square()
        mean = keep * view.state("grad_avg") + (1.0 - keep) * gradient
        centred = view.setting("centered") * mean.square()
        divisor = (square - centred).clamp(min=0.0).sqrt() + view.setting("eps")
        return -rates * (view.setting("momentum") * view.state("momentum_buffer") + gradient / divisor)
    if kind is Adagrad:
        first_sum = view.optimizer.defaults["initial_accumulator_value"]
        total = view.state("sum") + view.each(lambda _, state: 0.0 if "sum" in state else first_sum)
        divisor = (total + gradient.square()).sqrt() + view.setting("eps")
        return -rates / (1.0 + view.age * view.setting("lr_decay")) * gradient / divisor
    decay = (view.setting("weight_decay") - view.setting("coupled_decay")) * theta
    return -rates * (_adaptive(view, gradient) + decay)


def _adaptive(view: OptimizerView, gradient: Tensor) -> Tensor:
    """What a member of Adam's family multiplies its rate with."""
    kind, eps = type(view.optimizer), view.setting("eps")
    first, second, ages = view.setting("beta1"), view.setting("beta2"), view.age + 1.0
    mean = first * view.state("exp_avg") + (1.0 - first) * gradient
    if kind is Adamax:
        largest = torch.maximum(second * view.state("exp_inf"), gradient.abs() + eps)
        return mean / (1.0 - first**ages) / largest
    square = second * view.state("exp_avg_sq") + (1.0 - second) * gradient.square()
    if kind is RAdam:
        return mean / (1.0 - first**ages) / _rectified(view, square, ahead=1.0)
    if kind is NAdam:
        divisor = (square / (1.0 - second**ages)).sqrt() + eps
        own, averaged = (view.each(lambda g, s, i=i: _nadam_weights(g, s, ahead=1.0)[i]) for i in (0, 1))  # type: ignore[misc]
        return (own * gradient + averaged * mean) / divisor
    square = torch.maximum(square, view.state("max_exp_avg_sq")) / (1.0 - second**ages)
    return mean / (1.0 - first**ages) / (square.sqrt() + eps)


def sgd_threshold(optimizer: Optimizer | None) -> float | None:
    """Largest curvature that is stable in all groups of an SGD.

    As `edge` at the present learning rates, less the weight decay, which `SGD` adds to the curvature of the loss. None
    for another optimizer, and where the weight decay alone is unstable.

    Example:
        >>> sgd_threshold(SGD([torch.zeros(1)], lr=0.1, momentum=0.5))
        30.0
    """
    if type(optimizer) is not SGD or why_unknown(optimizer) is not None:
        return None
    moved = [group for group in optimizer.param_groups if float(group["lr"]) > 0.0]
    threshold = min((_sgd_threshold(group) - float(group["weight_decay"]) for group in moved), default=0.0)
    return threshold if threshold > 0.0 else None


def why_no_edge(optimizer: Optimizer | None) -> str | None:
    """Reason, in a sentence, why there is no stability edge, or None.

    Example:
        >>> why_no_edge(SGD([torch.zeros(1)], lr=0.1)) is None
        True
    """
    return FIXED_LENGTHS.get(type(optimizer).__name__) or why_unknown(optimizer)


@dataclass
class Notice:
    """A warning that is given once, on the first rank."""

    is_given: bool = False

    def say(self, probe: Probe, text: str) -> None:
        """Warn, at the first call."""
        if not self.is_given and probe.partition.ranks.index == 0:
            warn(text, stacklevel=3)
        self.is_given = True


def _rate(group: Settings) -> float:
    """The learning rate; 1 for 0, since `moved` excludes such groups."""
    return float(group["lr"]) or 1.0


def _sgd_threshold(group: Settings) -> float:
    """Largest stable H + D of a moved group under SGD."""
    momentum = float(group["momentum"])
    return (2.0 + 2.0 * momentum) / (_rate(group) * (1.0 + 2.0 * momentum if group["nesterov"] else 1.0))


def _nadam_threshold(group: Settings, state: Settings) -> float:
    """Largest stable P^-1 (H + D) of a moved parameter under NAdam."""
    momentum = float(group["beta1"])
    own, averaged = _nadam_weights(group, state, ahead=0.0)
    return (2.0 + 2.0 * momentum) / (_rate(group) * (own * (1.0 + momentum) + averaged * (1.0 - momentum)))


def _nadam_weights(group: Settings, state: Settings, ahead: float) -> tuple[float, float]:
    """Weights of gradient and average in NAdam's last or next (`ahead`) step."""

    def momentum(number: float) -> float:  # of a step; 0.96 is Dozat's, and torch's
        decay: float = 0.96 ** (number * float(group["momentum_decay"]))
        return float(group["beta1"]) * (1.0 - 0.5 * decay)

    step = float(state.get("step", 0.0)) + ahead
    if step == 0.0:  # not moved yet
        return 1.0, 0.0
    product = torch.as_tensor(state.get("mu_product", torch.ones((), dtype=torch.float32)))
    taken = float(product * momentum(step) if ahead else product)  # in float32, as torch keeps it
    following = momentum(step + 1.0)
    return (1.0 - momentum(step)) / (1.0 - taken), following / (1.0 - taken * following)


def _rectified(view: OptimizerView, square: Tensor, ahead: float) -> Tensor:
    """Divisor of RAdam's mean in its last or next (`ahead`) step."""

    def factor(group: Settings, state: Settings) -> float:  # 0 before the second moment is used
        beta, step = group["beta2"], max(float(state.get("step", 0.0)) + ahead, 1.0)
        longest = 2.0 / (1.0 - beta) - 1.0
        corrected = 1.0 - beta**step
        length = longest - 2.0 * step * beta**step / corrected
        if length <= RECTIFIED:
            return 0.0
        share = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
        return float((share * corrected) ** 0.5)

    factors = view.each(factor) * torch.ones_like(square)
    return torch.where(factors > 0.0, (square.sqrt() + view.setting("eps")) / factors, 1.0)
