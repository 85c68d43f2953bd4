"""The Gauss-Newton matrix of a language model of 50,257 tokens: memory and time with and without the closed form.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.vocabulary [--width 64] [--depth 1] [--sequences 4] [--length 256]

The closed form of the cross-entropy (`loss/cross_entropy.py`) and the graph of torch, each in a process of its own, on
one micro-batch with random weights and tokens: bytes of the retained graph, the peak of the resident set over what it
was before, in copies of all logits, and seconds of a product. Ends in an assertion where products are apart, or the
closed form does not keep nearly two copies less.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_subspace.curvature import GaussNewton, gauss_newton
from tests.benchmarks.big import GPT, VOCABULARY, Size, next_token
from tests.benchmarks.pages import keep
from tests.benchmarks.product import alone, product_of

PRODUCTS = 5


@dataclass(frozen=True)
class Measured:
    graph: float  # copies of all logits, as the peaks
    peak_of_graph: float
    peak_of_product: float
    seconds_of_graph: float
    seconds_of_product: float
    image: list[float]  # some entries of the product, and its norm


def measured(asked: argparse.Namespace, is_closed: bool) -> Measured:
    if not is_closed:
        gauss_newton.closed_cross_entropy = lambda args, named: None  # type: ignore[attr-defined]
    torch.manual_seed(0)
    module = GPT(Size(asked.width, asked.depth, asked.heads))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (asked.sequences, asked.length + 1), generator=generator)
    logits = 4e-6 * asked.sequences * asked.length * VOCABULARY  # MB
    found = product_of(GaussNewton, module, next_token, tokens, PRODUCTS)
    some = [*found.image[:: len(found.image) // 1000].tolist(), float(found.image.norm())]
    sizes = (size / logits for size in (found.graph, found.peak_of_graph, found.peak_of_product))
    return Measured(*sizes, found.seconds_of_graph, found.seconds_of_product, some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 64, "depth": 1, "heads": 4, "sequences": 4, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="where to store the table")
    asked: Any = parser.parse_args()
    logits = asked.sequences * asked.length * VOCABULARY
    print(f"{asked}; all logits once: {4e-6 * logits:.0f} MB")
    print(
        "| | graph, in copies of all logits | peak while it is built | peak of a product | seconds: graph | product |"
    )
    print("| --- " * 6 + "|")
    rows = {name: alone(measured, asked, name == "closed form") for name in ("graph of torch", "closed form")}
    for name, row in rows.items():
        print(
            f"| {name} | {row.graph:.1f} | {row.peak_of_graph:.1f} | {row.peak_of_product:.1f} | "
            f"{row.seconds_of_graph:.1f} | {row.seconds_of_product:.2f} |"
        )
    theirs, mine = (torch.tensor(row.image) for row in rows.values())
    assert float((mine - theirs).norm()) <= 1e-5 * float(theirs.norm())
    assert rows["closed form"].graph < rows["graph of torch"].graph - 1.5
    if asked.json:
        keep(asked.json, rows.values(), ("graph", "peak_of_product", "seconds_of_product"))


if __name__ == "__main__":
    main()
