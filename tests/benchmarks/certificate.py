"""What it costs to exclude missed copies of equal eigenvalues, and how often a space is trusted then.

    python -m tests.benchmarks.certificate [--only spectra nets copies] [--seeds 10] [--probes 10] [--json FILE]

Operators of known spectrum from cold starts, and warm chains of probes of four networks along their training. Products
of the same solves without the certificate and with it; "verified" and "trusted" are shares of the latter,
"undetermined" counts trusted spaces whose true gap is less than half of the one that was claimed. "copies" are random
spectra with copies below 3 % of the largest eigenvalue: how many have a claimed space without a gap, and how many a
verified eigenvalue that is wrong. The file that is written keeps what it has of the first certificate: keys that begin
with "before_".
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_subspace.curvature import Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.linalg import EigshResult, eigsh
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.subspace.solver import Solver
from lightning_subspace.subspace.subspace import TRUSTED_ERROR
from tests.benchmarks.workloads import WORKLOADS, Batch, colour_images, cross_entropy, digits
from tests.linalg.few_copies import Solved
from tests.linalg.spectra import Operator, copies_behind_an_outlier, spectra

N, K = 2000, 10
PARTS = ["spectra", "nets", "copies"]
RANDOM, RISK = 600, 0.01  # spectra, and the risk that each is solved at
FIRST, EVERY = 300, 20  # steps before the first probe of a chain, and between two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--probes", type=int, default=10)
    parser.add_argument("--json", type=Path, default=None, help="the rows")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    if "spectra" in asked.only:
        print(
            "| spectrum | without | with | verified | trusted | undetermined |\n| --- | --- | --- | --- | --- | --- |"
        )
        cases = {**spectra(N), "copies behind an outlier": copies_behind_an_outlier(N)}
        found["spectra"] = [spectrum_row(name, eigenvalues, asked.seeds) for name, eigenvalues in cases.items()]
    if "nets" in asked.only:
        print("| warm chain | without | with | more | verified | trusted | trusted without |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        found["nets"] = [chain_row(*network, asked.probes) for network in networks()]
    if "copies" in asked.only:
        found["copies"] = [copies_row()]
    if asked.json is not None:
        asked.json.write_text(json.dumps(beside_before(found, asked.json), indent=1) + "\n")


def beside_before(found: dict[str, list[dict[str, Any]]], file: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows with what a file has of the first certificate, and parts that were not asked for as they are there."""
    kept: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.exists() else {}
    for part, rows in found.items():
        before = {
            row["name"]: {key: row[key] for key in row if key.startswith("before_")} for row in kept.get(part, [])
        }
        kept[part] = [row | before.get(row["name"], {}) for row in rows]
    return kept


def spectrum_row(name: str, eigenvalues: torch.Tensor, seeds: int) -> dict[str, Any]:
    """Mean products from cold starts, for one spectrum."""
    plain, found, undetermined = [], [], 0
    for seed in range(seeds):
        operator = Operator(eigenvalues, seed=seed)

        def solve(verify: str, operator: Operator = operator, seed: int = seed) -> EigshResult:
            return eigsh(operator, operator.n, K, verify=verify, seed=seed, dtype=torch.float64, max_matvecs=1000)  # type: ignore[arg-type]

        plain.append(solve("never").num_matvecs)
        result = solve("always")
        found.append(result)
        is_trusted = result.subspace_error <= TRUSTED_ERROR
        undetermined += is_trusted and operator.true_gap(K, "LA") < 0.5 * result.gap
    mean = statistics.fmean(result.num_matvecs for result in found)
    verified = statistics.fmean(result.verified for result in found)
    trusted = statistics.fmean(result.subspace_error <= TRUSTED_ERROR for result in found)
    without = statistics.fmean(plain)
    print(f"| {name} | {without:.0f} | {mean:.0f} | {verified:.0%} | {trusted:.0%} | {undetermined} |", flush=True)
    return {"name": name, "without": without, "with": mean, "trusted": trusted, "undetermined": undetermined}


def copies_row() -> dict[str, Any]:
    """Of many random spectra, those that are undetermined and those that are wrong."""
    solved = [Solved.of(seed, RISK) for seed in range(RANDOM)]
    undetermined, wrong = sum(one.undetermined for one in solved), sum(one.wrong for one in solved)
    print(f"of {RANDOM} random spectra {undetermined} spaces are undetermined, {wrong} verified values are wrong")
    return {"name": "random", "spectra": RANDOM, "undetermined": undetermined, "wrong": wrong}


def networks() -> Iterator[tuple[str, Callable[[], nn.Module], Batch, float]]:
    """Name, network, data and learning rate of each chain."""
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    yield "MLP 64-20-20-10, 1,024 digits", digits_mlp, (small[0][:1024], small[1][:1024]), 0.1
    mnist, colour = digits(), colour_images()
    for name, data in (("mlp", mnist), ("cnn", colour), ("vit", colour)):
        workload = WORKLOADS[name]
        count = min(workload.examples, 256)
        label = workload.name.replace("2,000", f"{count:,}")
        yield label, workload.make, (data[0][:count], data[1][:count]), workload.lr


def digits_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))


def chain_row(name: str, make: Callable[[], nn.Module], batch: Batch, lr: float, probes: int) -> dict[str, Any]:
    """Mean products of a chain of probes, each from the space of the one before."""
    torch.manual_seed(0)
    net, previous, pairs = make(), None, []
    is_transformer = any(isinstance(module, nn.LayerNorm) for module in net.modules())
    parameters = net.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=lr) if is_transformer else torch.optim.SGD(parameters, lr=lr)
    for step in range(FIRST + probes * EVERY + 1):
        if step >= FIRST and (step - FIRST) % EVERY == 0:
            with TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as loss:
                hessian, solver = Hessian(loss, sample_of_batches([batch]).hessian), Solver(k=K)
                plain = solver.solve(hessian, start=previous, verify=False)
                found = solver.solve(hessian, start=previous, verify=True)
            if previous is not None:
                pairs.append((plain, found))
            previous = found.basis
        picked = torch.randint(len(batch[1]), (64,))
        optimizer.zero_grad()
        cross_entropy(net, (batch[0][picked], batch[1][picked])).backward()
        optimizer.step()
    without, with_it = (statistics.fmean(pair[i].num_matvecs for pair in pairs) for i in (0, 1))
    shares = [
        statistics.fmean(values) for values in zip(*((b.verified, b.trusted, a.trusted) for a, b in pairs), strict=True)
    ]
    last = " | ".join(f"{share:.0%}" for share in shares)
    print(f"| {name} | {without:.1f} | {with_it:.1f} | {with_it - without:.1f} | {last} |", flush=True)
    return {"name": name, "without": without, "more": with_it - without, "trusted": shares[1]}


if __name__ == "__main__":
    main()
