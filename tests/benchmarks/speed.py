"""What a probe costs, beside every other way to the same eigenpairs at the same accuracy: the tables in the README.

    pip install -e '.[benchmark]'
    OMP_NUM_THREADS=1 python -m tests.benchmarks.speed [--quick] [--data colour=cifar.npz] [--out benchmarks.json]
        [--json speed.json]

For each network, k and tolerance all ways run in turn, several times over, and the fastest round of each is kept. Cost
is given in seconds, in products and in gradients: floating-point operations over those of one gradient of the same
loss, counted by torch, which no machine and no load changes. Every answer is judged in float64 by independent code
(`accuracy.py`), and one that does not reach the tolerance is marked as such and not compared.

"later": of the network ten steps further on, which has another spectrum; warm from the space of ten steps before.
"residuals alone": without the gap behind the k-th eigenvalue, which a probe looks at too and no peer does.
"tuned": the smallest budget that reaches the tolerance, found beforehand at no charge; nobody has it in practice.
"as documented": hessian-eigenthings has no stopping rule, so its default budget is doubled until its own flags say
that all pairs have converged; ARPACK gets the tolerance as its `tol`; PyHessian gets its defaults.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_subspace.curvature import CurvatureConfig, Hessian, Operator
from tests.benchmarks import competitors as ways
from tests.benchmarks.accuracy import Answer, Judge
from tests.benchmarks.speed_pages import summary
from tests.benchmarks.workloads import WORKLOADS, Case, colour_images, cross_entropy, digits, trained

OURS = "lightning_subspace"

Result = TypeVar("Result")


@dataclass
class Row:
    """One way on one problem.

    Attributes:
        reached: whether the answer is right to the tolerance.
        seconds: the fastest round.
        gradients: in floating-point operations.
        clock_gradients: in seconds.
    """

    workload: str
    k: int
    tol: float
    way: str
    matvecs: int
    reached: bool
    seconds: float
    gradients: float
    clock_gradients: float
    residual: float
    eigenvalue_error: float
    note: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--k", nargs="+", type=int, default=[10, 20])
    parser.add_argument("--tol", nargs="+", type=float, default=[1e-3, 1e-2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the MLP alone, k = 10, one tolerance, one round")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=FILE", help="digits=... and colour=..., npz")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="all rows")
    parser.add_argument("--json", type=Path, default=None, help="what the tables in the README need of them")
    asked = parser.parse_args()
    if asked.quick:
        asked.workloads, asked.k, asked.tol, asked.rounds = ["mlp"], [10], [1e-3], 1
    files = {name: Path(path) for name, _, path in (item.partition("=") for item in asked.data)}
    rows: list[Row] = []
    for name in asked.workloads:
        workload = WORKLOADS[name]
        data = digits(files.get("digits")) if workload.data == "digits" else colour_images(files.get("colour"))
        order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(0))
        case = trained(workload, (data[0][order], data[1][order]))
        later = Case(workload, case.later, case.later, case.batch)
        judges = [Judge(at, max(asked.k)) for at in (case, later)]
        print(f"\n### {workload.name}, n = {case.space.n:,}\n\n{prices(case)}\n", flush=True)
        for k in asked.k:
            for tol in asked.tol:
                new = list(compare(name, case, judges, k, tol, asked.rounds))
                rows += new
                print("\n".join([*table(new), "", *ratios(new), ""]), flush=True)
                asked.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(summary([asdict(row) for row in rows]), indent=1) + "\n")


@dataclass(frozen=True)
class Contestant:
    """A way on one problem.

    Attributes:
        call: does it all.
        operations: floating-point ones, for a number of products.
        is_later: whether the network a few steps later is measured.
    """

    call: Callable[[], Answer | None]
    operations: Callable[[int], float]
    is_later: bool = False


def compare(name: str, case: Case, judges: Sequence[Judge], k: int, tol: float, rounds: int) -> Iterator[Row]:
    """Every way on one problem, in turn."""
    entries = dict(contestants(case, k, tol))
    gradient_seconds = float("inf")
    seconds = dict.fromkeys(entries, float("inf"))
    answers: dict[str, Answer | None] = {}
    for turn in range(rounds):
        for way, entry in entries.items():
            gradient_seconds = min(gradient_seconds, timed(lambda: gradient(case))[0])
            if turn == 0 or answers[way] is not None:
                took, answers[way] = timed(entry.call)
                seconds[way] = min(seconds[way], took)
    one = operations(lambda: gradient(case))
    for way, entry in entries.items():
        answer = answers[way]
        if answer is None:
            nothing = float("nan")
            yield Row(name, k, tol, way, ways.MOST_MATVECS, False, *[nothing] * 5, note="given up")
            continue
        accuracy = judges[entry.is_later].judge(answer)
        yield Row(
            *(name, k, tol, way, answer.matvecs, accuracy.reaches(tol), seconds[way]),
            gradients=entry.operations(answer.matvecs) / one,
            clock_gradients=seconds[way] / gradient_seconds,
            residual=accuracy.residual,
            eigenvalue_error=accuracy.eigenvalue,
            note=answer.note,
        )


def contestants(case: Case, k: int, tol: float) -> Iterator[tuple[str, Contestant]]:
    """Every way with its name; peers that are not installed are left out."""
    later = Case(case.workload, case.later, case.later, case.batch)
    before = ways.ours(case, k, tol).vectors
    exact = our_operations(case, CurvatureConfig(cross_entropy))
    yield f"{OURS}, cold", Contestant(lambda: ways.ours(case, k, tol), exact)
    yield f"{OURS}, cold, residuals alone", Contestant(lambda: ways.ours_as_the_peers(case, k, tol), exact)
    yield f"{OURS}, cold, verified", Contestant(lambda: ways.ours(case, k, tol, verify=True), exact)
    yield f"{OURS}, cold, later", Contestant(lambda: ways.ours(later, k, tol), exact, is_later=True)
    yield f"{OURS}, warm, later", Contestant(lambda: ways.ours(later, k, tol, start=before), exact, is_later=True)
    if case.workload.is_smooth:
        choice = ways.choice_of(case, "finite-difference")
        cost = our_operations(case, choice)
        yield f"{OURS}, differences", Contestant(lambda: ways.ours(case, k, tol, choice=choice), cost)
    with ways.cheap_product(case) as product:
        if has("hessian_eigenthings"):
            rebuilt = peer_operations(lambda: ways.eigenthings_product(case))
            budget = ways.smallest_budget(case.space.n, k, tol, product)
            if budget is not None:
                tuned = partial(ways.eigenthings, case, k, budget, tol, tuned=True)
                yield "hessian-eigenthings, tuned", Contestant(tuned, rebuilt)
            yield "hessian-eigenthings, as documented", Contestant(lambda: ways.doubled(case, k, tol), rebuilt)
        if has("curvlinops"):
            forward = peer_operations(lambda: ways.curvlinops_product(case))
            setting = ways.best_setting(case, k, tol, product)
            if setting is not None:
                tuned = partial(ways.curvlinops, case, k, setting, check=False)
                yield "curvlinops + ARPACK, tuned", Contestant(tuned, forward)
            documented = partial(ways.curvlinops, case, k, ways.Setting(tol))
            yield "curvlinops + ARPACK, as documented", Contestant(documented, forward)
        if has("pyhessian"):  # of one batch it keeps the graph, as we do
            yield "PyHessian, as documented", Contestant(lambda: ways.pyhessian(case, k), exact)


# Cost


def gradient(case: Case) -> None:
    torch.autograd.grad(cross_entropy(case.module, case.batch), list(case.module.parameters()))


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def operations(call: Callable[[], object]) -> float:
    """Floating-point operations of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def our_operations(case: Case, choice: CurvatureConfig) -> Callable[[int], float]:
    with choice.loss(case.module, case.space) as loss:
        made: list[Operator] = []
        setup = operations(lambda: made.append(choice.operator(loss, case.sample)))
        setup += operations(made[0].gradient)
        product = operations(lambda: made[0].matvec(torch.ones(made[0].n, dtype=made[0].dtype)))
    return lambda count: setup + count * product


def prices(case: Case) -> str:
    """What a product costs, in gradients of operations."""
    one = operations(lambda: gradient(case))
    found = {}
    for what, curvature in (("exact", "hessian"), ("Gauss-Newton", "ggn"), ("by differences", "finite-difference")):
        if curvature != "finite-difference" or case.workload.is_smooth:
            cost = our_operations(case, ways.choice_of(case, curvature))
            found[what] = (cost(1) - cost(0)) / one
    with CurvatureConfig(cross_entropy).loss(case.module, case.space) as loss:
        rebuilding = Hessian(loss, case.sample.hessian, memory=0.0)
        product = operations(lambda: rebuilding.matvec(torch.ones(rebuilding.n)))
    found["exact with the graph rebuilt"] = product / one
    return "Gradients a product, by operations: " + ", ".join(f"{what} {price:.2f}" for what, price in found.items())


def peer_operations(product: Callable[[], object]) -> Callable[[int], float]:
    once = operations(product)
    return lambda count: count * once


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# Tables


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, one problem."""
    lines = [
        f"k = {rows[0].k}, tol = {rows[0].tol:g}",
        "",
        "| | products | gradients, by operations | gradients, by the clock | seconds | residual / lambda_1 | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        verdict = row.note if row.reached else ", ".join(filter(None, ["**not reached**", row.note]))
        lines.append(
            f"| {row.way} | {row.matvecs} | {row.gradients:.0f} | {row.clock_gradients:.0f} | {row.seconds:.2f} | "
            f"{row.residual:.0e} | {verdict} |"
        )
    return lines


def ratios(rows: Sequence[Row]) -> list[str]:
    """The fastest tuned peer over ours, and the same peer used as documented, by the clock and in operations."""
    reached = {row.way: row for row in rows if row.reached}
    tuned = [row for way, row in reached.items() if way.endswith(", tuned")]
    lines = []
    for mine in (f"{OURS}, cold", f"{OURS}, cold, residuals alone", f"{OURS}, differences"):
        if not tuned or mine not in reached:
            continue
        fastest = min(tuned, key=lambda row: row.seconds)
        for peer in (fastest, reached.get(fastest.way.replace("tuned", "as documented"))):
            if peer is not None:
                lines.append(
                    f"{peer.way}, over {mine}: {peer.seconds / reached[mine].seconds:.2f} by the clock, "
                    f"{peer.gradients / reached[mine].gradients:.2f} in operations."
                )
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
