"""Derivative of what trains, by differences, and its symmetric parts.

A training step gives a vector g(theta). It is the gradient of a function just where its derivative J is symmetric:
not with a stop-gradient on the way to some parameters, a reversed gradient or a straight-through estimator. With
random v in groups of parameters A and B (the children of the module), J v by central differences in float64,

    v_A . J v_B = v_B . J v_A

is tested for all pairs of groups, and double backward is compared with J v in the rows of each group. A set of groups
whose pairs all pass is a part that can be measured by itself, with the other parameters held fixed.
"""

from __future__ import annotations

import glob
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.curvature.self_check import (
    LARGEST_ASYMMETRY,
    LARGEST_ERROR,
    REFUSALS,
    SMALLEST_PART,
    checking,
    difference,
    drawn,
)
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.state.signals import SignalError

MAX_GROUPS = 8  # with two directions each, two gradients a direction and step: 64 gradients of a few examples
CHECKED_STEPS = (1e-6, 1e-7)
# An entry of J is rounding where it is so much smaller than the largest one.
ENTRY_ROUNDING = 1e-8


@dataclass(frozen=True)
class Part:
    """Some of the parameters, by patterns of `params=`, and their number."""

    patterns: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class GradientField:
    """What differences of gradients say about J.

    Attributes:
        asymmetry: |J - J'| / (2 |J|) in Frobenius norms, estimated, in [0, 1]; nan: not known.
        by_hessian: the largest part whose J is symmetric and equal to the Hessian by double backward; None: there is
            none among the children of the module.
        by_differences: the largest part whose J is symmetric.
    """

    asymmetry: float
    by_hessian: Part | None = None
    by_differences: Part | None = None

    @classmethod
    def of(cls, loss: TrainingLoss, batch: MicroBatch, *, seed: int = 0) -> GradientField:
        """The field of a loss on a few examples.

        The loss is not open, and best of float64. Costs at most 64 gradients and 16 products; what fails inside of the
        loss leaves nothing known.

        Raises:
            SignalError: when a signal has come meanwhile.
        """
        groups = grouped(loss.space.names)
        try:
            with checking(loss):
                tables = _Tables.of(loss, batch, groups, seed)
        except SignalError:
            raise
        except Exception:  # float64 can fail in any way inside the user's code
            return cls(math.nan)
        parts = list(groups)
        sizes = [sum(loss.space.numels[i] for i in groups[patterns]) for patterns in parts]

        def largest(can_be_together: list[list[bool]]) -> Part | None:
            best = Part((), 0)
            # The whole is no part: it has failed.
            for chosen in itertools.chain.from_iterable(
                itertools.combinations(range(len(parts)), count) for count in range(1, len(parts))
            ):
                size = sum(sizes[i] for i in chosen)
                if size > best.size and all(can_be_together[i][j] for i in chosen for j in chosen):
                    best = Part(tuple(pattern for i in chosen for pattern in parts[i]), size)
            return best if best.size else None

        symmetric = tables.symmetric_pairs()
        exact = [[a and b for a, b in zip(*rows, strict=True)] for rows in zip(symmetric, tables.exact, strict=True)]
        return cls(tables.asymmetry(), largest(exact), largest(symmetric))


def grouped(names: tuple[str, ...]) -> dict[tuple[str, ...], list[int]]:
    """Places of parameters by the child of the module.

    Children are those of the first module with several of them. The smallest ones are taken together.

    Example:
        >>> grouped(("net.body.weight", "net.body.bias", "net.head.weight"))
        {('net.body.*',): [0, 1], ('net.head.*',): [2]}
    """
    paths = [name.split(".") for name in names]
    depth = 0
    while all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    groups: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        prefix = glob.escape(".".join(path[: depth + 1]))
        groups.setdefault(prefix if len(path) == depth + 1 else f"{prefix}.*", []).append(i)
    kept = dict(itertools.islice(groups.items(), MAX_GROUPS - (len(groups) > MAX_GROUPS)))
    rest = {pattern: places for pattern, places in groups.items() if pattern not in kept}
    result: dict[tuple[str, ...], list[int]] = {(pattern,): places for pattern, places in kept.items()}
    if rest:
        result[tuple(rest)] = [i for places in rest.values() for i in places]
    return result


@dataclass(frozen=True)
class _Tables:
    """Entries of J between groups of parameters."""

    entries: Tensor  # (steps, G, m, G, m): v_(A, a) . J v_(B, b)
    exact: list[list[bool]]  # whether double backward is J in the rows of A, along v_B

    @classmethod
    def of(cls, loss: TrainingLoss, batch: MicroBatch, groups: dict[tuple[str, ...], list[int]], seed: int) -> _Tables:
        """Take the products, at a jittered theta."""
        count = len(groups)
        place = torch.zeros(len(loss.space.names), dtype=torch.long)
        for number, places in enumerate(groups.values()):
            place[places] = number
        member = place.repeat_interleave(torch.tensor(loss.space.numels)).to(loss.device)  # (n,), the group of each
        per_group = 2 if count > 2 else 3  # a pair of directions tells by chance what six or more tell by number
        jitter, draw = drawn(loss, per_group, seed)

        def by_group(values: Tensor) -> Tensor:  # (n,) -> (G,)
            return torch.bincount(member, weights=values, minlength=count).cpu()

        entries = torch.zeros(len(CHECKED_STEPS), count, per_group, count, per_group, dtype=torch.float64)
        errors, sizes = torch.zeros(2, count, count, dtype=torch.float64)
        loss.displace(jitter)
        hessian = Hessian(loss, [batch])
        for b, h in itertools.product(range(per_group), range(count)):
            direction = draw[b] * (member == h)
            length = direction.norm()
            loss.displace(jitter)
            product = _product(hessian, direction)
            for step, eps in enumerate(CHECKED_STEPS):
                image = difference(loss, batch, jitter, direction / length, eps).mul_(length)
                for a in range(per_group):
                    entries[step, :, a, h, b] = by_group(draw[a] * image)
            errors[:, h] += by_group((product - image).square())
            sizes[:, h] += torch.maximum(by_group(product.square()), by_group(image.square()))
        own = sizes.diagonal().clone()
        scale = sizes.sqrt() + SMALLEST_PART * own.sqrt()[None]
        exact = errors.sqrt() <= LARGEST_ERROR * scale  # not where a product is nan
        return cls(entries, (exact & exact.T).tolist())

    def asymmetry(self) -> float:
        """The asymmetry of all of J, or nan where it is noise."""
        count = self.entries.shape[1] * self.entries.shape[2]
        matrices = self.entries.reshape(-1, count, count)
        apart = ~torch.eye(count, dtype=torch.bool)  # v.Jv is symmetric whatever J is
        size = matrices[:, apart].norm(dim=1).max()
        if not 0.0 < size < math.inf:
            return 0.0 if size == 0.0 else math.nan
        found = float(((matrices - matrices.mT)[:, apart].norm(dim=1) / (2.0 * size)).min())
        noise = float((matrices[0] - matrices[1])[apart].norm() / (2.0 * size))
        return math.nan if found > LARGEST_ASYMMETRY and found < 10.0 * noise else found

    def symmetric_pairs(self) -> list[list[bool]]:
        """Whether J is symmetric in and between groups."""
        count = self.entries.shape[1]
        rounding = ENTRY_ROUNDING * float(self.entries.abs().max())
        result = [[False] * count for _ in range(count)]
        for g, h in itertools.combinations_with_replacement(range(count), 2):
            block, mirrored = self.entries[:, g, :, h], self.entries[:, h, :, g].mT
            inner = torch.stack([self._size_within(g), self._size_within(h)]).prod().sqrt()
            limit = LARGEST_ASYMMETRY * 2.0 * (block.abs().amax((1, 2)) + SMALLEST_PART * inner) + rounding
            passes = ((block - mirrored).abs().amax((1, 2)) <= limit).any()
            result[g][h] = result[h][g] = bool(passes) and bool(inner > rounding)  # zero: there is nothing to measure
        return result

    def _size_within(self, g: int) -> Tensor:
        return self.entries[0, g, :, g].abs().max()


def _product(hessian: Hessian, direction: Tensor) -> Tensor:
    """H v, nan where torch refuses it."""
    try:
        return hessian.matvec(direction)
    except RuntimeError as refusal:
        if not REFUSALS.search(str(refusal)):
            raise
        return torch.full_like(direction, math.nan)
