"""Watch on hooks that may change a batch.

A sample that is drawn from the dataset stands for the batches of training only if no hook changes these. Where hooks
may, some batches of each epoch are compared: as the loader gives them, and as they reach `training_step`. These are the
first ones, and then ever fewer: a hook may set in later, or act on some batches alone.
"""

from __future__ import annotations

from typing import Any

from lightning_subspace._lightning import Trainer
from lightning_subspace.callbacks.tap import before_hooks, forget_raw_batches
from lightning_subspace.data.micro_batch import checksum

FIRST = 16  # batches of an epoch that are compared, before only those whose number is a power of two


class HookWatch:
    """Compares batches before and behind the hooks."""

    def __init__(self) -> None:
        self._raw: int | None = None
        self._is_armed = False
        self._number = 0  # of the coming batch in its epoch

    def begin(self, trainer: Trainer) -> None:
        """Watch the first batch."""
        self._number = 0
        self._arm(trainer)

    def see_batch(self, trainer: Trainer, *, is_first: bool) -> bool:
        """Whether the batch that comes is to be compared.

        Args:
            trainer: at the start of the batch.
            is_first: whether it is the first one of its epoch.
        """
        is_due, self._is_armed = self._is_armed, False
        forget_raw_batches(trainer, self)
        self._number = 1 if is_first else self._number + 1
        return is_due

    def go_on(self, trainer: Trainer) -> None:
        """Watch the next batch if it is its turn."""
        if self._number < FIRST or self._number & (self._number - 1) == 0:
            self._arm(trainer)

    def has_changed(self, batch: Any) -> bool:
        """Whether a batch is another one than the loader has given."""
        return self._raw != checksum(batch)

    def _arm(self, trainer: Trainer) -> None:
        self._is_armed, self._raw = True, None

        def see(batch: Any) -> None:
            self._raw = None
            try:
                self._raw = checksum(batch)
            except Exception:  # nothing to compare with
                return
            before_hooks(trainer, self, see)  # a batch of validation may come between: the last one counts

        before_hooks(trainer, self, see)


def change_notice(step: int, *, gathers: bool) -> str:
    """What is said of a hook that was found to change batches.

    Args:
        step: of the batch.
        gathers: whether the sample is gathered from now on; not where a whole dataset was asked for.
    """
    now = "from now on the sample is gathered behind the hooks" if gathers else "the sample has none of that"
    then = "" if gathers else "; a number, such as sample=1024, is gathered behind the hooks"
    return (
        f"a hook (on_train_batch_start, or one of a transfer) has changed a batch at step {step}; {now}. Probes until "
        f"now were of examples that no hook had changed{then}."
    )
