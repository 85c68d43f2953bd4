"""Cost of an entry for the tab of TensorBoard: time and bytes a probe, written to a real event file.

    python -m tests.benchmarks.tab [--json tab.json]

The record is one late in a run: 64 spaces are held, and the entry has the overlaps with 63 of them; its numbers are
those of a monitor with its defaults, at a probe that looks for all of them; then with 16 layers told apart. Times are
those of the processor, in which other work does not count. Ends in an error at k = 10 without layers above 2,000 bytes,
or where the median time is above .2 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_subspace.linalg import Outcome
from lightning_subspace.report.loggers import Reporter
from lightning_subspace.report.tab_entry import tab_entry
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.sketch import Sketch
from lightning_subspace.subspace.subspace import Subspace
from lightning_subspace.subspace.table import MOST_GROUPS, Table
from lightning_subspace.tensorboard_tab.schema import to_json

PROBES = 1000
PARTS = ("", "_top", "_bulk")
MOST_BYTES, MOST_SECONDS = 2000, 0.2e-3
KEYS = {
    "": "gradient_fraction gradient_fraction_low gradient_fraction_high gradient_norm gradient_curvature sharpness "
    "gradient_hessian_cosine gap_index overlap_previous sharpness_over_threshold reliability sample_loss training_loss "
    "update_fraction batch_gradient_fraction",
    "solver/": "subspace_error residual matvecs converged verified seconds overhead",
    "step/": "gain change norm relative_norm cosine_previous curvature edge_ratio edge_ratio_pooled uphill",
    "noise/": "participation hessian_top "
    + " ".join(f"scale{part} scale{part}_low scale{part}_high variance{part} gradient_square{part}" for part in PARTS),
}
LAYERS = ("participation", "gradient", "update", "null", "block_sharpness")


def record_of(k: int, step: int, tables: Mapping[str, Table]) -> Record:
    """A record with numbers of all digits."""
    values = torch.rand(k, dtype=torch.float64).sort(descending=True).values * 20
    space = Subspace(
        eigenvalues=values,
        eigenvectors=None,
        residuals=torch.rand(k, dtype=torch.float64) * 1e-3,
        next_eigenvalue=0.01234567,
        error=0.01234567,
        outcome=Outcome.CONVERGED,
        verified=True,
        num_matvecs=34,
    )
    keys = [prefix + name for prefix, names in KEYS.items() for name in names.split()]
    metrics = {key: float(torch.rand((), dtype=torch.float64)) for key in keys}
    return Record(step, metrics, subspace=space, tables=tables)


def held() -> OverlapHistory:
    """As many spaces as are ever held, of steps of six digits."""
    overlaps = OverlapHistory()
    basis = torch.linalg.qr(torch.randn(4096, 10)).Q.T
    for step in range(100_000, 100_000 + 64 * 7, 7):
        overlaps.add(step, Sketch(basis, exact=False))
    return overlaps


def measured(k: int, overlaps: OverlapHistory, tables: Mapping[str, Table]) -> dict[str, float]:
    """Bytes of an entry, and seconds of many."""
    record, taken, text = record_of(k, overlaps.steps[-1], tables), [], ""
    with tempfile.TemporaryDirectory() as folder:
        logger, reporter = TensorBoardLogger(folder), Reporter()
        for _ in range(PROBES):
            begin = time.thread_time()
            text = to_json(tab_entry(record, overlaps, lr=0.1, threshold=20.0))
            reporter.tab([logger], "subspace", text, record.step)
            taken.append(time.thread_time() - begin)
        logger.finalize("success")
        written = sum(file.stat().st_size for file in Path(folder).rglob("*tfevents*"))
    assert written > PROBES * len(text), "some entries were not written"
    layers = MOST_GROUPS if tables else 0
    return {"k": k, "layers": layers, "bytes": len(text), "median": statistics.median(taken), "largest": max(taken)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="the rows")
    asked = parser.parse_args()
    torch.manual_seed(0)
    overlaps = held()
    groups = [f"transformer.layers.{i}" for i in range(MOST_GROUPS)]
    layers = {"layers": Table.of(groups, {name: torch.rand(MOST_GROUPS).numpy() for name in LAYERS})}
    rows = [measured(k, overlaps, tables) for k in (10, 50) for tables in ({}, layers)]
    print(f"| k | layers | bytes | median | largest of {PROBES:,} |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        times = f"{row['median'] * 1e3:.2f} ms | {row['largest'] * 1e3:.1f} ms"
        print(f"| {row['k']} | {row['layers']} | {row['bytes']:,} | {times} |")
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(rows[0]["bytes"] > MOST_BYTES or rows[0]["median"] > MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
