"""All benchmarks one after another, each in a process of its own: what they print and what they measured, in two files.

    python -m tests.benchmarks [--out benchmarks] [--only growth speed] [--big] [--data colour=cifar.npz]

Writes results.md, with the command above each output, and results.json after every benchmark. One that fails is marked
as such and does not keep the others from running; the exit code is then 1. All of them take hours, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
THREADS = {"big": "2"}  # of the others: one
# By heading: a module and its arguments; {out} stands for the folder.
BENCHMARKS = {
    "speed": "speed --out {out}/speed.json",
    "growth": "growth --out {out}/growth.png --json {out}/growth.json",
    "ranks": "ranks",
    "overhead": "overhead --ranks 1",
    "overhead, two ranks": "overhead --ranks 2",
    "sample_size": "sample_size",
    "tab": "tab",
    "tab_page": "tab_page",
    "big": "big --out {out}/big.json",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), metavar="DIR")
    parser.add_argument("--only", nargs="+", default=list(BENCHMARKS), choices=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--big", action="store_true", help="also the model of 124 million parameters")
    parser.add_argument(
        "--data", nargs="*", default=[], metavar="NAME=FILE", help="for speed, from the root of the repository"
    )
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    sections: list[str] = []
    measured: dict[str, Any] = {}
    failed: list[str] = []
    for name in (name for name in asked.only if name != "big" or asked.big):
        words = [word.format(out=out) for word in BENCHMARKS[name].split()]
        words += ["--data", *asked.data] if name == "speed" else []
        written = next((Path(word) for word in words if word.endswith(".json")), None)
        if written is not None:
            written.unlink(missing_ok=True)  # of an earlier run
        print(f"{name} ...", flush=True)
        sections.append(section(name, words, failed))
        if written is not None and written.exists():
            measured[name] = json.loads(written.read_text())
        (out / "results.md").write_text("\n".join(["# Benchmarks", *sections]))
        (out / "results.json").write_text(json.dumps(measured, indent=1))
    print(f"{out / 'results.md'}; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def section(name: str, words: list[str], failed: list[str]) -> str:
    """Run one benchmark: its heading, its command and its output, and why it failed."""
    threads = THREADS.get(name, "1")
    command = [sys.executable, "-m", f"tests.benchmarks.{words[0]}", *words[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    shown = f"OMP_NUM_THREADS={threads} python {shlex.join(command[1:])}"
    parts = [f"## {name}", f"```\n{shown}\n```", run.stdout.strip()]
    if run.returncode:
        failed.append(name)
        parts.append(f"**failed**\n\n```\n{run.stderr.strip()[-2000:]}\n```")
    return "\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
