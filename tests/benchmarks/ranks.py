"""What a probe moves and holds on several ranks: bytes and calls a product and a probe, the peak of memory, seconds.

    python -m tests.benchmarks.ranks [--n 100000 1000000] [--ranks 1 2] [--strategies ddp] [--json FILE]

Every case gets fresh processes of one thread that talk over gloo. The strategies: `ddp` is a whole model on every rank
(one rank: no group), `fsdp2` its shards and exact products, which gather it once, and `differences` its shards and
gradients by FSDP alone. The network is an MLP 784-w-w-10 of GELU, the sample 8 micro-batches of 4 examples; of the
first probe the gradient, the solve and the sketch are taken, without self-check and other measurements.

Memory is the peak of the resident set over what it was before the probe. Where ranks outnumber the cores the seconds
say nothing. `--json` puts the rows into a file, beside those of other cases. All of them take about ten minutes on two
cores that others use, too, and 11 GB. A case is left out that would need more than .6 of the free memory.

Ends in an assertion where the bytes of a product are not those of the model in `bill.py`, or its memory is
exceeded.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.state.free_memory import free_memory
from tests.benchmarks.bill import (
    FLOAT,
    STORED_BATCHES,
    Model,
    bound_bytes,
    model_of,
    product_bytes,
    rank_bytes,
)
from tests.processes import run

BATCHES, EXAMPLES = STORED_BATCHES, 4
# Eigenpairs, vectors of the basis and products by the largest n: a large one has a small basis, to fit into 12 GiB.
SOLVES = {10_100_000: (5, 20, 12), 1_000_000_000: (1, 6, 4)}
SIZES, RANKS, STRATEGIES = [100_000, 1_000_000, 10_000_000, 100_000_000], [1, 2, 4, 8], ["ddp", "fsdp2", "differences"]
# FSDP's own collectives, by their names in newer and older versions of torch.
FSDP = {"all_gather": ("all_gather_single", "all_gather_into_tensor")}
FSDP["reduce_scatter"] = ("reduce_scatter_single", "reduce_scatter_tensor")
TIMEOUT, FREE_SHARE = 300.0, 0.6
PADDING = 0.03  # of the parts of a vector, to one length; under FSDP2 to whole rows, which are many in 1e5 over 8 ranks


def net(n: int) -> nn.Module:
    """784-w-w-10 with about n parameters."""
    width = int(-397 + (397**2 + n) ** 0.5)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def solve_of(n: int) -> tuple[int, int, int]:
    """k, ncv and products for a size."""
    return next(found for most, found in SOLVES.items() if n <= most)


class Traffic:
    """Counts FSDP's own collectives, which do not go by `Ranks`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def patches(self) -> list[Any]:
        found = [(kind, name) for kind, names in FSDP.items() for name in names if hasattr(dist, name)]
        return [mock.patch.object(dist, name, self._counted(kind, getattr(dist, name))) for kind, name in found]

    def _counted(self, kind: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self.calls[f"fsdp {kind}"] += 1
            self.nbytes[f"fsdp {kind}"] += max(tensor.nbytes for tensor in tensors)
            return collective(*args, **kwargs)

        return counted


def probe(strategy: str, n: int) -> dict[str, Any]:
    """One probe on this rank, counted."""
    group = dist.group.WORLD if dist.is_initialized() else None
    module = net(n)
    if strategy != "ddp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in module:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    ranks = Ranks(group)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (BATCHES * EXAMPLES,), generator=generator)
    images = torch.randn(10, 784, generator=generator)[labels]
    images = images + torch.randn(images.shape, generator=generator)
    batches = list(zip(images.split(EXAMPLES), labels.split(EXAMPLES), strict=True))
    curvature = "finite-difference" if strategy == "differences" else "hessian"
    k, ncv, products = solve_of(n)
    settings = ProbeSettings(
        k=k,
        ncv=ncv,
        tol=1e-5,
        verify="never",
        max_matvecs=products,
        loss_fn=loss_fn,
        curvature=curvature,
        defaults=False,
    )
    tracker, sample, traffic, marks = (
        ProbeRun(settings, module, ranks),
        sample_of_batches(batches, ranks=ranks),
        Traffic(),
        [],
    )

    def on_matvec(count: int, residual: float) -> None:
        marks.append((time.monotonic(), ranks.calls + traffic.calls, ranks.nbytes + traffic.nbytes))

    before, started = resident(), time.monotonic()
    patches = traffic.patches()
    for patch in patches:
        patch.start()
    record = tracker.measure(module, sample, 0, on_matvec=on_matvec).record
    peak = peak_resident() - before
    assert record.subspace is not None
    (begun, calls, nbytes), (ended, more_calls, more_bytes) = marks[2], marks[-1]
    count = len(marks) - 3
    return {
        "n": tracker.partition.n,
        "k": k,
        "ncv": ncv,
        "layer": max(layer.weight.numel() for layer in module if isinstance(layer, nn.Linear)),
        "graphs": tracker.examples.footprint.graphs + tracker.examples.footprint.of_product,
        "peak": peak,
        "seconds": time.monotonic() - started,
        "seconds a product": (ended - begun) / count,
        "calls a product": {name: (more_calls[name] - calls[name]) / count for name in sorted(more_calls)},
        "bytes a product": {name: (more_bytes[name] - nbytes[name]) / count for name in sorted(more_bytes)},
        "calls": sum((ranks.calls + traffic.calls).values()),
        "bytes": sum((ranks.nbytes + traffic.nbytes).values()),
        "eigenvalues": record.subspace.eigenvalues.tolist(),
    }


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def needed(strategy: str, n: int, num_ranks: int) -> float:
    """Bytes that a case is expected to take on all ranks, with the module and its gradients."""
    k, ncv, _ = solve_of(n)
    model = Model(n, num_ranks, k, ncv, strategy)
    return num_ranks * (rank_bytes(model)["peak"] + 3 * FLOAT * n)


def case(strategy: str, n: int, num_ranks: int) -> dict[str, Any] | None:
    """One row of the table; None where it does not fit, or is none."""
    if strategy != "ddp" and num_ranks == 1:
        return None
    if needed(strategy, n, num_ranks) > FREE_SHARE * free_memory(torch.device("cpu")):
        print(
            f"| {strategy} | {num_ranks} | {n:,} | left out: {needed(strategy, n, num_ranks) / 1e9:.0f} GB |",
            flush=True,
        )
        return None
    by_rank = run(probe, num_ranks, strategy, n, group=num_ranks > 1, timeout=TIMEOUT)
    first = by_rank[0]
    row = {**first, "strategy": strategy, "ranks": num_ranks, "peak": max(found["peak"] for found in by_rank)}
    assert all(found["eigenvalues"] == first["eigenvalues"] for found in by_rank)
    check(row)
    del row["eigenvalues"]
    return row


def check(row: dict[str, Any]) -> None:
    """That a row is what the model of `bill.py` says."""
    measured, expected = row["bytes a product"], product_bytes(model_of(row))
    for name, count in expected.items():
        found = measured.get(name, 0.0)
        assert abs(found - count) <= PADDING * count, (name, found, count)
    peak, bound = row["peak"], bound_bytes(row)
    assert peak <= bound, f"a peak of {peak / 1e6:.0f} MB, at most {bound / 1e6:.0f}"


def text(row: dict[str, Any]) -> str:
    """A row of the table."""
    moved = sum(row["bytes a product"].values())
    calls = sum(row["calls a product"].values())
    return (
        f"| {row['strategy']} | {row['ranks']} | {row['n']:,} | {moved / 1e6:.2f} | {moved / row['n']:.1f} n | "
        f"{calls:.1f} | {row['bytes'] / 1e6:.1f} | {row['calls']} | {row['peak'] / 1e6:.0f} | "
        f"{row['peak'] / row['n'] / FLOAT:.0f} n | {row['seconds a product']:.2f} |"
    )


HEAD = (
    "| strategy | ranks | n | MB moved a product | in bytes | calls a product | MB a probe | calls a probe | "
    "peak MB a rank | in floats | seconds a product |\n" + "| --- " * 11 + "|"
)


def main(sizes: list[int], counts: list[int], strategies: list[str], file: Path | None) -> None:
    torch.set_num_threads(1)
    print(HEAD)
    started = time.monotonic()
    for strategy, n, num_ranks in product(strategies, sizes, counts):
        if (row := case(strategy, n, num_ranks)) is not None:
            print(text(row), flush=True)
            if file is not None:
                store(row, file)
    print(f"{time.monotonic() - started:.0f} s")


def store(row: dict[str, Any], file: Path) -> None:
    """Keep a row in place of an older one of the same case."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = {name(one): one for one in (*rows, row)}
    about = {"torch": torch.__version__, "machine": f"{platform.machine()}, one thread a rank"}
    ordered = sorted(kept.values(), key=lambda one: (STRATEGIES.index(one["strategy"]), one["n"], one["ranks"]))
    file.write_text(json.dumps({"about": about, "rows": ordered}, indent=1) + "\n")


def name(row: dict[str, Any]) -> tuple[str, int, int]:
    """The case of a row."""
    return row["strategy"], row["ranks"], row["n"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=SIZES)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    main(arguments.n, arguments.ranks, arguments.strategies, arguments.json)
