"""Spectrum of the covariance of what modules put out.

An output is taken as rows of d features, one for each example and each other position (a token, a pixel). With the
eigenvalues lambda_i of their covariance, best first, and p_i = lambda_i / sum_j lambda_j:

    effective rank       exp(-sum_i p_i log p_i)              Roy and Vetterli 2007, EUSIPCO, section 2, for eigenvalues
    participation ratio  (sum_i lambda_i)^2 / sum_i lambda_i^2  of 1 to d, as the former; never above it
    slope of the tail    -alpha of lambda_i ~ i^-alpha        Stringer et al. 2019, Nature 571, 361-365
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_subspace._arguments import is_integer, is_list_like, wrong
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.moments import Moments
from lightning_subspace.measurements.prospect import Prospect

MOST_FEATURES = 4096  # the covariance then has 134 MB, and its eigenvalues take half a minute of one core
FORWARD = 0.3  # cost of a forward pass, in products with the Hessian
# Outputs in float32 are rounded to 6e-8 of their size. That is a variance of 4e-15; below this the tail is rounding.
FLOOR = 1e-12
FEWEST = 3  # eigenvalues that a slope is fitted to
# Their features are in the first dimension behind the batch, also where that is not told by the number of dimensions.
CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm)


class ActivationSpectrum(Measurement):
    """`activations/NAME/...`: the covariance spectrum of a module's outputs.

    For each module that is chosen, over the outputs in one forward pass of the Hessian's sample, as the loss sees them
    (with dropout and batch statistics in train mode):

    - `effective_rank`, exp of the entropy of the normalised eigenvalues, in [1, d]: how many directions are in use.
    - `participation_ratio`, (sum lambda)^2 / sum lambda^2, in [1, effective_rank]: the same, for the largest ones.
    - `tail_slope`, the slope of log lambda_i over log i in the ranks `tail`, by least squares with equal weights; -1 is
      the edge of smooth codes in Stringer et al. (2019). Left out with fewer than three eigenvalues there.
    - `variance`, the sum of the eigenvalues, in units of the output squared.

    An effective rank near 1 is a collapse; one near d with fewer than about 10 d rows is biased downwards, and the tail
    with it: what counts is the number of rows (examples times positions) beside d. Positions of padding are rows, too.

    The modules are as they are: hooks are put on their copies of a probe, which also a compiled or checkpointed module
    has, and taken off. A module that is not called has no keys; one that is called several times has the rows of all
    calls. Of a tuple, list or mapping the first tensor of floating point counts. Costs a forward pass and d^2 numbers
    in float64 a module; d is at most 4,096. Under FSDP2 outputs are whole, and so is this.

    Args:
        modules: shell-style patterns of names, as in `named_modules()`: `["net.0", "*.mlp"]`.
        tail: first and last rank, from 1, that the slope is fitted over; fewer where there are fewer eigenvalues.
        dim: the dimension of the features in an output; None: 1 for outputs of four and more dimensions and for those
            of `Conv1d` and norms over channels, the last one for others.
        every: taken at each probe whose number is a multiple of this.

    Attributes:
        eigenvalues: by module name, (d,) float64 best first, of the last probe.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> from lightning_subspace import measure_subspace
        >>> _ = torch.manual_seed(0)
        >>> net, batch = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1)), torch.randn(64, 8)
        >>> spectrum = ActivationSpectrum(["0"])
        >>> record = measure_subspace(
        ...     net, [batch], k=0, loss_fn=lambda m, x, i: m(x).square().mean(), measurements=[spectrum]
        ... )
        >>> 1.0 < record.metrics["activations/0/effective_rank"] < 4.0, spectrum.eigenvalues["0"].shape
        (True, torch.Size([4]))
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(
        self, modules: Sequence[str], *, tail: tuple[int, int] = (11, 500), dim: int | None = None, every: int = 1
    ) -> None:
        patterns = tuple(modules) if is_list_like(modules) else ()
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise wrong("modules", "a list of patterns of module names such as ['net.0', '*.mlp']", modules)
        ranks = tuple(tail) if is_list_like(tail) else ()
        if len(ranks) != 2 or not all(map(is_integer, ranks)) or not 1 <= ranks[0] <= ranks[1] + 1 - FEWEST:
            raise wrong("tail", f"a first and a last rank, from 1, with {FEWEST} or more from one to the other", tail)
        if dim is not None and not is_integer(dim):
            raise wrong("dim", "an integer or None", dim)
        self.every = positive("every", every)
        self.eigenvalues: dict[str, Tensor] = {}
        self._patterns = patterns
        self._tail = int(ranks[0]), int(ranks[1])
        self._dim = dim

    def expected_products(self, prospect: Prospect) -> float:
        """A forward pass."""
        return FORWARD

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One forward pass of the Hessian's sample."""
        found: dict[str, Moments] = {}
        probe.operator.observe(lambda module, batch: self._watched(module, batch, found))
        ranks = probe.partition.ranks
        # In the order of the module. A module may be called for some batches alone, on some ranks alone.
        sizes = {name: len(moments.mean) for name, moments in found.items()}
        everywhere: dict[str, int] = {}
        for own in ranks.all_gather_object(sizes):
            everywhere |= own
        metrics: dict[str, float] = {}
        self.eigenvalues = {}
        for name in sorted(everywhere):
            total = found.get(name, Moments(everywhere[name], probe.gradient.device)).total(ranks)
            values = torch.linalg.eigvalsh(total.covariance).flip(0).clamp(min=0.0).cpu()
            self.eigenvalues[name] = values
            metrics |= {f"activations/{name}/{key}": value for key, value in self._numbers(values).items()}
        return metrics

    def _numbers(self, eigenvalues: Tensor) -> dict[str, float]:
        total = float(eigenvalues.sum())
        numbers = {"variance": total}
        if not 0.0 < total < math.inf:
            return numbers
        shares = eigenvalues / total
        numbers["effective_rank"] = math.exp(-float(torch.special.xlogy(shares, shares).sum()))
        numbers["participation_ratio"] = 1.0 / float(shares.square().sum())
        first, last = self._tail
        tail = eigenvalues[first - 1 : min(last, int((eigenvalues > FLOOR * eigenvalues[0]).sum()))]
        if len(tail) >= FEWEST:
            x = torch.arange(first, first + len(tail), dtype=torch.float64).log()
            x -= x.mean()
            numbers["tail_slope"] = float(x @ tail.log() / x.square().sum())
        return numbers

    @contextmanager
    def _watched(self, module: nn.Module, batch: MicroBatch, found: dict[str, Moments]) -> Iterator[None]:
        """Collect the rows of one evaluation; they count once it has ended."""
        seen: dict[str, Moments] = {}
        refusals: list[str] = []  # not raised in the midst of the user's code, which may handle it

        def see(name: str, child: nn.Module, output: Any) -> None:
            try:
                rows = self._rows(name, child, output)
                seen.setdefault(name, Moments(rows.shape[1], rows.device)).add(rows)
            except ValueError as error:
                refusals.append(str(error))

        handles = [
            child.register_forward_hook(lambda child, args, output, name=name: see(name, child, output))
            for name, child in self._chosen(module).items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if refusals:
            raise ValueError(refusals[0])
        for name, moments in seen.items():
            if name in found and len(found[name].mean) != len(moments.mean):
                raise _uneven(name, len(found[name].mean), len(moments.mean))
            found.setdefault(name, Moments(len(moments.mean), moments.mean.device)).join(moments)

    def _chosen(self, module: nn.Module) -> dict[str, nn.Module]:
        """Submodules by name.

        Raises:
            ValueError: for a pattern without a match.
        """
        named = {name: child for name, child in module.named_modules() if name}
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ValueError(
                    f"modules: expected patterns of module names, got one without a match, {pattern!r}; "
                    f"names: {list(named)[:5]}."
                )
        return {name: m for name, m in named.items() if any(fnmatchcase(name, p) for p in self._patterns)}

    def _rows(self, name: str, module: nn.Module, output: Any) -> Tensor:  # (rows, d)
        """The output as rows of features.

        Raises:
            ValueError: for an output without a tensor of floating point, or with too many features.
        """  # noqa: DOC501  # `wrong` makes one
        tensor = _first_tensor(output)
        if tensor is None or tensor.ndim == 0:
            raise wrong("modules", f"outputs with a tensor of floating point, from {name!r}", output, "leave it out")
        dim = self._dim
        if dim is None:
            dim = 1 if tensor.ndim >= 4 or (tensor.ndim == 3 and isinstance(module, CHANNELS_FIRST)) else -1
        if not -tensor.ndim <= dim < tensor.ndim:
            raise wrong("dim", f"a dimension of the output of {name!r}, which has {tensor.ndim}", dim)
        d = tensor.shape[dim]
        if d > MOST_FEATURES:
            raise wrong("modules", f"outputs of at most {MOST_FEATURES} features, from {name!r}", d, "leave it out")
        return tensor.detach().movedim(dim, -1).reshape(-1, d)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)


def _uneven(name: str, d: int, other: int) -> ValueError:
    return wrong("modules", f"outputs of as many features at every call, {d} from {name!r}", other, "set dim=")
