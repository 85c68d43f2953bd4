"""A long sequence: memory and time of a Hessian product with math attention and with attention in blocks.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.attention [--width 64] [--depth 1] [--heads 4] [--length 2048]

A transformer over one causal sequence with random weights, each kind of attention in a process of its own: bytes of the
retained graph, the peak of the resident set over what it was before, and seconds of a product. Ends in an assertion
where products are apart, or where blocks keep anything that grows with the square of the length.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_subspace.curvature import Hessian
from lightning_subspace.loss import attention_scores
from lightning_subspace.loss.findings import findings_of
from tests.benchmarks.pages import keep
from tests.benchmarks.product import alone, product_of
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
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (1, asked.length + 1), generator=generator)
    found = product_of(Hessian, module, next_token, tokens, PRODUCTS)
    scores = findings_of(module).scores
    return Measured(**{**vars(found), "image": found.image.tolist()}, scores=(scores.nbytes + scores.avoided) / 1e6)


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
    rows = {name: alone(measured, asked, name == "blocks") for name in ("math", "blocks")}
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
