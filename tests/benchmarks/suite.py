"""Time of the tests: all of them on every core, and the fast ones in one process.

    python -m tests.benchmarks.suite [--only fast] [--json suite.json]

Runs what README.md says, each command in a process of its own, and takes counts and seconds from pytest's report; the
seconds begin where pytest does, behind the import of torch. `--only` keeps of the file what it does not measure. Ends
in an error where a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tests.benchmarks.pages import ROOT

COMMANDS = {"whole": ("-n", "auto", "-q"), "fast": ("-m", "fast", "-q")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--json", type=Path, default=None, help="counts and seconds")
    asked = parser.parse_args()
    found = json.loads(asked.json.read_text()) if asked.json is not None and asked.json.exists() else {}
    failed = False
    print("| tests | passed | skipped | failed | seconds | cores |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in asked.only:
        row = measured(COMMANDS[name])
        failed |= bool(row["failed"])
        found[name] = {key: value for key, value in row.items() if key != "failed"}
        print("|", " | ".join([name, *(f"{value:,.0f}" for value in row.values())]), "|", flush=True)
    if asked.json is not None and not failed:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(failed)


def measured(arguments: tuple[str, ...]) -> dict[str, float]:
    """Counts and seconds of one run of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={report}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert report.exists(), run.stdout[-2000:] + run.stderr[-2000:]
        return counted(report.read_text())


def counted(report: str) -> dict[str, float]:
    """Of a report in the form of JUnit."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    total = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "skipped", "failures", "errors")}
    failed = total["failures"] + total["errors"]
    return {
        "passed": total["tests"] - total["skipped"] - failed,
        "skipped": total["skipped"],
        "failed": failed,
        "seconds": sum(float(suite.get("time", 0.0)) for suite in suites),
        "cores": os.cpu_count() or 1,
    }


if __name__ == "__main__":
    sys.exit(main())
