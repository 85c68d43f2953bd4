"""Spectrum of the last updates of training.

For displacements d_1 ... d_W, each over `stride` consecutive optimizer steps, the last one ending where the probe is,
sigma_1 >= sigma_2 >= ... are the singular values of the matrix with these rows: sigma_i^2 are the eigenvalues of its
Gram matrix. From count-sketches, which are the vectors themselves where n <= 4,096.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_subspace._arguments import require_integer
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.noise_estimate import participation
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace.sketch import CELLS, TABLES, local_cells
from lightning_subspace.subspace.subspace import inner_products

# Of sigma_1^2: below it an eigenvalue of a Gram matrix of float32 vectors is rounding.
ROUNDING = 1e-6


class UpdateSpectrum(Measurement):
    """`updates/...`: singular values of the last W updates.

    - `updates/participation`: (sum sigma_i^2)^2 / sum sigma_i^4, in [1, W]: how many directions the trajectory has.
    - `updates/first_share`: sigma_1^2 / sum sigma_i^2.
    - `updates/gap_ratio`, `updates/gap_index`: sigma_1 / sigma_2, and the i at which sigma_i / sigma_{i+1} is largest.
    - `updates/singular_value/01` ... `W`; those that are rounding are left out.

    A gap that opens has been read as a sign of generalisation to come (arXiv 2603.15678). It is none by itself: on
    modular addition the ratio rises alike for labels that are random (`examples/reproduce/update_spectrum.py`). Without
    any structure a random walk has a participation of W and a ratio of 1; noise with momentum .9 has 1.8, a drift 2 and
    more, and a learning rate that drops by 10 within the window any ratio up to 10, at the index of the updates before
    the drop.

    Costs a copy of the parameters and a sketch at each of the W * stride steps before a probe, and no product; known
    from the first probe on that has so many steps before it. With 4,096 cells ratios are right within 2 %.

    Args:
        window: W, the number of displacements.
        stride: optimizer steps in each.
        every: taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for `window` below 2, or `stride` or `every` that is not a positive integer.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=0, measurements=[UpdateSpectrum(window=8)])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self, window: int = 16, stride: int = 1, every: int = 1) -> None:
        self.count = int(require_integer("window", window, 2))
        self.stride, self.every = positive("stride", stride), positive("every", every)
        self.window = self.count * self.stride
        self._seen: deque[tuple[int, Tensor]] = deque(maxlen=self.window)  # steps and images of updates, on the CPU

    def see_update(self, step: int, update: Tensor, partition: Partition) -> None:
        """Keep the image of an update."""
        image = update if partition.n <= CELLS else local_cells(update[None], partition)[0]
        self._seen.append((step, image.to("cpu", torch.float32, copy=True)))

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """A sum over ranks."""
        images = self._consecutive(probe.step)
        length = probe.partition.local_n if probe.partition.n <= CELLS else CELLS
        # Where the budget has missed one on some rank, or they are of other parameters, there is no window.
        is_whole = len(images) == self.window and all(len(image) == length for image in images)
        if not all(probe.partition.ranks.all_gather_object(is_whole)):
            return {}
        moved = torch.stack(images).view(self.count, self.stride, length).sum(1)
        if probe.partition.n <= CELLS:
            gram = inner_products(moved, moved, probe.partition.ranks)
        else:
            whole = probe.partition.ranks.all_reduce(moved).double()
            gram = whole @ whole.T / TABLES
        return spectrum_of(gram.cpu())

    def __getstate__(self) -> dict[str, Any]:
        """Leave the updates behind."""
        return {**vars(self), "_seen": deque(maxlen=self.window)}

    def _consecutive(self, step: int) -> list[Tensor]:
        """Images of the updates of consecutive steps up to this one."""
        steps = [at for at, _ in self._seen]
        if not steps or steps[-1] != step:
            return []
        apart = steps[-1] - steps[-2] if len(steps) > 1 else 1
        last = len(steps) - 1
        return [image for place, (at, image) in enumerate(self._seen) if at == step - apart * (last - place)]


def spectrum_of(gram: Tensor) -> dict[str, float]:  # (W, W)
    """Numbers of a Gram matrix of updates.

    Example:
        >>> found = spectrum_of(torch.diag(torch.tensor([9.0, 1.0, 1.0])))
        >>> found["updates/gap_ratio"], found["updates/gap_index"]
        (3.0, 1.0)
    """
    squares = torch.linalg.eigvalsh(gram.double()).flip(0)
    total = float(squares.clamp(min=0.0).sum())
    if not total > 0.0:
        return {}
    known = squares[squares > ROUNDING * squares[0]]
    found = {
        "updates/participation": participation(gram.double()),
        "updates/first_share": float(squares[0]) / total,
    }
    if len(known) > 1:
        ratios = (known[:-1] / known[1:]).sqrt()
        found |= {"updates/gap_ratio": float(ratios[0]), "updates/gap_index": float(ratios.argmax() + 1)}
    values = {f"updates/singular_value/{place:02}": value for place, value in enumerate(known.sqrt().tolist(), 1)}
    return {**found, **values}
