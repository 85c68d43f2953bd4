"""Keeper of what the measurements of a monitor remember.

Their memory is of one run: it is cleared when one begins, and goes into checkpoints and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_subspace.callbacks.notices import Notices
from lightning_subspace.callbacks.project import misconfiguration
from lightning_subspace.measurements import Measurement
from lightning_subspace.measurements.memory import require_own, take_over
from lightning_subspace.parallel.ranks import Ranks, in_words
from lightning_subspace.probe.sample_state import is_plain
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.state.copies import copied


class Keeper:
    """Keeps what the measurements of one monitor remember.

    What goes wrong in a measurement costs its memory alone.

    Args:
        settings: with the measurements.
        notices: to the user.
    """

    def __init__(self, settings: ProbeSettings, notices: Notices) -> None:
        self._measurements = tuple(settings.measurements or ())
        self._notices = notices
        self._user = object()  # of the measurements; a copy of a monitor has copies of them, and of this

    def begin(self, *, goes_on: bool) -> None:
        """A fit begins, of a new run or of the last one.

        Raises:
            MisconfigurationException: where the last one goes on and a measurement was used elsewhere in between.
        """
        if goes_on:
            with misconfiguration(self._notices.speaker):
                self.require_own()
            return
        take_over(self._measurements, self._user)
        for key, measurement in self._named.items():
            self._clear(key, measurement)

    def require_own(self) -> None:
        """Refuse measurements that were used elsewhere.

        Raises:
            ValueError: naming the first.
        """
        require_own(self._measurements, self._user)

    def state(self) -> dict[str, Any]:
        """What the measurements keep, by their keys."""
        found = {}
        for key, measurement in self._named.items():
            try:
                state = measurement.state_dict()
                if not isinstance(state, Mapping) or not is_plain(dict(state)):
                    raise TypeError("expected a dict of plain values and tensors")
                if state:
                    found[key] = copied(dict(state), lambda tensor: tensor.detach().cpu().clone())
            except Exception as error:
                self._tell(f"state_dict of {key}", error, "the checkpoint is written without it")
        return found

    def resume(self, states: Mapping[str, Any], ranks: Ranks) -> None:
        """Hand out the states of a checkpoint. A collective.

        A measurement that cannot use its own, on any rank, begins anew, as one without a state does.
        """
        failures = {}
        for key, measurement in self._named.items():
            try:
                measurement.load_state_dict(copied(states.get(key, {}), torch.clone))
            except Exception as error:
                failures[key] = in_words(error)
        causes = {key: cause for found in ranks.all_gather_object(failures) for key, cause in found.items()}
        for key, cause in causes.items():
            self._clear(key, self._named[key])
            self._notices.warn(f"the state of {key} in the checkpoint is not used: {cause}. It begins anew.")
        if unknown := sorted(states.keys() - self._named.keys()):
            self._notices.info_once(f"states of the checkpoint that no measurement takes up: {', '.join(unknown)}.")

    @property
    def _named(self) -> dict[str, Measurement]:
        """The measurements by class, and number among those of one class."""
        named: dict[str, Measurement] = {}
        for measurement in self._measurements:
            name = type(measurement).__name__
            count = sum(type(other).__name__ == name for other in named.values())
            named[f"{name}/{count + 1}" if count else name] = measurement
        return named

    def _clear(self, key: str, measurement: Measurement) -> None:
        try:
            measurement.load_state_dict({})
        except Exception as error:
            self._tell(
                f"load_state_dict({{}}) of {key}", error, "expected it to begin anew; it may remember another run"
            )

    def _tell(self, what: str, error: Exception, consequence: str) -> None:
        self._notices.warn_once(what, f"{what} failed: {in_words(error)}; {consequence}.")
