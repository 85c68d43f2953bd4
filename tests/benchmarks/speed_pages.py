"""From the rows of `speed.py` to the two tables that stand beside the peers.

`summary` keeps what the tables need: the cells of k = 10 and tol = 1e-3, and the ratios of all k and tolerances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.benchmarks.pages import Piece, Sentence, Table, power, short

PAGE = "tests/benchmarks/README.md"
OURS = "lightning_subspace"
COLD, ALONE, DIFFERENCES = f"{OURS}, cold", f"{OURS}, cold, residuals alone", f"{OURS}, differences"
DOCUMENTED = "hessian-eigenthings, as documented"
K, TOL = 10, 1e-3
WORKLOADS = ("mlp", "cnn", "vit")
NETWORKS = ("MLP, 2,000 MNIST images", "ReLU CNN, 512 CIFAR-10 images", "GELU ViT, 512 CIFAR-10 images")
FIRST = "the certificate of `verify=10`'s first version, which no peer has; [today's]"
# By way, in the order of the table.
LABELS = {
    COLD: f"`{OURS}`",
    ALONE: "asked for residuals alone, as the peers are",
    f"{OURS}, cold, verified": f"with {FIRST}(../../lightning_subspace/linalg/README.md#what-the-certificate-costs) "
    "takes more",
    f"{OURS}, cold, later": "ten steps later, cold start",
    f"{OURS}, warm, later": "ten steps later, from the space of before",
    DIFFERENCES: '`curvature="finite-difference"`',
    "hessian-eigenthings, tuned": "hessian-eigenthings 1.0.0a5, tuned",
    DOCUMENTED: "hessian-eigenthings, as documented",
    "curvlinops + ARPACK, tuned": "curvlinops 3.0.1 + ARPACK, tuned",
    "curvlinops + ARPACK, as documented": "curvlinops + ARPACK, as documented",
    "PyHessian, as documented": "PyHessian 0.1 (residual 7e-3 to 2e-2)",
}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the tables need of all rows, as they are stored.

    `cells` by way and workload; `ratios` a list of the fastest tuned peer over one of our ways, None where no peer is
    right, and of the same peer as documented.
    """
    cells: dict[str, dict[str, Any]] = {}
    for row in rows:
        if (row["k"], row["tol"]) == (K, TOL):
            cells.setdefault(row["way"], {})[row["workload"]] = {
                "reached": row["reached"],
                "clock": row["clock_gradients"],
                "operations": row["gradients"],
                "products": row["matvecs"],
                "residual": row["residual"],
            }
    problems = dict.fromkeys((row["k"], row["tol"], row["workload"]) for row in rows)
    return {"cells": cells, "ratios": [found for problem in problems for found in ratios(rows, *problem)]}


def ratios(rows: Sequence[Mapping[str, Any]], k: int, tol: float, workload: str) -> Iterator[dict[str, Any]]:
    """Those of one problem."""
    right = {
        row["way"]: row
        for row in rows
        if (row["k"], row["tol"], row["workload"]) == (k, tol, workload) and row["reached"]
    }
    tuned = [row for way, row in right.items() if way.endswith(", tuned")]
    fastest = min(tuned, key=lambda row: float(row["seconds"]), default=None)
    for mine in (COLD, ALONE, DIFFERENCES):
        found: dict[str, Any] = {"k": k, "tol": tol, "workload": workload, "mine": mine, "tuned": None}
        if mine not in right:
            continue
        if fastest is not None:
            found["tuned"] = over(fastest, right[mine])
            documented = right.get(fastest["way"].replace("tuned", "as documented"))
            found["documented"] = documented and over(documented, right[mine])
        yield found


def over(peer: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, float]:
    """A peer's cost over ours."""
    return {
        "clock": peer["seconds"] / ours["seconds"],
        "operations": peer["gradients"] / ours["gradients"],
    }


def speed(result: Any) -> list[Piece]:
    """Both tables, and what is said of them."""
    found = {(of["k"], of["tol"], of["mine"], of["workload"]): of for of in result["ratios"]}
    rows = [(label, *cells(result["cells"][way], is_first=way == COLD)) for way, label in LABELS.items()]
    for which, label in (
        ("tuned", "the tuned peer over ours"),
        ("documented", "the same peer as documented over ours"),
    ):
        of_networks = (ratio(found, K, TOL, COLD, workload, which, 1, "; ") for workload in WORKLOADS)
        rows.append((f"*{label}*", *of_networks))
    others = []
    for tol, k in sorted({(of["tol"], of["k"]) for of in result["ratios"]}):
        named = {COLD: f"{k}, {power(tol)}"}
        if tol == TOL:
            named[ALONE] = "the same, asked for residuals alone"
        for mine, label in named.items():
            of_networks = (ratio(found, k, tol, mine, workload, "tuned", 2, ", ") for workload in WORKLOADS)
            others.append((label, *of_networks))
    clocks = [of["tuned"]["clock"] for of in result["ratios"] if (of["k"], of["tol"], of["mine"]) == (K, TOL, COLD)]
    budget, least = (result["cells"][way][WORKLOADS[-1]] for way in (DOCUMENTED, ALONE))
    most = (str(budget["products"]), f"{budget['operations'] / least['operations']:.1f}")
    trusted = [
        found[2 * K, TOL, ALONE, workload]["tuned"]["operations"]
        / found[2 * K, TOL, COLD, workload]["tuned"]["operations"]
        for workload in WORKLOADS  # over the same peer, so that it drops out
    ]
    more = (f"{min(trusted):.2f}", f"{max(trusted):.2f}")
    range_of_clocks = tuple(f"{bound:.1f}" for bound in (min(clocks), max(clocks)))
    return [
        Sentence("README.md", "the fastest tuned peer takes {} to {} times as long", range_of_clocks),
        Sentence(PAGE, "where the documented budget happens to end at {} products, at most {} against that", most),
        Sentence(PAGE, "a space that can be trusted takes {} to {} times the operations of small residuals", more),
        Table(PAGE, ("gradients by the clock (by operations)", *NETWORKS), tuple(rows)),
        Table(PAGE, ("k, tol", "MLP", "CNN", "ViT"), tuple(others)),
    ]


def cells(by_workload: Mapping[str, Any], *, is_first: bool) -> Iterator[str]:
    """What a way costs on each network; nothing where it was not tried."""
    is_right_somewhere = any(found["reached"] for found in by_workload.values())
    for workload in WORKLOADS:
        found = by_workload.get(workload)
        if found is None:
            yield ""
        elif found["reached"]:
            unit = " products" * (is_first and workload == WORKLOADS[0])
            yield f"{found['clock']:.0f} ({found['operations']:.0f}), {found['products']}{unit}"
        else:
            yield f"residual {power(found['residual'], 1)}" if is_right_somewhere else "not reached"


def ratio(
    found: Mapping[tuple[Any, ...], Any],
    k: int,
    tol: float,
    mine: str,
    workload: str,
    which: str,
    digits: int,
    comma: str,
) -> str:
    """A peer over ours, by the clock (by operations); over our cold start also over differences, by the clock."""
    peer = (found.get((k, tol, mine, workload)) or {}).get(which)
    if peer is None:
        return "none is right"
    text = f"{short(peer['clock'], digits)} ({short(peer['operations'], digits)})"
    differences = (found.get((k, tol, DIFFERENCES, workload)) or {}).get(which)
    if mine == COLD and differences is not None:
        text += f"{comma}{short(differences['clock'], digits)} by differences"
    return text
