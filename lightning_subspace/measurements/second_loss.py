"""A second loss beside the training loss, at the same parameters.

Its gradient is compared with that of training in all, inside the top space of the training Hessian, and in the bulk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sized
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_subspace._arguments import require_flag, require_function, require_loss
from lightning_subspace.curvature import Operator
from lightning_subspace.data.given import require_given_batches, sample_of_batches
from lightning_subspace.data.micro_batch import MicroBatch, Weight
from lightning_subspace.data.reading import READ_TIMEOUT, ReadProgress
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.loss_function import LossFunction
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.critical_sharpness import ROUNDING, critical_multiple, largest_rate
from lightning_subspace.measurements.gradient_pair import GradientPair, noise_of
from lightning_subspace.measurements.optimizer_rules import Notice, next_step, why_unknown
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.measurements.reliability import GRADIENT
from lightning_subspace.measurements.sample_loss import SampleMean, known_losses
from lightning_subspace.parallel.partition import Partition

MAX_POINTS = 10  # displaced points of the search for the critical step


class SecondLoss(Measurement):
    """`second/...`: another loss at the same parameters, such as validation.

    With g and g_b the gradients of the training loss L and of the second one L_b, P the projector on the top k
    eigenvectors of the *training* Hessian, and u the step that was taken:

    - `second/loss`: L_b, the mean over the batches.
    - `second/fraction`: |P g_b|^2 / |g_b|^2 in [0, 1], the second gradient's share in the training top space; k/n for a
      random vector.
    - `second/cosine`, `second/cosine_top`, `second/cosine_bulk`: cosines in [-1, 1] of g and g_b, of P g and P g_b, and
      of (1 - P) g and (1 - P) g_b; with k = 0 the bulk is everything (left out with `curvature="none"`). Inside the top
      space the two gradients oscillate together, and the first two tell the phase of that oscillation. The last one
      tells whether descent on L still lowers L_b: on overfitted digits it falls from .95 to 0 as the validation loss
      stops falling (`examples/reproduce/second_loss.py`).
    - `second/gain`: -g_b.u in units of the loss, the first-order decrease of L_b by the step. Of either sign from one
      step to the next: average it over probes.

    With `overlap=True`: `second/overlap` = Tr(P P_b)/k in [0, 1] for the top space of the second Hessian,
    `second/fraction_own` = |P_b g_b|^2 / |g_b|^2, `second/sharpness` = lambda_1 of the second Hessian, and
    `second/matvecs`, the products spent on it. Where `loss_fn` differs, these second derivatives are not self-checked.

    With `critical=True`: `second/critical_step` = a_b, the smallest multiple of the step from theta with the mean
    training gradient that raises L_b, and `second/critical_sharpness` = 2/(a_b lr), the relative critical sharpness
    (Kalra et al. 2026, arXiv 2601.16979). Defined only where the step is one of descent for L_b:
    `second/critical_undefined` is 1 where it is not, or where no a_b is found, else 0. Its mean over probes belongs
    beside any mean of the others, which is one over the fortunate steps. One step's value is erratic.

    Sampling noise: the bulk gradient is small and needs many examples, or its noise lowers `cosine_bulk`. Give all of
    the second set. With `reliability=True`, `second/reliability_bulk` and `second/training_reliability_bulk` estimate
    the share of |(1 - P) g|^2 that is no noise, for the two samples, from micro-batches, with the share of the training
    set that was seen taken into account; `second/cosine_bulk_corrected` is cosine_bulk / sqrt(product of the two)
    (Spearman 1904), at most 1 up to the errors of both; left out where one is not above .1. Ten micro-batches or more
    are needed for that, on both sides. A small 1 - f says nothing of this error.

    Dropout draws masks at the probe's seed, and batch-norm takes the statistics of the second batches: the module is in
    the mode of the monitor (`mode=`). For a loss in eval mode beside it, call `module.eval()` in `loss_fn`: it is put
    back behind each evaluation.

    Costs one gradient over the second set and 2k inner products; with `reliability` a gradient over the training sample
    besides; with `critical` 3 to 10 forward passes; with `overlap` an eigensolve. It holds n floats until the step is
    done, and the batches on the CPU; a loader is read once, at the first probe, by one of our own.

    Args:
        batches: a list of batches or of (batch, weight) pairs, or a loader. All ranks give the same ones.
        loss_fn: `loss_fn(module, batch, batch_idx) -> scalar`, by default the loss of the monitor.
        weight: share of a batch in the mean, by default its number of examples.
        every: taken at each probe whose number is a multiple of this.
        overlap: whether to find the second Hessian's top space.
        critical: whether to look for the critical step.
        reliability: whether to estimate the noise of both gradients.

    Raises:
        SampleError: for `batches` that are no loader or list.
        ValueError: for another argument of a wrong type or out of range.

    Example:
        >>> import torch
        >>> from lightning_subspace import SubspaceMonitor
        >>> validation = [(torch.randn(64, 20), torch.randint(3, (64,)))]
        >>> monitor = SubspaceMonitor(k=10, measurements=[SecondLoss(validation)])
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    extra: ClassVar[frozenset[str]] = frozenset(
        {"second/matvecs", "second/reliability_bulk", "second/training_reliability_bulk"}
    )

    def __init__(
        self,
        batches: Iterable[Any],
        loss_fn: LossFunction | None = None,
        weight: Weight | None = None,
        every: int = 1,
        *,
        overlap: bool = False,
        critical: bool = False,
        reliability: bool = False,
    ) -> None:
        require_given_batches("batches", batches)
        require_loss("loss_fn", loss_fn)
        require_function("weight", weight, ("batch",))
        for name, flag in (("overlap", overlap), ("critical", critical), ("reliability", reliability)):
            require_flag(name, flag)
        self.batches, self.loss_fn, self.weight = batches, loss_fn, weight
        self.every = positive("every", every)
        self.overlap, self.critical, self.reliability = overlap, critical, reliability
        self._read: tuple[MicroBatch, ...] = ()
        self._reader: tuple[int, int] | None = None  # rank and number of ranks that have read
        self._gradient: tuple[int, Tensor] | None = None  # step and g_b, until the step is done
        self._notice = Notice()

    def expected_products(self, prospect: Prospect) -> float:
        """A gradient over the second set, and what was asked for besides."""
        passes = _passes(self._read or self.batches, prospect)
        total = GRADIENT * passes
        if self.overlap:
            total += passes * (GRADIENT + prospect.solve())
        if self.critical:
            total += passes  # a few forward passes, each a fifth of a product or so
        if self.reliability:
            total += GRADIENT * (1.0 + len(prospect.sample.extra) / len(prospect.sample.hessian))
        return total

    def prepare(self, partition: Partition) -> None:
        """Read the batches, once for each number of ranks."""
        reader = partition.ranks.index, partition.ranks.count
        if self._reader != reader:
            progress = ReadProgress(READ_TIMEOUT)
            self._read = sample_of_batches(self.batches, self.weight, partition.ranks, progress).hessian
            self._reader = reader

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """A gradient over the second set."""
        self._gradient = None
        other = probe.another(self._read, self.loss_fn, products=self.overlap and probe.operator.has_products)
        gradient = other.gradient()
        pair = GradientPair.of(probe, gradient)
        loss = _loss(probe, other)
        metrics = {"loss": loss, **pair.metrics()}
        if self.reliability and pair.knows_bulk:
            own = noise_of(probe, other.batch_gradients(), gradient)
            training = noise_of(probe, probe.batch_gradients(), probe.gradient, probe.sample.gradient_share)
            metrics |= pair.corrected(training, own)
        if self.overlap and other.has_products and probe.subspace is not None:
            metrics |= _in_own_space(probe, other, gradient)
        if self.critical:
            metrics |= self._critical(probe, other, gradient, loss)
        self._gradient = probe.step, gradient
        return {f"second/{key}": value for key, value in metrics.items()}

    def after_step(self, probe: Probe, gradient: Tensor | None, update: Tensor) -> Mapping[str, float]:
        """An inner product."""
        held, self._gradient = self._gradient, None
        if held is None or held[0] != probe.step:
            return {}
        return {"second/gain": -probe.dot(held[1], update)}

    def state_dict(self) -> Mapping[str, Any]:
        """Nothing: what waits for the step is not of a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Forget the last probe."""
        self._gradient = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the examples behind, since they can be read again."""
        return {**vars(self), "_read": (), "_reader": None, "_gradient": None}

    def _critical(self, probe: Probe, other: Operator, gradient: Tensor, loss: float) -> dict[str, float]:
        """The multiple of the training step that raises the second loss."""
        step = next_step(probe)
        if step is None or probe.optimizer is None:
            text = (
                f"SecondLoss: {why_unknown(probe.optimizer)}, so that there is no critical step; pass critical=False."
            )
            self._notice.say(probe, text)
            return {}
        slope = probe.dot(gradient, step)
        found = None
        if slope < 0.0:
            rounding = ROUNDING * torch.finfo(other.dtype).eps * abs(loss)
            found = critical_multiple(lambda a: other.value(step * a) - loss, slope, 1.0, MAX_POINTS, rounding)
        if found is None:
            return {"critical_undefined": 1.0}
        sharpness = 2.0 / (found * largest_rate(probe.optimizer))
        return {"critical_undefined": 0.0, "critical_step": found, "critical_sharpness": sharpness}


def _loss(probe: Probe, other: Operator) -> float:
    """The second loss at theta, which the gradient has needed."""
    batches = other.batches
    mean = SampleMean.of(known_losses(other._loss, Sample(batches), probe.partition.ranks), batches).mean
    return mean if math.isfinite(mean) else other.value(None)


def _in_own_space(probe: Probe, other: Operator, gradient: Tensor) -> dict[str, float]:
    """Top space of the second Hessian beside that of training."""
    found = probe.solve(other)
    metrics = {"matvecs": float(found.num_matvecs)}
    if found.converged and probe.which in ("LA", "BE"):
        metrics["sharpness"] = found.reported.get(1, math.nan)
    if found.trusted:
        metrics["fraction_own"] = found.fraction(gradient)
        if probe.top.trusted:
            metrics["overlap"] = found.overlap(probe.top.basis)
    return metrics


def _passes(batches: Iterable[Any], prospect: Prospect) -> float:
    """Size of the second set over that of the Hessian's sample."""
    hessian = prospect.sample.hessian
    if isinstance(batches, tuple) and batches and isinstance(batches[0], MicroBatch):
        return float(sum(batch.size for batch in batches) / max(sum(batch.size for batch in hessian), 1))
    return len(batches) / len(hessian) if isinstance(batches, Sized) else 1.0  # not read yet
