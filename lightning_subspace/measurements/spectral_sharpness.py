"""Sharpness in the norm of Muon's steps."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_subspace._arguments import is_list_like, require_integer, require_number, require_word, wrong
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.memory import kind
from lightning_subspace.measurements.optimizer_rules import Notice
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.measurements.spectral_norm import Adjustment, Matrix, SpectralNorm, muon_scale
from lightning_subspace.parallel.fsdp import is_sharded

TOLERANCE = 1e-3  # relative change of d.Hd at which the iteration has settled
COLD, WARM = 8.0, 4.0  # products from the gradient, and from the last direction
FEWEST = 3  # products: before that a small change may be that of a saddle


class SpectralSharpness(Measurement):
    """`spectral_sharpness`, `spectral_sharpness_over_threshold`: curvature in the norm of Muon's steps.

    S = max d.Hd over |d| <= 1, where |d| = max_l |d_l|_op / s_l over weight matrices l, each with the length s_l of its
    step over the learning rate (arXiv 2603.05002). Found by d <- lmo(Hd), lmo(v)_l = s_l polar(v_l), which raises d.Hd
    with every product where H has no negative curvature; until it changes by less than .1 %. S is in units of the loss
    over squared lengths in this norm: never on one axis with lambda_1.

    Steps of Muon have the fixed length lr in this norm, where steepest descent has lr |g|_*, so `..._over_threshold` is
    S lr / (2 |g|_*), with |g|_* = sum_l s_l |g_l|_nuc. Full-batch Muon without momentum hovers at 1, with momentum .95
    at 1.1 to 1.4: there is no factor for momentum as Adam has one. With a decoupled weight decay it stays as it is.

    What to keep in mind. The iteration finds local maxima, up to 5 % below the largest on small networks and 15 % on
    larger ones, so S is a lower bound. Where H has much negative curvature, as at the start, it need not settle within
    `max_products`, and both numbers are left out. |g|_* of a sample is mostly noise, 1 to 4 times that of the whole
    set, which makes the ratio too small: take it for full-batch studies. `step/edge_ratio` tells the same for one
    forward pass. Muon's own iteration is not exactly polar: its steps are 1.13 to 1.2 times as long.

    Costs 6 products the first time, mostly 3 later, and a singular value decomposition of each matrix for each of them,
    on every rank; two copies of theta on the CPU and in checkpoints, as the search begins at the direction of the last
    probe. Refused, with one warning, on the shards of FSDP2, whose matrices are nowhere whole.

    Args:
        params: shell-style patterns on parameter names; of these all matrices count. By default those that Muon moves,
            or else all matrices.
        lr: the learning rate for the ratio. By default that of torch.optim.Muon, if it is the only optimizer: with
            another one beside it (the usual way) pass it here, or there is no ratio.
        adjust_lr_fn: the scales s_l, as in torch.optim.Muon: "original" sqrt(max(1, rows/columns)), "match_rms_adamw"
            .2 sqrt(max(rows, columns)), "spectral_unclamped" sqrt(rows/columns). By default Muon's, or "original".
        max_products: of the iteration, 3 or more.
        every: taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for `params` that is not a list of patterns, an `lr` that is not a positive number, another
            `adjust_lr_fn`, `max_products` that is no integer of at least 3, or `every` that is not a positive one.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=0, measurements=[SpectralSharpness(params=["blocks.*"], lr=0.02)])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(
        self,
        params: Sequence[str] | None = None,
        lr: float | None = None,
        adjust_lr_fn: Adjustment | None = None,
        max_products: int = 40,
        every: int = 1,
    ) -> None:
        if params is not None and not (is_list_like(params) and all(isinstance(word, str) for word in tuple(params))):
            raise wrong("params", "a list of patterns of parameter names or None", params)
        if lr is not None:
            lr = require_number("lr", lr, "a positive number or None", lambda x: 0.0 < x < math.inf)
        if adjust_lr_fn is not None:
            require_word("adjust_lr_fn", adjust_lr_fn, get_args(Adjustment))
        self.params = None if params is None else tuple(params)
        self.lr = lr
        self.adjust_lr_fn = adjust_lr_fn
        self.max_products = int(require_integer("max_products", max_products, FEWEST))
        self.every = positive("every", every)
        self._last: tuple[int, Tensor | None, Tensor] | None = None  # step, start and result of the last search
        self._notice = Notice()

    def expected_products(self, prospect: Prospect) -> float:
        """A few, fewer once there is a direction to begin at."""
        return WARM if prospect.number else COLD

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """A few products, and decompositions of the matrices."""
        if probe.number == 0:
            self._last = None
        if any(map(is_sharded, probe.parameters)):
            text = "params: expected whole matrices, got shards of FSDP2, so that SpectralSharpness is left out; "
            self._notice.say(probe, text + "`step/edge_ratio` needs none.")
            return {}
        matrices, rate = self._matrices(probe)
        norm, partition = SpectralNorm(matrices), probe.partition
        if not matrices:
            text = "params: expected matrices, got none, so that SpectralSharpness is left out; name weights of layers."
            self._notice.say(probe, text)
            return {}
        if not 0.0 < probe.norm(probe.gradient) < math.inf:
            return {}
        gradient = partition.gather(probe.gradient)
        start = self._start(probe)
        direction = norm.best(gradient) if start is None else start.to(gradient)

        def product(whole: Tensor) -> tuple[float, Tensor]:
            local = partition.cut(whole)
            image = probe.operator.matvec(local)
            return probe.dot(local, image), image

        found = largest_curvature(
            product, lambda image: norm.best(partition.gather(image)), direction, self.max_products
        )
        if found is None:
            return {}
        sharpness, direction = found
        self._last = probe.step, start, direction.cpu()
        metrics = {"spectral_sharpness": sharpness}
        dual = norm.dual(gradient)
        if rate is not None and dual > 0.0:
            metrics["spectral_sharpness_over_threshold"] = sharpness * rate / (2.0 * dual)
        return metrics

    def state_dict(self) -> Mapping[str, Any]:
        """Where the last search began, and what it found."""
        return {} if self._last is None else dict(zip(("step", "start", "found"), self._last, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next search there."""
        step, start, found = (state.get(name) for name in ("step", "start", "found"))
        are_vectors = all(isinstance(v, Tensor) and v.ndim == 1 for v in (found, found if start is None else start))
        if state and not (isinstance(step, int) and are_vectors):
            raise ValueError(f"step, start, found: expected a step and two vectors, got {kind(start)}, {kind(found)}")
        self._last = (step, start, found) if state else None  # type: ignore[assignment]

    def _start(self, probe: Probe) -> Tensor | None:  # (n,)
        """Where to begin: the last direction, if any.

        A probe that is taken again behind a checkpoint begins where it did.
        """
        if self._last is None:
            return None
        step, start, found = self._last
        begun = start if step == probe.step else found
        return begun if begun is not None and len(begun) == probe.partition.n else None

    def _matrices(self, probe: Probe) -> tuple[tuple[Matrix, ...], float | None]:
        """The matrices with their scales, and the learning rate if known."""
        groups = _groups_of_muon(probe.optimizer)
        group_of = {id(p): group for group in groups for p in group["params"]}
        rate = max((float(group["lr"]) for group in groups), default=None) if self.lr is None else self.lr
        found, start, space = [], 0, probe.space
        for name, shape, numel, parameter in zip(
            space.names, space.shapes, space.numels, probe.parameters, strict=True
        ):
            group = group_of.get(id(parameter), {})
            is_wanted = bool(group) or not groups if self.params is None else _any_match(name, self.params)
            if len(shape) == 2 and is_wanted and name not in space.complex_names:
                scale = muon_scale((shape[0], shape[1]), self.adjust_lr_fn or group.get("adjust_lr_fn"))
                # Groups of a smaller rate take steps that much shorter.
                share = float(group["lr"]) / rate if group and rate and self.lr is None else 1.0
                found.append(Matrix(start, (shape[0], shape[1]), scale * share))
            start += numel
        return tuple(found), rate


def _groups_of_muon(optimizer: Optimizer | None) -> list[dict[str, Any]]:
    """The parameter groups of a torch.optim.Muon, which came with torch 2.9."""
    muon = getattr(torch.optim, "Muon", None)
    return optimizer.param_groups if muon is not None and isinstance(optimizer, muon) else []


def _any_match(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def largest_curvature(
    product: Callable[[Tensor], tuple[float, Tensor]],
    best: Callable[[Tensor], Tensor],
    start: Tensor,  # (n,)
    max_products: int = 40,
) -> tuple[float, Tensor] | None:
    """Largest d.Hd over directions of unit length, and its d.

    None where it has not settled.

    Args:
        product: d to d.Hd and Hd.
        best: Hd to the direction of unit length with the largest inner product with it.
        start: a direction of unit length.
        max_products: products at most.
    """
    direction, last = start, math.nan
    found: tuple[float, Tensor] | None = None
    for count in range(1, max_products + 1):
        curvature, image = product(direction)
        if not math.isfinite(curvature):
            return None
        if found is None or curvature > found[0]:
            found = curvature, direction
        if count >= FEWEST and abs(curvature - last) <= TOLERANCE * abs(curvature):
            return found
        direction, last = best(image), curvature
    return None
