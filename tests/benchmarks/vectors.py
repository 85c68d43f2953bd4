"""The solver's own work on vectors: random ones beside torch's, and a basis in host memory beside one in place.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.vectors [--json vectors.json] [--n 10000000]

Processor time. Random vectors of a million coordinates, the fastest of some draws. For the basis k = 10, a matrix whose
product costs next to nothing, and the solver's own work on the first 25 products, the best of three runs; a device that
is another memory is played by the CPU, as in the tests of tiles, so that what is moved is copied within one memory.
Ends in an error where the pairs of the two places differ in a bit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lightning_subspace.linalg import eigsh, tiles
from lightning_subspace.linalg.normals import normals
from tests.benchmarks.clock import seconds

COORDINATES, DRAWS = 1_000_000, 7
K, PRODUCTS, RUNS = 10, 25, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="the numbers")
    parser.add_argument("--n", type=int, default=10_000_000, help="length of the vectors of the basis")
    asked = parser.parse_args()
    found = {"normals": random_vectors(), "basis": places(asked.n)}
    print("nanoseconds a coordinate:", *(f"{name} {1e9 * taken:.1f};" for name, taken in found["normals"].items()))
    print(f"seconds of {PRODUCTS} products, n = {asked.n:,}:", *(f"{k} {v:.2f};" for k, v in found["basis"].items()))
    if asked.json is not None:
        asked.json.write_text(json.dumps(found | {"n": asked.n, "k": K, "products": PRODUCTS}, indent=1) + "\n")


def random_vectors() -> dict[str, float]:
    """Seconds a coordinate."""
    ways: dict[str, Callable[[], Tensor]] = {
        "here": lambda: normals(0, 1, [range(COORDINATES)], torch.float32),
        "torch, float32": lambda: torch.randn(COORDINATES, dtype=torch.float32),
        "torch, float64": lambda: torch.randn(COORDINATES, dtype=torch.float64),
    }
    return {name: seconds(draw, rounds=DRAWS) / COORDINATES for name, draw in ways.items()}


def places(n: int) -> dict[str, float]:
    """Processor seconds of the solver with the basis on the device, and in another memory."""
    diagonal = torch.linspace(0.0, 1.0, n) ** 20
    found: dict[str, float] = {}
    answers: dict[str, Any] = {}

    def solve(place: tiles.BasisPlace) -> None:
        answers[place] = eigsh(
            lambda v: diagonal * v, n, K, max_matvecs=PRODUCTS, ncv=PRODUCTS, verify="never", basis=place
        )

    with mock.patch.object(tiles, "is_staged", lambda place, device: place == "cpu"):
        for place in ("device", "cpu"):
            found[place] = seconds(partial(solve, place), rounds=RUNS) / PRODUCTS
    assert torch.equal(answers["device"].eigenvalues, answers["cpu"].eigenvalues), "the two places have other numbers"
    return found


if __name__ == "__main__":
    main()
