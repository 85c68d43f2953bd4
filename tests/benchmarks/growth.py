"""How the cost of a probe grows with the number of parameters and with the sample: both linearly.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.growth [--largest 1e7] [--out growth.png] [--json growth.json]

An MLP of one width after another on images of MNIST at its initialisation; every probe in a process of its own, whose
peak memory is then its own too. Products are stopped at 20, since their number depends on the spectrum and not on n.

Time is that of the process on its core, which a busy machine changes less than that by the clock. It is divided into
that inside of products with the Hessian, of which the median is given, and that outside (the Krylov basis and the
decisions). Memory beside the graphs, which depend on the sample, is given in vectors of n numbers: (ncv + k + 8) are
allowed. They are counted in a run of their own, through a restart and to an answer of k vectors, by a dispatch mode,
which follows the storages that torch makes; the peak of the process is given beside. Graphs are what is alive with them
and not without them: the mean gradient and the copies of the parameters are vectors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_subspace.curvature import Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.linalg import eigsh
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.benchmarks.workloads import cross_entropy, digits

K, NCV, PRODUCTS = 10, 30, 20
COUNTED = NCV + 5  # products while memory is counted: a few behind the restart
DEFAULT_SAMPLE, BATCH = 1024, 64
ALLOWED = NCV + K + 8
LINEAR = (0.7, 1.3)  # slopes, on axes with logarithms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=1e7, help="number of parameters")
    parser.add_argument("--out", type=Path, default=Path("growth.png"))
    parser.add_argument("--json", type=Path, default=None, help="the rows")
    parser.add_argument("--one", nargs=2, type=int, metavar=("N", "SAMPLE"), help="one probe, as JSON: for itself")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(*asked.one)))
        return
    sizes = [10**e for e in range(4, 8) if 10**e <= asked.largest]
    by_n = [in_own_process(n, 128) for n in sizes]
    report("n", "n", by_n)
    by_sample = [in_own_process(10**5, sample) for sample in (128, 256, 512, 1024, 2048, 4096)]
    report("sample", "sample", by_sample)
    default = in_own_process(10**6, DEFAULT_SAMPLE)
    report(f"n = 1e6, the default sample of {DEFAULT_SAMPLE}", "n", [default])
    plot(by_n, by_sample, asked.out)
    rows = {"n": by_n, "sample": by_sample, "default": [default]}
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1))
    failures = [f"{row['vectors']:.1f} vectors at {row}" for part in rows.values() for row in part if not fits(row)]
    large = [row for row in by_n if row["n"] > 5e4]  # at fewer parameters calls of torch take the time
    for against, slopes in (("n", slopes_of("n", large)), ("sample", slopes_of("sample", by_sample[-2:]))):
        failures += [f"slope {slope:.2f} against {against}" for slope in slopes if not LINEAR[0] <= slope <= LINEAR[1]]
    if default["outside"] >= 0.1:
        failures.append(f"{default['outside']:.1%} outside of products with the default sample")
    assert not failures, "\n".join(failures)


def fits(row: dict[str, float]) -> bool:
    return row["vectors"] <= ALLOWED


def slopes_of(against: str, rows: list[dict[str, float]]) -> list[float]:
    """By how much time grows from each row to the next: the exponent."""
    return [
        math.log(row["product"] / last["product"], row[against] / last[against])
        for last, row in itertools.pairwise(rows)
    ]


def in_own_process(n: int, sample: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.growth", "--one", str(n), str(sample)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row: dict[str, float] = json.loads(output.splitlines()[-1])
    return row


def measured(n: int, sample: int) -> dict[str, float]:
    """One probe: seconds first, then once more with every allocation counted."""
    torch.set_num_threads(1)
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:sample]
    batches = [(images[part], labels[part]) for part in order.split(BATCH)]
    torch.manual_seed(0)
    net = network(n)
    before = peak_mb(forget=True)
    spent = dict.fromkeys(("graphs", "all"), 0.0)
    products: list[float] = []

    def probe() -> None:
        started = time.process_time()
        with TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as loss:
            hessian = Hessian(loss, sample_of_batches(batches).hessian)
            spent["graphs"] = time.process_time() - started

            def product(v: Tensor) -> Tensor:
                begun = time.process_time()
                image = hessian.matvec(v)
                products.append(time.process_time() - begun)
                return image

            eigsh(product, hessian.n, K, ncv=NCV, max_matvecs=PRODUCTS, verify="never", tol=1e-5)
        spent["all"] = time.process_time() - started

    probe()
    peak = peak_mb()
    row = {"n": ParameterSpace.of(net).n, "sample": sample, "seconds": spent["all"]}
    row["product"] = statistics.median(products)
    row["outside"] = 1.0 - (sum(products) + spent["graphs"]) / spent["all"]
    return row | counted(net, sample_of_batches(batches).hessian) | {"rss_mb": peak - before}


def counted(net: nn.Module, sample: Sequence[MicroBatch]) -> dict[str, float]:
    """Bytes of the graphs, and the peak of all else in a probe, in vectors."""
    with Allocations() as allocations, TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as loss:
        hessian = Hessian(loss, sample, memory=0.0)
        without = allocations.alive
        del hessian
        allocations.peak = allocations.alive
        hessian = Hessian(loss, sample)
        graphs = allocations.alive - without
        found = eigsh(hessian.matvec, hessian.n, K, ncv=NCV, max_matvecs=COUNTED, verify="never", tol=1e-5)
    assert hessian.num_retained == len(sample), "not all graphs fit into memory"
    assert found.num_restarts > 0, "no restart, whose memory was to be counted"
    assert len(found.eigenvectors) == K
    return {"graphs_mb": graphs / 1e6, "vectors": (allocations.peak - graphs) / 4 / hessian.n}


def peak_mb(*, forget: bool = False) -> float:
    """The largest resident memory of this process so far; `forget`: what it is now, and count from here (Linux)."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1e3


def network(n: int) -> nn.Module:
    """Two hidden layers of one width, of about n parameters."""
    width = round((-796 + math.sqrt(796**2 + 4 * n)) / 2)
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )  # fmt: skip


class Allocations(TorchDispatchMode):
    """Bytes of the storages that torch operations have made while this was on.

    Attributes:
        alive: now.
        peak: at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place and place not in known and place not in self._seen:
                    self._seen[place] = storage.nbytes()
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._freed(place))
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, place: int) -> Callable[[], None]:
        def forget() -> None:
            self.alive -= self._seen.pop(place, 0)

        return forget


def report(title: str, against: str, rows: list[dict[str, float]]) -> None:
    print(f"\nCost against {title}\n")
    print("| n | sample | seconds a product | outside products | graphs, MB | vectors | process, MB | slope |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row, slope in zip(rows, ["", *(f"{slope:.2f}" for slope in slopes_of(against, rows))], strict=True):
        print(
            f"| {row['n']:,.0f} | {row['sample']:.0f} | {row['product']:.4f} | {row['outside']:.1%} | "
            f"{row['graphs_mb']:.0f} | {row['vectors']:.1f} | {row['rss_mb']:.0f} | {slope} |",
            flush=True,
        )


def plot(by_n: list[dict[str, float]], by_sample: list[dict[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, rows, key in zip(axes, (by_n, by_sample), ("n", "sample"), strict=True):
        places = [row[key] for row in rows]
        axis.loglog(places, [row["product"] for row in rows], "o-", label="seconds a product")
        axis.loglog(places, [row["rss_mb"] / 1e3 for row in rows], "s-", label="peak memory, GB")
        axis.loglog(places, [rows[-1]["product"] * place / places[-1] for place in places], "k:", label="linear")
        axis.set_xlabel({"n": "parameters", "sample": "examples"}[key])
        axis.set_xticks(places, [f"{place:,.0f}" for place in places])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.legend()
    figure.savefig(path, dpi=120)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    main()
