"""A long sequence: memory and time of a Hessian product with math attention and with attention in blocks.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.attention [--width 64] [--depth 1] [--heads 4] [--length 2048]

A transformer over one causal sequence with random weights, each kind of attention in a process of its own: bytes of the
retained graph, the peak of the resident set over what it was before, and seconds of a product. Ends in an assertion
where products are apart, or where blocks keep anything that grows with the square of the length.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_subspace.curvature import Hessian
from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss import attention_scores
from lightning_subspace.loss.findings import findings_of
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.benchmarks.growth import peak_mb
from tests.benchmarks.pages import keep
from tests.benchmarks.workloads import Block

PRODUCTS, VOCABULARY = 3, 64


@dataclass(frozen=True)
class Measured:
    graph: float  # MB, as the others
    scores: float
    peak_of_graph: float
    peak_of_product: float
    seconds_of_graph: float
    seconds_of_product: float
    image: list[float]


def next_token(module: nn.Module, tokens: Tensor, index: int) -> Tensor:
    return F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def measured(asked: argparse.Namespace, in_blocks: bool) -> Measured:
    if in_blocks:
        attention_scores.free_memory = lambda device: 0.0  # type: ignore[attr-defined]
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Embedding(VOCABULARY, asked.width),
        *(Block(asked.width, asked.heads, causal=True) for _ in range(asked.depth)),
        nn.Linear(asked.width, VOCABULARY),
    )
    space, generator = ParameterSpace.of(module), torch.Generator().manual_seed(1)
    sample = sample_of_batches([torch.randint(VOCABULARY, (1, asked.length + 1), generator=generator)])
    direction, footprint = torch.randn(space.n, generator=generator), Footprint()
    with TrainingLoss(module, space, next_token) as loss:
        before = peak_mb(forget=True)
        started = time.perf_counter()
        operator = Hessian(loss, sample.hessian, footprint=footprint)
        built, peak_of_graph = time.perf_counter() - started, peak_mb() - before
        image = operator.matvec(direction)
        peak_mb(forget=True)
        started = time.perf_counter()
        for _ in range(PRODUCTS):
            operator.matvec(direction)
        seconds, peak = (time.perf_counter() - started) / PRODUCTS, peak_mb() - before
    found = findings_of(module).scores
    scores = (found.nbytes + found.avoided) / 1e6
    return Measured(footprint.largest / 1e6, scores, peak_of_graph, peak, built, seconds, image.tolist())


def alone(asked: argparse.Namespace, in_blocks: bool) -> Measured:
    """Measured in a process of its own, whose memory nothing before has filled."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (asked, in_blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 64, "depth": 1, "heads": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--json", type=Path, help="where to store the table")
    asked: Any = parser.parse_args()
    kept = []
    for length in asked.lengths:
        asked.length = length
        kept += compared(asked)
    if asked.json:
        keep(asked.json, kept, ("graph", "peak_of_product", "seconds_of_product"))


def compared(asked: Any) -> list[Measured]:
    """Both ways at one length, shown and checked."""
    print(asked)
    print(
        "| attention | scores by the forecast | graph, MB | peak of the graph | peak of a product | s | s a product |"
    )
    print("| --- " * 7 + "|")
    rows = {name: alone(asked, name == "blocks") for name in ("math", "blocks")}
    for name, row in rows.items():
        print(
            f"| {name} | {row.scores:.0f} | {row.graph:.0f} | {row.peak_of_graph:.0f} | {row.peak_of_product:.0f} | "
            f"{row.seconds_of_graph:.1f} | {row.seconds_of_product:.2f} |"
        )
    math, blocks = (torch.tensor(row.image) for row in rows.values())
    assert float((blocks - math).norm()) <= 1e-5 * float(math.norm())
    assert rows["blocks"].graph <= rows["math"].graph - 0.9 * rows["math"].scores
    return list(rows.values())


if __name__ == "__main__":
    main()
