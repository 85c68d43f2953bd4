"""Comparison of the sample's loss with the losses that training returned.

If what is measured is what is trained, the mean loss of the sample at theta_t is the level of training's losses at step
t, up to their spreads. The level is not known, since losses fall, jump and spike. It is taken to lie between the mean
of the 16 losses before the probe, that of the 16 behind it, and the loss at theta_t itself; where training ends before
the 16 are in, between what the last two blocks extrapolate to. Beyond that the spreads decide, and the sizes of
batches: a two-sample z-test with the larger of both variances. A mismatch counts when two comparisons in a row, of
other losses, find it on the same side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_subspace.measurements.sample_loss import SampleMean

BLOCK = 16  # losses on either side of a probe; for fewer before it nothing is compared
KEPT = 5 * BLOCK  # losses to keep; rare outliers show in more of them
Z = 4.0  # standard errors; one in 16,000 of a normal distribution is beyond them
# What is not worth a word, relative to the smaller of both losses: precision contexts and weights explain that much
# above. Below, examples that were just trained on do: their losses are behind those that training saw, by an epoch.
HIGHER, LOWER = 0.1, 0.4
FEW = 4  # micro-batches whose spread says little
TINY = 1e-3  # relative to the loss at the start: where training has interpolated, single examples decide


@dataclass(frozen=True)
class Comparison:
    """A sample's loss beside training's.

    Attributes:
        sample: its mean loss.
        training: the level of training's losses that is closest to it.
        allowed: the difference that spreads explain.
        side: 1 where the sample is beyond that above, -1 below, 0 where it is not.
    """

    sample: float
    training: float
    allowed: float
    side: int


def compare(
    sample: SampleMean, before: Sequence[float], after: Sequence[float], *, size: float = 1.0, start: float = 0.0
) -> Comparison | None:
    """Compare a sample's loss at theta_t with training's around step t.

    Args:
        sample: its losses at theta_t.
        before: training's losses before theta_t, oldest first; nan where there was none.
        after: those from theta_t on, the first one at it; fewer than `BLOCK` where training has ended.
        size: examples in a batch of training; 1 where it is not known.
        start: level of training's losses when it began.

    Returns:
        None where there are too few losses.

    Example:
        >>> from lightning_subspace.data.micro_batch import MicroBatch
        >>> batches = [MicroBatch(None, 1.0, index, size=32) for index in range(8)]
        >>> losses = [1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 0.9] * 2
        >>> [compare(SampleMean.of([x] * 8, batches), losses, losses, size=32.0).side for x in (1.1, 0.2, 3.0)]
        [0, -1, 1]
    """
    before, after = _finite(before), _finite(after)
    if len(before) < BLOCK or not math.isfinite(sample.mean):
        return None
    levels, spread = _levels(before[-2 * BLOCK :], after)
    # Few micro-batches have next to no spread of their own, and an example of a rare kind may be in one of them: then
    # the widest spread of training's losses counts, of all that are kept, and counts double.
    widest = spread if sample.count >= FEW else max(spread, _widest([*before, *after]))
    floor = min(abs(sample.mean), min(abs(level) for level in levels))
    # The spread of one is that of the other, if both are of one distribution. A mean over fewer examples spreads
    # further; one over more need not spread less, as where the loss alternates. The losses of examples are taken to
    # spread as widely as they are high, or more.
    fewer = math.sqrt(max(size, 1.0) / sample.size)
    of_batch = max(spread, sample.spread * max(1.0, 1.0 / fewer), floor / math.sqrt(max(size, 1.0)))
    of_micro = max(sample.spread, widest * max(1.0, fewer), floor / math.sqrt(sample.size))
    error = (Z if sample.count >= FEW else 2.0 * Z) * math.sqrt(of_batch**2 / BLOCK + of_micro**2 / sample.count)
    low, high = min(levels), max(levels)
    least, most = min(sample.mean, sample.plain), max(sample.mean, sample.plain)
    side, gap, share = (1, least - high, HIGHER) if least > high else (-1, low - most, LOWER)
    allowed = max(error, share * floor, TINY * abs(start))
    return Comparison(sample.mean, high if side > 0 else low, allowed, side if gap > allowed else 0)


class SecondOpinion:
    """Comparisons along a run: `ask` at a probe, `answer` when `is_due`.

    One probe is compared at a time; one that is asked for meanwhile is passed over.

    Attributes:
        last: the last comparison.
        start: level of training's losses when the run began; None before it is known.

    Example:
        >>> from lightning_subspace.data.micro_batch import MicroBatch
        >>> opinion, wrong = SecondOpinion(), SampleMean.of([5.0] * 8, [MicroBatch(None, 1.0, 0, size=32)] * 8)
        >>> for seen in (16, 48):
        ...     opinion.ask(wrong, seen)
        ...     opinion.answer([1.0] * 32, seen + 16, size=32.0)
        ...     print(opinion.differs, opinion.is_confirmed)
        True False
        True True
    """

    def __init__(self) -> None:
        self.last: Comparison | None = None
        self.start: float | None = None
        self._run = 0  # comparisons in a row that differed on one side
        self._sample: SampleMean | None = None
        self._seen = 0

    @property
    def differs(self) -> bool:
        """Whether the last comparison was beyond what spreads explain."""
        return self._run > 0

    @property
    def is_confirmed(self) -> bool:
        """Whether the last two were, on the same side."""
        return self._run > 1

    @property
    def is_pending(self) -> bool:
        """Whether a probe waits for its answer."""
        return self._sample is not None

    def is_due(self, seen: int) -> bool:
        """Whether enough losses have followed; `seen` counts all of them."""
        return self.is_pending and seen >= self._seen + BLOCK

    def ask(self, sample: SampleMean, seen: int) -> None:
        """A probe has been taken after `seen` losses."""
        if not self.is_pending:
            self._sample, self._seen = sample, seen

    def answer(self, losses: Sequence[float], seen: int, size: float = 1.0) -> None:
        """Compare the probe that waits.

        Args:
            losses: training's last ones, oldest first.
            seen: number of all so far.
            size: examples in a batch; 1 where it is not known.
        """
        sample, self._sample = self._sample, None
        if sample is None:
            return
        behind = min(seen - self._seen, len(losses))
        before, after = losses[: len(losses) - behind], losses[len(losses) - behind :]
        found = compare(sample, before, after[:BLOCK], size=size, start=self.start or 0.0)
        if found is None:
            return
        is_again = self.last is not None and self.last.side == found.side
        self._run = (self._run + 1 if is_again else 1) if found.side else 0
        self.last = found

    def forget(self) -> None:
        """Begin anew with another sample, in the same run."""
        self.last, self._run, self._sample = None, 0, None

    def begin(self) -> None:
        """A new run begins."""
        self.forget()
        self.start = None


def _levels(before: Sequence[float], after: Sequence[float]) -> tuple[list[float], float]:
    """Means that the level may lie between, and the spread within blocks."""
    last = before[-BLOCK:]
    if len(after) >= BLOCK:
        blocks = [last, after]
        levels = [_mean(last), _mean(after), after[0]]
    else:
        half = len(before) // 2
        blocks = [before[:half], before[half:]]
        early, late = map(_mean, blocks)
        levels = [late, 2.0 * late - early, _mean([*last[len(after) :], *after]), *after[:1]]
    squares = sum((value - _mean(block)) ** 2 for block in blocks for value in block)
    return levels, math.sqrt(squares / max(sum(map(len, blocks)) - len(blocks), 1))


def _widest(losses: Sequence[float]) -> float:
    """The largest standard deviation of a block, at the present level."""
    blocks = [losses[end - BLOCK : end] for end in range(len(losses), BLOCK - 1, -BLOCK)]  # the last one first
    # While losses fall, their spread falls with them. By the median, which a rare outlier leaves where it is.
    middles = [statistics.median(block) for block in blocks]
    shares = [middles[0] / middle if 0.0 < middles[0] < middle else 1.0 for middle in middles]
    return max(statistics.stdev(block) * share for block, share in zip(blocks, shares, strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
