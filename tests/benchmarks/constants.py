"""Numbers of the pages that are constants of the package."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from lightning_subspace import SubspaceMonitor, eigsh
from lightning_subspace.curvature.joining import CPU_BYTES
from lightning_subspace.data.reading import READ_TIMEOUT
from lightning_subspace.linalg import tiles
from lightning_subspace.linalg.stopping import VALUE_ERROR
from lightning_subspace.loss import opaque, surroundings, watched
from lightning_subspace.probe import sample_state, second_opinion
from lightning_subspace.report.tab_entry import POINTS
from lightning_subspace.state.bulk import SMALLEST
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.sketch import CELLS, Sketch
from lightning_subspace.subspace.subspace import TRUSTED_ERROR
from lightning_subspace.subspace.table import MOST_GROUPS
from tests.benchmarks.pages import Piece, Sentence, short

README = "README.md"
CALLBACKS, CURVATURE, LINALG, LOSS, MEASUREMENTS, REPORT, TAB = (
    f"lightning_subspace/{room}/README.md"
    for room in ("callbacks", "curvature", "linalg", "loss", "measurements", "report", "tensorboard_tab")
)
K = 10  # the default


def constants() -> list[Piece]:
    """All of them."""
    held, cells = str(OverlapHistory().keep), f"{CELLS:,}"
    error = short(Sketch(torch.eye(K, CELLS), exact=False).error, 3)
    largest = f"{4 * K * OverlapHistory().keep * CELLS / 1e6:.1f}"  # float32
    known, block = f"{VALUE_ERROR * 100:.0f}", str(second_opinion.BLOCK)
    return [
        Sentence(README, "equal eigenvalues at a risk of {} %", (share(eigsh, "delta"),)),
        Sentence(README, "({} % of the time by default)", (share(SubspaceMonitor, "max_overhead"),)),
        Sentence(README, "eigenvalue that is not known to {} %", (known,)),
        Sentence(README, "above {} fractions and overlaps are left out", (str(TRUSTED_ERROR),)),
        Sentence(CALLBACKS, "of {} that are spread evenly over log(step)", (held,)),
        Sentence(CALLBACKS, "was not stopped; above {} parameters", (cells,)),
        Sentence(CALLBACKS, "k min(n, {}) bytes ({} MB for k = 10)", (str(CELLS), largest)),
        Sentence(CALLBACKS, "the mean of the last {} losses", (block,)),
        Sentence(CALLBACKS, "loss with {} losses before and {} behind", (block, block)),
        Sentence(CALLBACKS, "`read_timeout` | {} | seconds", (f"{READ_TIMEOUT:.0f}",)),
        Sentence(CALLBACKS, "of plain tensors, up to {} MiB", (mib(sample_state.LARGEST),)),
        Sentence(CURVATURE, "a joined graph has at most {} MB", (mib(CPU_BYTES),)),
        Sentence(LINALG, "in tiles of 2^{} columns", (str(tiles.WIDTH.bit_length() - 1),)),
        Sentence(LOSS, "containers of {} entries and more", (str(SMALLEST),)),
        Sentence(LOSS, "Small tensors and arrays ({} MiB", (mib(watched.MOST_COMPARED),)),
        Sentence(LOSS, "Arrays beyond {} MiB have no version counter", (mib(watched.MOST_COMPARED),)),
        Sentence(LOSS, "at the end of a probe, {} MiB in all", (mib(watched.MOST_HASHED),)),
        Sentence(LOSS, "one of more than {} tensors in large containers", (f"{watched.MOST_TENSORS:,}",)),
        Sentence(
            LOSS,
            "the {} nearest ones are followed, in a user's files {}",
            (f"{surroundings.MOST_AROUND:,}", f"{surroundings.MOST_GLOBAL:,}"),
        ),
        Sentence(LOSS, "themselves are pickled ({} MiB each)", (mib(opaque.MOST),)),
        Sentence(MEASUREMENTS, "(../subspace/table.py) of at most {}", (str(MOST_GROUPS),)),
        Sentence(REPORT, "sketches of {} numbers a vector, with a standard deviation of at most {}", (cells, error)),
        Sentence(REPORT, "for fewer than {} parameters they are exact. At most {} sketches", (cells, held)),
        Sentence(TAB, "`density` | {} values", (str(POINTS),)),
        Sentence(TAB, "`groups`, at most {} names", (str(MOST_GROUPS),)),
    ]


def share(function: Callable[..., object], argument: str) -> str:
    """The default of an argument, in per cent."""
    return f"{100 * inspect.signature(function).parameters[argument].default:.0f}"


def mib(size: int) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:.0f}"
