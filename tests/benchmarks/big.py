"""A probe of a model of the size of GPT-2 small within a memory budget: 124 million parameters, k = 5, two CPU cores.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.big [--size small] [--memory 24] [--text README.md]

Random weights, two sequences of 128 bytes of real text under next-token prediction; written with torch.nn alone, the
embedding tied to the head over 50,257 tokens, of which text read as bytes uses the first 256. The solver's basis gets
what the budget leaves beside the parameters, their copies and the graph of the sample: `ncv` as large as that allows,
at most its default, 2 k + 10, and at least k + 5.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.subspace.solver import Solver
from tests.benchmarks.growth import peak_mb
from tests.benchmarks.workloads import Block

SEQUENCES, LENGTH, VOCABULARY = 2, 128, 50_257
# Vectors of n numbers that a probe needs beside its basis and its answer: weights, copies, gradient, what products
# make on their way, and what the allocator does not give back; 17 were measured at n = 1.3e7.
BESIDE = 18


@dataclass(frozen=True)
class Size:
    width: int
    depth: int
    heads: int
    vocabulary: int = VOCABULARY


SIZES = {"small": Size(768, 12, 12), "tenth": Size(384, 6, 6, 5_000)}


class GPT(nn.Module):
    """Pre-norm blocks with causal attention; the head is the embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(1024, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads, causal=True) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def next_token(module: nn.Module, batch: Tensor, batch_idx: int) -> Tensor:
    return F.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def basis_size(n: int, k: int, memory: float) -> int:
    """The largest useful ncv for a budget in bytes.

    Raises:
        MemoryError: when not even k + 5 fit.
    """
    room = int(memory / (4 * n)) - BESIDE - k - 1
    if room < k + 5:
        needed = (2 * k + 6 + BESIDE) * 4 * n / 2**30
        raise MemoryError(f"k = {k} at n = {n:,} needs {needed:.1f} GiB, got {memory / 2**30:.1f}")
    return min(room, 2 * k + 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--memory", type=float, default=24.0, help="GiB for the whole process")
    parser.add_argument(
        "--graphs", type=float, default=3.0, help="GiB of it for the graph of the sample and for Python"
    )
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--curvature", choices=("hessian", "ggn", "finite-difference"), default="hessian")
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    asked = parser.parse_args()

    text = torch.tensor(list(asked.text.read_bytes()[: SEQUENCES * (LENGTH + 1)])).view(SEQUENCES, LENGTH + 1)
    torch.manual_seed(0)
    module = GPT(SIZES[asked.size])
    space = ParameterSpace.of(module)
    ncv = basis_size(space.n, asked.k, (asked.memory - asked.graphs) * 2**30)
    print(f"n = {space.n:,}, k = {asked.k}, ncv = {ncv}, {torch.get_num_threads()} threads", flush=True)

    choice = CurvatureConfig(next_token, curvature=asked.curvature)
    sample = sample_of_batches([text])
    started = time.perf_counter()
    with choice.loss(module, space) as loss:
        operator = choice.operator(loss, sample)
        graphs = time.perf_counter() - started
        print(f"graph of the gradient: {graphs:.1f} s, peak {peak_mb() / 1024:.2f} GiB", flush=True)
        found = Solver(k=asked.k, ncv=ncv).solve(
            operator,
            verify=False,
            on_matvec=lambda count, residual: print(f"{count} products, residual {residual:.1e}", flush=True),
        )
    seconds = time.perf_counter() - started
    peak = peak_mb() / 1024
    row = {
        "n": space.n,
        "k": asked.k,
        "ncv": ncv,
        "curvature": asked.curvature,
        "matvecs": found.num_matvecs,
        "outcome": found.outcome.name,
        "seconds": seconds,
        "seconds_a_product": (seconds - graphs) / found.num_matvecs,
        "peak_gib": peak,
        "eigenvalues": found.eigenvalues.tolist(),
        "residual": float(found.residuals.max() / found.eigenvalues.max()),
    }
    print("| n | k | ncv | products | seconds | seconds a product | peak, GiB |\n" + "| --- " * 7 + "|")
    print(
        f"| {space.n:,} | {asked.k} | {ncv} | {found.num_matvecs} ({found.outcome.name}) | {seconds:.0f} | "
        f"{row['seconds_a_product']:.1f} | {peak:.1f} |"
    )
    if asked.out is not None:
        asked.out.write_text(json.dumps(row, indent=1))
    assert found.converged
    assert peak <= asked.memory


if __name__ == "__main__":
    main()
