"""Space of a projection that its user gives, along a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.callbacks.start import StartWhenAligned
from lightning_subspace.probe.arguments import wrong
from lightning_subspace.probe.given_basis import GivenBasis, GivenSpace, Rows
from lightning_subspace.state.signals import waiting_signals


class GivenSpaces:
    """Takes the spaces of one callback, on all ranks or on none.

    Args:
        basis: a function from the module to rows, or batches.
        arguments: of the callback, by name.
        owner: the callback's class.

    Raises:
        ValueError: for something else, or with arguments that have no meaning beside it.
    """

    def __init__(self, basis: Rows | Iterable[Any], arguments: Mapping[str, Any], owner: type) -> None:
        self._given = GivenBasis(basis)
        self._given.require_alone(arguments, owner)
        if isinstance(arguments["start_when"], StartWhenAligned):
            raise wrong(
                "start_when",
                "a step beside basis=",
                arguments["start_when"],
                "chi is of the top eigenspace, which is not computed then",
            )

    @property
    def evaluates(self) -> bool:
        """Whether the loss of the module is evaluated."""
        return not self._given.is_function

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of its run: no eigenvectors, and these batches."""
        return {"k": 0, "sample": self._given.sample}

    def require_fewer(self, runner: ProbeRunner) -> None:
        """Refuse as many batches as there are parameters.

        Raises:
            ValueError: naming both numbers.
        """
        if runner.run is not None and runner.source.sample is not None:
            self._given.require_fewer(runner.source.sample, runner.run.partition.n)

    @waiting_signals()  # a handler may talk to the other ranks: not before all have left
    def take(self, runner: ProbeRunner, module: nn.Module, step: int, otherwise: str) -> GivenSpace | None:
        """The space at the parameters of a step; None after a failure.

        That is told. A collective, after `runner.should_probe`.
        """
        run, sample = runner.run, runner.source.sample
        assert run is not None, "asked for before"
        assert sample is not None, "asked for before"
        try:
            return self._given.space(runner.settings.choice, module, sample, run.partition)
        except Exception as error:
            if not runner.notices.is_of_signal(step, error, runner.ranks):
                what = f"the space of basis= could not be computed at step {step}; {otherwise}"
                runner.notices.failure(what, error, runner.ranks)
            return None
