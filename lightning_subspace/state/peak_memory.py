"""Peak of the memory on a GPU while something runs.

torch keeps one peak for each device, since the last reset. A reset would take the user's own away, and nothing could
put it back. So the peak is read before and behind: where it has risen, it is the new one, which has been measured;
elsewhere less was needed than had been before, which bounds it.
"""

from __future__ import annotations

import torch


class PeakMemory:
    """The peak on a GPU from now on.

    There is none on a CPU, where nobody counts it.

    Args:
        device: of the module.

    Example:
        >>> PeakMemory(torch.device("cpu")).text is None
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._read()

    @property
    def text(self) -> str | None:
        """The peak of all that is allocated; None on a CPU."""
        before, now = self._before, self._read()
        if before is None or now is None:
            return None
        if now > before:
            return f"a peak of {now / 1e6:.1f} MB with all else on the GPU (measured)"
        return f"at most the peak of {now / 1e6:.1f} MB that the GPU has had before (measured)"

    def _read(self) -> int | None:
        if self._device.type != "cuda":
            return None
        try:
            return torch.cuda.max_memory_allocated(self._device)
        except RuntimeError:  # an allocator of somebody else's has no statistics
            return None
