"""Entries of a monitor or a projection for the tab of TensorBoard.

There is one a probe, or a step; the first of each fit says what was asked for.
"""

from __future__ import annotations

from typing import Any

import lightning_subspace
from lightning_subspace._lightning import Trainer
from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.data.sample import Sample
from lightning_subspace.measurements.density import Density
from lightning_subspace.measurements.optimizer_rules import sgd_threshold
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.report import Publisher
from lightning_subspace.report.guard import Guard
from lightning_subspace.report.tab_entry import failed_entry, tab_entry
from lightning_subspace.subspace.record import Record

# Of the settings.
WANTED = ("k", "which", "tol", "max_matvecs", "verify", "curvature", "mode", "dtype", "reference_step")


class TabLog:
    """Writes entries, on the first rank.

    Args:
        runner: takes the probes.
        publisher: where entries go.
    """

    def __init__(self, runner: ProbeRunner, publisher: Publisher) -> None:
        self._runner = runner
        self._publisher = publisher
        self._guard = Guard()
        self._has_header = False
        self._now: dict[str, Any] = {}

    def begin(self) -> None:
        """Another fit begins."""
        self._has_header, self._now = False, {}

    def open(self, trainer: Trainer) -> None:
        """Note what belongs to the point of a probe alone."""
        with self._guard.of("learning rate and threshold are missing in the tab of TensorBoard"):
            self._now = _now(trainer)

    def close(self, trainer: Trainer, run: ProbeRun, record: Record) -> None:
        """Write the entry of a record."""
        self._publisher.tell(trainer, lambda: self._entry(trainer, run, record))

    def fail(self, trainer: Trainer, step: int) -> None:
        """Write the entry of a probe that has failed, if it has."""
        if (text := self._runner.notices.last_failure) is not None:
            self._publisher.tell(trainer, lambda: failed_entry(step, text))

    def tell(self, trainer: Trainer, record: Record, reason: str | None, **asked: Any) -> None:
        """Write numbers of a step without a probe.

        Args:
            trainer: has the loggers.
            record: the step and its numbers.
            reason: why something is missing, if it is.
            asked: what was asked for beyond the settings; told once a fit.
        """
        self._publisher.tell(trainer, lambda: self._numbers(trainer, record, reason, asked))

    def _numbers(self, trainer: Trainer, record: Record, reason: str | None, asked: dict[str, Any]) -> dict[str, Any]:
        entry = tab_entry(record, reason=reason)
        if not self._has_header and (run := self._runner.run) is not None:
            entry["run"] = {**asked, **self._header(trainer, run)}
            self._has_header = True
        return entry

    def _entry(self, trainer: Trainer, run: ProbeRun, record: Record) -> dict[str, Any]:
        header = None if self._has_header else self._header(trainer, run)
        densities = [item.history[-1] for item in run.settings.taken if isinstance(item, Density) and item.history]
        entry = tab_entry(
            record,
            run.overlaps,
            density=next((found for found in densities if found.step == record.step), None),
            passed_over=self._runner.schedule.num_passed_over or None,
            run=header,
            **self._now,
        )
        self._has_header = True
        return entry

    def _header(self, trainer: Trainer, run: ProbeRun) -> dict[str, Any]:
        settings = {name: getattr(run.settings, name) for name in WANTED}
        settings["max_overhead"] = self._runner.schedule.max_overhead
        optimizers = trainer.optimizers
        return {
            **{name: value for name, value in settings.items() if value is not None},
            "n": run.partition.n,
            "ranks": run.ranks.count,
            "optimizer": type(optimizers[0]).__name__ if len(optimizers) == 1 else f"{len(optimizers)} optimizers",
            "precision": str(getattr(trainer.precision_plugin, "precision", "")),
            "versions": _versions(),
            **_sizes(self._runner.source.sample),
        }


def _now(trainer: Trainer) -> dict[str, Any]:
    if len(trainer.optimizers) != 1:
        return {}
    [optimizer] = trainer.optimizers
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    return {"lr": max(rates, default=None), "threshold": sgd_threshold(optimizer)}


def _sizes(sample: Sample | None) -> dict[str, Any]:
    if sample is None:
        return {}
    hessian = sum(batch.weight for batch in sample.hessian)
    gradient = hessian + sum(batch.weight for batch in sample.extra)
    return {"sample": round(hessian), "gradient_sample": round(gradient), "share": sample.hessian_share}


def _versions() -> dict[str, str]:
    import torch

    return {"lightning_subspace": lightning_subspace.__version__, "torch": torch.__version__}
