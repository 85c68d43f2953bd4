"""Error bar of the gradient fraction, for the choice of the sample."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_subspace.data.sample import Sample
from lightning_subspace.measurements.base import Measurement, Probe, positive
from lightning_subspace.measurements.batch_products import BatchProducts
from lightning_subspace.measurements.prospect import Prospect

STANDARD_ERRORS = 2.0  # of the gradient's noise, on each side of the band
SPREADS = 3.0  # multiples of the change by halving the sample; more than those, since only two halves estimate it
# The same for repeated draws. Their halves have all examples in common and differ by an error e of first order; f is
# off by another one of the same size, which is below 6 |e| in 89 % of all cases (2/pi arctan 6), below 3 |e| in 80 %.
# For a network of 19 parameters and 8 draws of 20 points each, the band with 3 |e| covered 88 to 93 %.
SPREADS_OF_DRAWS = 6.0
GRADIENT = 0.7  # cost in products with the Hessian, which take as long as 1.2 to 2 gradients


class Reliability(Measurement):
    """`reliability`, `gradient_fraction_low`, `gradient_fraction_high`: the error of f = `gradient_fraction`.

    `reliability` in [0, 1] is the share of one half's gradient in the top space of the *other* half of the Hessian's
    sample. The halves have no example in common, so that the space is not fitted to the gradient's noise.

    The fraction of the whole training set is expected between low and high. Two things move f away from it:

    - Noise in the gradient. The micro-batches b of the gradient sample, with weights w_b, give the standard error of f
      by the delta method, from d_b = 2 (Pg.g_b - |Pg|^2 - f (g.g_b - |g|^2)) / |g|^2, and the bias: the noise adds
      sum w_b^2 |P(g_b - g)|^2 to |Pg|^2, and likewise to |g|^2. The band reaches over f and the f without that bias.
    - Noise in the space. The fractions of the same g in the spaces of the two halves show how much f changes when the
      sample is cut in two; errors go with one over the number of examples, so f is about as far from its limit. For
      repeated draws of the same examples the margin is twice as wide (see `SPREADS_OF_DRAWS`).

    Both are scaled down by the share of the training set that was not sampled (finite population correction).
    `tests/measurements/test_reliability.py` measures how often the band covers the truth. Costs two eigensolves on half
    of the sample and a pass over the gradient sample. Left out when a sample is the whole training set, or a single
    micro-batch, or where the space of a half is not trusted, which is told once a run. Of a loss that is random beside
    its examples no sample is the whole; its repeated draws count as micro-batches, and have no random numbers in
    common.

    Args:
        every: taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for an `every` that is not a positive integer.
    """

    def __init__(self, every: int = 5) -> None:
        self.every = positive("every", every)

    def expected_products(self, prospect: Prospect) -> float:
        """Two eigensolves on half of the sample, and the gradients."""
        sample = prospect.sample
        if not can_be_halved(sample):
            return 0.0
        half = 0.5 if prospect.num_ranks == 1 else 1.0  # an upper bound: half the work, but as many messages
        passes = 1.0 + len(sample.extra) / len(sample.hessian)
        return 2.0 * half * prospect.solve() + GRADIENT * passes

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Two eigensolves on half of the sample, and the gradients."""
        if not can_be_halved(probe.sample):
            return {}
        count = len(probe.operator.batches)
        even, odd = (probe.operator.part(range(start, count, 2)) for start in (0, 1))
        halves = [probe.solve(half) for half in (even, odd)]
        if (poor := next((half for half in halves if not half.trusted), None)) is not None:
            left_out = f"at step {probe.step}, the gradient fraction gets no error bar"
            why = poor.refusal(f"{left_out}, as a half of the sample has no trusted space")
            probe.remarks["half"] = f"{why} A larger sample may help, too."
            return {}
        measured = probe.top.fraction(probe.gradient)
        spread = max(abs(measured - half.fraction(probe.gradient)) for half in halves)
        low, high = _range_of_noise(probe, measured)
        multiple = SPREADS_OF_DRAWS if any(batch.draw for batch in probe.sample.hessian) else SPREADS
        margin = multiple * spread * (1.0 - probe.sample.hessian_share)
        return {
            "reliability": halves[0].fraction(odd.gradient()),
            "gradient_fraction_low": max(0.0, low - margin),
            "gradient_fraction_high": min(1.0, high + margin),
        }


def can_be_halved(sample: Sample) -> bool:
    """Whether `Reliability` has something to measure."""
    return len(sample.hessian) >= 2 and sample.hessian_share < 1.0


def _range_of_noise(probe: Probe, measured: float) -> tuple[float, float]:
    """Range of the fraction that the noise of the gradient allows."""
    found = BatchProducts.of(probe)
    square, image_square, count = found.square, measured * found.square, len(found.weights)
    influence = 2.0 * (found.images @ found.image - measured * found.along) / square
    weight = (found.weights / found.weights.sum()).square()
    variance = float(weight @ influence.square())
    noise, image_noise = float(weight @ found.squares), float(weight @ found.images.square().sum(dim=1))
    # count / (count - 1): the deviations are from the sample's own mean.
    correction = (1.0 - probe.sample.gradient_share) * count / (count - 1)
    signal, image_signal = square - correction * noise, image_square - correction * image_noise
    if signal <= 0.0:  # nothing but noise: the sample says nothing about the gradient
        return 0.0, 1.0
    unbiased = min(max(image_signal / signal, 0.0), 1.0)
    margin = STANDARD_ERRORS * (correction * variance) ** 0.5
    return min(measured, unbiased) - margin, max(measured, unbiased) + margin
