"""Bytes that whole probes move between two ranks, with few products and with many, under DDP and under FSDP2.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.moved [--json moved.json]

Runs `examples/ddp.py` by torchrun, as its page does, and takes from what it keeps the probes with the fewest and with
the most products. The bytes are those that `Ranks` counts, of whole vectors. Ends in an error where the example does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.pages import ROOT

STRATEGIES, RANKS = ("ddp", "fsdp2"), 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="both probes of each strategy")
    asked = parser.parse_args()
    found = {strategy: ends(probes(strategy)) for strategy in STRATEGIES}
    print("| strategy | step | products | MB moved |\n| --- | --- | --- | --- |")
    for strategy, rows in found.items():
        for row in rows:
            print(f"| {strategy} | {row['step']} | {row['products']} | {row['megabytes']:.3f} |")
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


def probes(strategy: str) -> list[dict[str, Any]]:
    """What the example's probes have counted."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "probes.json")
        options = ["--strategy", strategy, "--out", folder, "--json", str(kept)]
        run = subprocess.run([*torchrun, "examples/ddp.py", *options], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        return [
            {
                "step": row["step"],
                "products": round(row["solver/matvecs"]),
                "megabytes": row["solver/megabytes_moved"],
            }
            for row in json.loads(kept.read_text())
        ]


def ends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with the fewest and the most products."""
    return [end(rows, key=lambda row: int(row["products"])) for end in (min, max)]


if __name__ == "__main__":
    main()
