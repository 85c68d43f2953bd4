"""Batch size at which the noise of the gradient equals the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lightning_subspace.loss.gradient_tally import Tallied
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.batch_products import BatchProducts
from lightning_subspace.measurements.noise_estimate import Deviations, NoiseEstimate, example_sizes, participation
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.measurements.reliability import GRADIENT, can_be_halved


def _keys(part: str) -> tuple[str, ...]:
    """Keys of a `NoiseEstimate`, of the whole or of a part."""
    names = (f"scale{part}", f"scale{part}_low", f"scale{part}_high", f"variance{part}", f"gradient_square{part}")
    return tuple(f"noise/{name}" for name in names)


class NoiseScale(Measurement):
    """`noise/...`: gradient noise scale with its error, also outside the top space.

    B_simple = S/G^2, with S the trace of the covariance of single examples' gradients and G^2 the squared gradient of
    the training set (McCandlish et al., arXiv 1812.06162, section 2.2). In examples (sequences, if these are the
    examples). A batch far below B_simple is mostly noise; far above, more examples add little.

    - `noise/scale`, and the interval `noise/scale_low`, `noise/scale_high`: two standard errors of its logarithm on
      each side, by the delete-one jackknife. Where the sample is too small to tell it from infinity (G^2, or G^2
      without some of the sample, is not positive), only `low` is there: the number B of examples, "more than B". It
      takes a sample of 2 B_simple examples to know it within a factor of 1.5.
    - `noise/variance`, `noise/gradient_square`: S, and G^2, which can be negative. To smooth over probes divide their
      means; the mean of ratios is no estimate.
    - `noise/participation`: (sum of eigenvalues)^2 over the sum of their squares, for the covariance of at most 32
      groups of micro-batch gradients: in how many directions the noise is, at most 31.
    - With `_bulk` and `_top` (`noise/scale_bulk`, `noise/scale_bulk_low`, ...): the same outside and inside the top
      eigenspace, S = S_top + S_bulk. At a large learning rate B_simple changes from step to step with the oscillation
      in the top space; B_bulk is steady, and grows as the loss falls.
    - `noise/hessian_top`: sum_i lambda_i v_i.Cov v_i, the part of tr(H Cov) in the top space; in units of the loss, the
      step of rate lr with b examples raises it by lr^2/(2b) of that.

    G^2 = |g|^2 - S (1/B - 1/N) for the mean g of B of N examples. N is infinite where the training set is not known or
    has no end, for a loss that is random beside its examples, and with a weighted sampler: then G is the gradient of
    the distribution that examples are drawn from. Micro-batches of the gradient sample are weighted by their weights.
    Left out: with fewer than two of them (all but S and G^2 with fewer than three); for repeated draws of the same
    examples, which are not independent; and on the shards of FSDP2 by differences, but where the split is taken. With
    batch-norm in train mode examples depend on each other, and S is that of batches of the micro-batches' size.

    Costs nothing beyond the pass over the gradient sample but norms of its gradients; of the inner products that the
    interval needs, 16,384 coordinates are enough. `_bulk` and `_top` share the pass that `Reliability` makes with the
    eigenvectors; where there is none (the sample is the whole training set), they cost a gradient over the sample.

    Args:
        split_every: `_bulk` and `_top` are taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for a `split_every` that is not a positive integer.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=10, measurements=[NoiseScale(split_every=1)])  # in place of the default one
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    tallies: ClassVar[bool] = True
    extra: ClassVar[frozenset[str]] = frozenset(
        {*_keys(""), *_keys("_bulk"), *_keys("_top"), "noise/hessian_top", "noise/participation"} - {"noise/scale"}
    )

    def __init__(self, split_every: int = 5) -> None:
        self.split_every = positive("split_every", split_every)

    def expected_products(self, prospect: Prospect) -> float:
        """None where `Reliability` makes its pass; else the gradients."""
        sample = prospect.sample
        is_paid = not prospect.solver.k or prospect.number % self.split_every or can_be_halved(sample)
        return 0.0 if is_paid else GRADIENT * (1.0 + len(sample.extra) / len(sample.hessian))

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Two sums over ranks; at some probes a pass over the sample."""
        sample, sizes = probe.sample, example_sizes(probe.sample)
        if len(sizes) < 2 or any(batch.draw for batch in (*sample.hessian, *sample.extra)):
            return {}
        found: dict[str, float] = {}
        tallied = None if probe.tally is None else probe.tally.gathered(probe.partition.ranks)
        if tallied is not None:
            deviations, gram = _of_groups(tallied, sizes, probe.norm(probe.gradient) ** 2)
            found |= _named(NoiseEstimate.of(deviations, sample.population))
            found["noise/participation"] = participation(gram)
        if probe.number % self.split_every == 0 and probe.subspace is not None and probe.subspace.trusted:
            products = BatchProducts.of(probe)
            whole, top = _of_batches(products, float(sizes.sum()))
            for part, deviations in (("_top", top), ("_bulk", whole - top), *([] if found else [("", whole)])):
                found |= _named(NoiseEstimate.of(deviations, sample.population), part)
            spread = (top.sizes[:, None] * products.images.square()).sum(dim=0) / (len(sizes) - 1)
            found["noise/hessian_top"] = float(probe.top.eigenvalues.cpu().double() @ spread)
        return found


def _named(found: NoiseEstimate, part: str = "") -> dict[str, float]:
    values = (found.scale, found.low, found.high, found.variance, found.square)
    return dict(zip(_keys(part), values, strict=True))


def _of_groups(tallied: Tallied, sizes: Tensor, square: float) -> tuple[Deviations, Tensor]:
    """Deviations of groups of micro-batches, and their Gram matrix, for |g|^2."""
    count = len(tallied.images)

    def by_group(values: Tensor) -> Tensor:  # (m,) -> (M,)
        return values.new_zeros(count).index_add_(0, tallied.groups, values)

    size = by_group(sizes)
    total = tallied.images.sum(dim=0)
    # Of the deviations alone, so that the mean has its own length whatever coordinates are kept.
    images = tallied.images - (size / size.sum())[:, None] * total
    along = images @ total * (tallied.scale / size.sum())
    gram = images @ images.T * tallied.scale
    squares = by_group(sizes * tallied.squares) - size * square - 2.0 * along
    counts = by_group(sizes.new_ones(len(sizes)))
    roots = size.sqrt()
    return Deviations(counts, size, squares, along, gram.diagonal(), square), gram / roots / roots[:, None]


def _of_batches(products: BatchProducts, examples: float) -> tuple[Deviations, Deviations]:
    """Deviations of single micro-batches, whole and inside the top space."""
    sizes = products.weights * (examples / products.weights.sum())
    counts = sizes.new_ones(len(sizes))
    inside = products.images.square().sum(dim=1)
    return (
        Deviations(
            counts,
            sizes,
            sizes * products.squares,
            sizes * products.along,
            sizes.square() * products.squares,
            products.square,
        ),
        Deviations(
            counts,
            sizes,
            sizes * inside,
            sizes * (products.images @ products.image),
            sizes.square() * inside,
            float(products.image @ products.image),
        ),
    )
