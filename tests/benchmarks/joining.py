"""Products over small micro-batches, one by one and joined: processor time.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.joining [--json joining.json]

Each network takes a sample of 16 micro-batches at its initialisation; products with both operators are taken in turns,
and the fastest is given. Ends in an error where the two products are apart, or joining saves nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.joined import grouped
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from tests.benchmarks.big import GPT, Size, next_token
from tests.benchmarks.pages import ROOT
from tests.benchmarks.workloads import cnn, colour_images, cross_entropy, digits, mlp

BATCHES, SIZE = 16, 4  # of images; of text, half as many sequences
LENGTH, VOCABULARY = 32, 256
ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="the rows")
    asked = parser.parse_args()
    torch.manual_seed(0)
    text = torch.tensor(list((ROOT / "LICENSE").read_bytes()[: BATCHES * SIZE // 2 * (LENGTH + 1)])) % VOCABULARY
    networks: dict[str, tuple[Callable[[], nn.Module], Any, list[Any]]] = {
        "gpt": (lambda: GPT(Size(64, 2, 4, VOCABULARY)), next_token, list(text.view(-1, LENGTH + 1).chunk(BATCHES))),
        "mlp": (mlp, cross_entropy, in_batches(digits())),
        "cnn": (cnn, cross_entropy, in_batches(colour_images(count=BATCHES * SIZE))),
    }
    rows = {name: measured(make(), loss_fn, batches) for name, (make, loss_fn, batches) in networks.items()}
    print(
        "| network | n | micro-batches | joined to | ms, single | ms, joined |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, row in rows.items():
        times = f"{1e3 * row['single']:.1f} | {1e3 * row['joined']:.1f}"
        print(f"| {name} | {row['n']:,} | {BATCHES} | {row['groups']} | {times} |")
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    assert all(row["joined"] < row["single"] for row in rows.values()), "joining saves nothing"


def in_batches(data: tuple[torch.Tensor, torch.Tensor]) -> list[Any]:
    return list(zip(*(part[: BATCHES * SIZE].chunk(BATCHES) for part in data), strict=True))


def measured(module: nn.Module, loss_fn: Any, batches: list[Any]) -> dict[str, float]:
    """Seconds of a product, both ways."""
    space, sample, single = ParameterSpace.of(module), sample_of_batches(batches), CurvatureConfig(loss_fn)
    joined = single.joining(module, sample, Partition.even(space))
    groups = grouped(sample.hessian, Ranks(), joined.most_joined, joined.joined_bytes)
    direction = torch.randn(space.n, generator=torch.Generator().manual_seed(1))
    taken: dict[str, list[float]] = {"single": [], "joined": []}
    images: dict[str, torch.Tensor] = {}
    with single.loss(module, space) as loss:
        operators = {"single": single.operator(loss, sample), "joined": joined.operator(loss, sample)}
        for _ in range(ROUNDS):
            for way, operator in operators.items():
                begun = time.process_time()
                image = operator.matvec(direction)
                taken[way].append(time.process_time() - begun)
                images[way] = image.clone()
    apart = float((images["single"] - images["joined"]).norm() / images["single"].norm())
    assert apart < 1e-4, f"products are apart by {apart:.1e}"
    return {"n": space.n, "groups": len(groups)} | {way: min(times) for way, times in taken.items()}


if __name__ == "__main__":
    main()
