"""Base class of the measurements, and the `Probe` that they are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_subspace._arguments import is_integer, require_shape, wrong
from lightning_subspace.curvature import Operator
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.gradient_tally import GradientTally
from lightning_subspace.measurements.arrival import Arrival
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.subspace import Subspace, inner_products
from lightning_subspace.subspace.table import Table

Found = Mapping[str, float | Table]  # what a measurement returns: numbers by key, and tables for figures by name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Needs(Enum):
    """Quality of eigenpairs that a measurement needs."""

    NOTHING = "no eigenpairs"
    EIGENVALUES = "converged eigenvalues"
    SUBSPACE = "a converged subspace whose subspace_error is at most 0.1"


@dataclass(frozen=True)
class Probe:
    """Gradient, Hessian and top eigenspace at theta_t, after t optimizer steps.

    On several ranks flat vectors are this rank's part: n below is `partition.local_n`. `operator`, `dot`, `norm`,
    `Subspace.fraction`, `Subspace.overlap` and `partition.gather` are collectives: every rank has to call them. All
    record what the first rank returns, where `partition.ranks.index` is 0; write files on that one alone.

    Attributes:
        step: t, the number of optimizer steps taken.
        number: how many probes this run has had before.
        partition: assignment of the coordinates to ranks.
        gradient: (n,), of the mean loss over the gradient sample.
        operator: the Hessian of the mean loss over the Hessian sample: `matvec`, `gradient`, `value`, `part`. Valid
            while the probe lasts, not in `after_step`.
        parameters: the module's own tensors at the coordinates, as `optimizer` knows them; do not write to them.
        sample: the micro-batches, and their share of the training set.
        batch_gradients: iterates over the gradient sample: each micro-batch with the gradient of its own mean loss,
            (n,). Valid while the probe lasts.
        another: `another(batches, loss_fn=None, products=True)` gives the operator of another loss, or of the same one,
            over other batches, at theta_t: `gradient`, `value`, `batch_gradients`, and with `products` `matvec`. The
            batches are a list; one that has to be read is best read in `Measurement.prepare`. Valid while the probe
            lasts; `solve` takes it.
        subspace: the top eigenspace; None for k = 0.
        previous: (k, n), the eigenvectors of the last probe that had a trusted subspace; None at the first.
        reference: (k, n), those of `reference_step`; None before it.
        history: the records so far, oldest first.
        optimizer: the optimizer in use; None without a Trainer or with several.
        which: the end of the spectrum that `subspace` belongs to, "LA" for the algebraically largest.
        solve: `solve(matvec, k=None)` gives the top eigenspace, without certificate, of a function v -> A v or of an
            operator of the same parameters (a `part`, with fewer messages between ranks); by default of the probe's k.
        losses: of the micro-batches of the gradient sample, in order, of all ranks; nan where one is not known.
        sample_gradient: (n,), of the mean loss over the Hessian's sample; `gradient` where both samples are one.
        arrival: the loss where the optimizer step has led, in `after_step` alone.
        tally: lengths of the micro-batch gradients, where a measurement `tallies`. Valid while the probe lasts.
        shared: what measurements of this probe leave to each other.
        remarks: what `measure` leaves for the user to know, by cause; of each cause one is told a run.
    """

    step: int
    number: int
    partition: Partition
    gradient: Tensor
    operator: Operator
    parameters: tuple[Tensor, ...]
    sample: Sample
    batch_gradients: Callable[[], Iterator[tuple[MicroBatch, Tensor]]]
    subspace: Subspace | None
    previous: Tensor | None
    reference: Tensor | None
    history: Sequence[Record]
    optimizer: Optimizer | None
    which: str
    solve: Callable[..., Subspace]
    another: Callable[..., Operator]
    losses: Sequence[float] = ()
    sample_gradient: Tensor | None = None
    arrival: Arrival | None = None
    tally: GradientTally | None = None
    shared: dict[Any, Any] = field(init=False, default_factory=dict, repr=False, compare=False)
    remarks: dict[str, str] = field(init=False, default_factory=dict, repr=False, compare=False)

    @property
    def space(self) -> ParameterSpace:
        """Names and shapes behind the coordinates."""
        return self.partition.space

    @property
    def top(self) -> Subspace:
        """The subspace, for measurements that need one.

        Raises:
            ValueError: for k = 0.
        """
        if self.subspace is None:
            raise ValueError("subspace: expected eigenpairs, got k = 0; set `needs` to Needs.SUBSPACE.")
        return self.subspace

    @cached_property
    def gradient_image(self) -> Tensor | None:
        """H g / |g|, (n,), by one product for all.

        None where g = 0, or where the operator has no products.
        """
        norm = self.norm(self.gradient)
        # Divided first: H g of a tiny gradient would vanish in float32.
        return self.operator.matvec(self.gradient / norm) if norm > 0.0 and self.operator.has_products else None

    def dot(
        self,
        a: Tensor,  # (n,)
        b: Tensor,  # (n,)
    ) -> float:
        """Inner product of two flat vectors over all ranks, in float64."""
        for name, vector in (("a", a), ("b", b)):
            require_shape(name, vector, [self.partition.local_n])
        return float(inner_products(a[None], b[None], self.partition.ranks))

    def norm(
        self,
        vector: Tensor,  # (n,)
    ) -> float:
        """Length of a flat vector over all ranks, in float64."""
        require_shape("vector", vector, [self.partition.local_n])
        return math.sqrt(self.dot(vector, vector))


class Measurement:
    """Base of all measurements: override `measure` or `after_step`.

    Where `measure` takes products with the Hessian, override `expected_products` too. Keys are logged behind the name
    of the monitor. A nan means "not defined here" and is left out.

    Attributes:
        needs: the measurement is skipped at probes whose eigenpairs are worse than this.
        extra: keys that loggers get with `log="all"` only, or for k = 0, where there are no eigenvalues to look at.
        every: the measurement is taken at probes 0, `every`, 2 `every`, ... of a run; no method is called at others.
        window: how many optimizer steps directly before a probe `see_update` is called for.
        tallies: whether it looks at `Probe.tally`.

    Example:
        >>> class GradientNorm(Measurement):
        ...     needs = Needs.NOTHING
        ...     def measure(self, probe):
        ...         return {"gradient_norm": probe.norm(probe.gradient)}
    """

    needs: ClassVar[Needs] = Needs.SUBSPACE
    extra: ClassVar[frozenset[str]] = frozenset()
    every: int = 1
    window: int = 0
    tallies: ClassVar[bool] = False

    def is_due(self, number: int) -> bool:
        """Whether to take it at the probe of this number."""
        return number % self.every == 0

    def prepare(self, partition: Partition) -> None:
        """Read data that `measure` needs. A collective.

        Called before each probe at which the measurement is due, while the module is as training has it.
        """

    def require_space(self, space: ParameterSpace) -> None:
        """Refuse parameters that it cannot measure.

        Called before the first probe, and where the parameters have changed. Not a collective.

        Raises:
            ValueError: naming the argument that does not fit them, and the way out.
        """

    def measure(self, probe: Probe) -> Found:
        """Numbers known at theta_t."""
        return {}

    def expected_products(self, prospect: Prospect) -> float:
        """Expected number of Hessian products of `measure`, over the whole sample."""
        return 0.0

    def see_update(self, step: int, update: Tensor, partition: Partition) -> None:
        """Take note of an optimizer step before a probe.

        No collective. Where training has only begun, or a probe comes sooner than expected, it is called for fewer
        steps than `window`; where a probe that was expected is not taken, for more.

        Args:
            step: the number of steps behind it: that of the probe, for the last one.
            update: (n,), theta_step less the parameters before; it may be kept.
            partition: how its coordinates are dealt to ranks.
        """

    def after_step(
        self,
        probe: Probe,
        gradient: Tensor | None,  # (n,)
        update: Tensor,  # (n,)
    ) -> Found:
        """Numbers that need the optimizer step from theta_t.

        Args:
            probe: the probe; its operator can no longer be used, and `arrival` can.
            gradient: the mini-batch gradient of the step, accumulated and before clipping (times the loss scale under
                a GradScaler); None where the optimizer hook did not see it.
            update: theta_{t+1} - theta_t.
        """
        return {}

    def figures(self) -> Iterable[tuple[str, int, Figure]]:
        """New figures for loggers: name, step, figure of each.

        Those that the last call has not given. Called on the first rank alone, where figures of the run are drawn:
        after 1, 2, 4, 8, ... probes and at the end.
        """
        return ()

    def state_dict(self) -> Mapping[str, Any]:
        """What the measurement keeps between probes, for the checkpoint.

        Plain values (None, numbers, strings) and tensors in dicts, lists and tuples, so that it can be loaded with
        `weights_only=True`; empty where it keeps nothing. Not a collective: of several ranks the first one's is
        written, and read by all.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, or begin anew where it is empty.

        Called before the first probe of each run, and then where a run is resumed. The probe at which a checkpoint was
        written may be taken again behind it, at the same step.

        Args:
            state: what `state_dict` returned, or an empty one.

        Raises:
            Exception: of any kind, before anything has changed, for a state that it cannot use; it then begins anew.
        """


def positive(name: str, value: int) -> int:
    """The value, if it is a positive integer.

    Raises:
        ValueError: for anything else.
    """  # noqa: DOC501  # `wrong` makes one
    if not is_integer(value) or value < 1:
        raise wrong(name, "a positive integer", value)
    return int(value)
