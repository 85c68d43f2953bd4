"""State of a run in checkpoints, for both callbacks.

A checkpoint holds the run of the module that it is of, and of no other: one callback may be handed from model to model.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import override

from lightning_subspace._lightning import Callback, Trainer, state_key
from lightning_subspace.callbacks.notices import Notices
from lightning_subspace.callbacks.runner import ProbeRunner

ANOTHER_RUN = (
    "this fit does not start where the last one ended, so it is a run of its own: `history` is now its history; the {} "
    "records of the run before are given up here, and stay in the loggers."
)
NOT_SAVED = "the checkpoint is written without what was measured, which belongs to another module or trainer."


class Resumable(Callback):
    """Callback with a run that checkpoints continue.

    Attributes:
        name: tells the callbacks of one class in a Trainer apart.
    """

    name: str
    _runner: ProbeRunner
    _notices: Notices

    def __init__(self) -> None:
        super().__init__()
        self._saved: Any = None  # from a checkpoint, until training goes on from it

    @property
    @override
    def state_key(self) -> str:
        """Tells the callbacks of a Trainer apart in its checkpoints."""
        return state_key(self, name=self.name)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts and there is a module."""
        self._saved = state_dict

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Leave the run of another module or trainer out."""
        if self._runner.run is not None and not self._runner.is_of(trainer, pl_module):
            checkpoint.get("callbacks", {}).pop(self.state_key, None)
            self._notices.info_once(NOT_SAVED)

    @override
    def teardown(self, trainer: Trainer, pl_module: nn.Module, stage: str) -> None:
        """Drop a state loaded to validate, while there is a run."""
        if stage != "fit" and self._runner.run is not None:
            self._saved = None
