"""What a probe costs on a card: products in gradients, the solver's own work, and whole answers beside a peer.

    python -m tests.benchmarks.gpu [--models mlp cnn vit resnet gpt] [--largest 1e8] [--json gpu.json]
    OMP_NUM_THREADS=1 python -m tests.benchmarks.gpu --device cpu --small      # a rehearsal

Prints three tables in one run. Times are by the clock, the fastest of several rounds, with a synchronisation in front
of each and behind it. TF32 is off for all of it, ours and the peer's.

"hessian-eigenthings, tuned by hand": the fewest steps after which its own residuals are below the tolerance, found
beforehand at no charge, with full orthogonalisation; nobody has that number in practice. Where the package is not
installed (`pip install hessian-eigenthings==1.0.0a5`) its columns are left out. What is aimed for is in the last
column; a table says what there is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace import Measurement, Needs, eigsh, measure_subspace
from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.subspace.solver import Solver
from tests.benchmarks.competitors import smallest_budget
from tests.gpu.models import LARGE, SMALL, Problem, on, trained

PEER = "hessian_eigenthings"
TOL = 1e-3
WANTED = 8  # pairs of the solver's own table
BASIS = 2 * WANTED + 10  # its rows; as many products are made, so that there is no restart
PASSES = 4  # over all rows a product: twice their products with a vector, twice what these take away from it
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks and vectors, to see that all runs")
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "vit", "resnet", "gpt"], choices=list(SMALL))
    parser.add_argument("--largest", type=float, default=None, help="vector of the solver's own table, 1e8 or 1e6")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no card here; --device cpu --small is a rehearsal")
    device = torch.device(asked.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    problems = [(SMALL if asked.small else LARGE)[name] for name in asked.models if asked.small or name in LARGE]
    largest = asked.largest or (1e6 if asked.small else 1e8)

    print(f"On {name_of(device)}, torch {torch.__version__}; TF32 off; {'small' if asked.small else 'full'} sizes.\n")
    rows: dict[str, list[dict[str, Any]]] = {"products": [], "solver": [], "answers": []}
    for heading, kind, made in (
        ("A product with the Hessian", "products", (row for p in problems for row in prices(p, device))),
        (f"The solver's own work, k = {WANTED}, {BASIS} products", "solver", own_work(device, largest)),
        (
            f"Whole answers, residuals below {TOL:g} lambda_1, cold start",
            "answers",
            (answer(p, device) for p in problems),
        ),
    ):
        print(f"## {heading}\n", flush=True)
        for row in made:
            if not rows[kind]:
                print("| " + " | ".join(row) + " |\n" + "| --- " * len(row) + "|")
            rows[kind].append(row)
            print("| " + " | ".join(row.values()) + " |", flush=True)
            if asked.json is not None:
                asked.json.write_text(json.dumps({"device": name_of(device), **rows}, indent=1))
        print(flush=True)
    if importlib.util.find_spec(PEER) is None:
        print("hessian-eigenthings is not installed, so there is nothing to compare with.")


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU (a rehearsal)"


# Clock


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """The fastest of several rounds, behind one that does not count."""
    function()
    best = math.inf
    for _ in range(rounds):
        synchronise(device)
        started = time.perf_counter()
        function()
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return best


def ms(value: float) -> str:
    return f"{1e3 * value:.3g}"


# A product


class TimedProduct(Measurement):
    """The time of a product in a probe, as a measurement takes it: of whatever operator the probe has chosen."""

    needs = Needs.NOTHING

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, math.nan

    def measure(self, probe: Any) -> dict[str, float]:
        direction = torch.ones_like(probe.gradient)
        self.seconds = seconds(lambda: probe.operator.matvec(direction), self.device)
        return {}


def prices(problem: Problem, device: torch.device) -> Iterator[dict[str, str]]:
    """On the whole sample, then in small batches."""
    module = trained(problem, device)
    n = sum(p.numel() for p in module.parameters())
    for parted in (False, True):
        batches = on(device, problem.parted() if parted else problem.batches())
        name = problem.name if not parted else f"the same network, {len(batches)} batches of {len_of(batches[0])}"
        one = seconds(partial(gradient, problem, module, batches), device)
        timed = TimedProduct(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measure_subspace(module, batches, k=0, loss_fn=problem.loss, measurements=[timed])
        yield {
            "model": name,
            "n": f"{n:.2g}",
            "gradient, ms": ms(one),
            "product, ms": ms(timed.seconds),
            "in gradients": f"{timed.seconds / one:.1f}",
        }


def gradient(problem: Problem, module: nn.Module, batches: list[Any]) -> None:
    """As training takes it."""
    parameters = list(module.parameters())
    for batch in batches:
        torch.autograd.grad(problem.loss(module, batch, 0), parameters)


def len_of(batch: Any) -> int:
    return len(batch if isinstance(batch, Tensor) else batch[0])


# The solver's own work


def own_work(device: torch.device, largest: float) -> Iterator[dict[str, str]]:
    """Of `eigsh` with a diagonal operator, whose product is one elementwise multiplication."""
    speed = bandwidth(device, int(min(largest, 1e8)))
    n = 100_000
    while n <= largest:
        spectrum = torch.linspace(0.0, 1.0, n, device=device) ** 8  # not solved in so few products
        solve = partial(solved, n, spectrum, device)
        try:
            matvec = seconds(solve, device, 3) / BASIS - seconds(partial(torch.mul, spectrum, spectrum), device)
            waits = synchronisations(solve, device)
        except torch.OutOfMemoryError:
            yield {"n": f"{n:.0e}", "ms a product": "no memory", "bytes it must move, ms": "", "waits a product": ""}
            return
        moved = PASSES * (BASIS + 1) / 2 * 4 * n  # bytes; there are (BASIS + 1) / 2 rows in the mean
        yield {
            "n": f"{n:.0e}",
            "ms a product": ms(matvec),
            "bytes it must move, ms": ms(moved / speed),
            "waits a product": "-" if waits is None else f"{waits / BASIS:.1f}",
        }
        n *= 10


def solved(n: int, spectrum: Tensor, device: torch.device) -> object:
    return eigsh(
        lambda v: spectrum * v, n, WANTED, ncv=BASIS, max_matvecs=BASIS, tol=1e-5, verify="never", device=device
    )


def bandwidth(device: torch.device, n: int) -> float:
    """Bytes a second that a copy of n numbers reads and writes."""
    source = torch.zeros(n, device=device)
    target = torch.empty_like(source)
    return 8 * n / seconds(lambda: target.copy_(source), device)


def synchronisations(function: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for the card; None on the CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


# Whole answers


def answer(problem: Problem, device: torch.device) -> dict[str, str]:
    """Time to the eigenpairs of a probe, without certificate, beside the peer."""
    module, batches = trained(problem, device), on(device, problem.batches())
    found = ours(problem, module, batches)
    took = seconds(lambda: ours(problem, module, batches), device, 2)
    row = {"model": problem.name, "k": str(problem.k), "ours, s": f"{took:.3f}", "products": str(found.num_matvecs)}
    if importlib.util.find_spec(PEER) is not None:
        row |= beside(problem, module, batches, device, took, found.eigenvalues)
    return row


def ours(problem: Problem, module: nn.Module, batches: list[Any]) -> Any:
    """A probe after the first, whose self-check is made once a run: its subspace."""
    choice, solver = CurvatureConfig(problem.loss), Solver(k=problem.k, tol=TOL)
    space = ParameterSpace.of(module)
    with choice.loss(module, space) as loss:
        _, record = take_probe(loss, sample_of_batches(batches), solver, (), operator=choice.operator, verify=False)
    return record.subspace


def beside(
    problem: Problem, module: nn.Module, batches: list[Any], device: torch.device, took: float, eigenvalues: Tensor
) -> dict[str, str]:
    """The columns of the peer."""
    aim = "" if problem.goal is None else f">= {problem.goal:g}"
    columns = ("theirs, tuned by hand, s", "their products", "eigenvalues apart", "theirs over ours", "aimed for")
    try:
        steps = tuned_steps(problem, module, batches, device)
        if steps is None:
            return dict(zip(columns, ("not reached", "", "", "", aim), strict=True))
        values = theirs(problem, module, batches, steps)
        their = seconds(lambda: theirs(problem, module, batches, steps), device, 2)
    except torch.OutOfMemoryError:
        return dict(zip(columns, ("no memory", "", "", "", aim), strict=True))
    apart = float((values.double().cpu() - eigenvalues.cpu()).abs().max() / eigenvalues[0])
    return dict(zip(columns, (f"{their:.3f}", str(steps), f"{apart:.0e}", f"{their / took:.2f}", aim), strict=True))


def tuned_steps(problem: Problem, module: nn.Module, batches: list[Any], device: torch.device) -> int | None:
    choice, space = CurvatureConfig(problem.loss), ParameterSpace.of(module)
    with choice.loss(module, space) as loss:
        operator = choice.operator(loss, sample_of_batches(batches))
        return smallest_budget(space.n, problem.k, TOL, operator.matvec, device.type)


def theirs(problem: Problem, module: nn.Module, batches: list[Any], steps: int) -> Tensor:
    """Its eigenvalues, largest first; the attention kernel is the only one with a second derivative."""
    from hessian_eigenthings import HessianOperator, lanczos

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        operator = HessianOperator(module, batches, lambda net, batch: problem.loss(net, batch, 0))
        found = lanczos(operator, k=problem.k, max_iter=steps, tol=TOL, which="LA", seed=0, reorthogonalize=True)
    return found.eigenvalues.sort(descending=True).values


if __name__ == "__main__":
    main()
