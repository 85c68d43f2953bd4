"""Page of the tab as one HTML file, under its first name.

    python -m lightning_subspace.view LOGDIR [--out subspace.html]

is `lightning-subspace show LOGDIR --html subspace.html`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_subspace.command.main import main as command
from lightning_subspace.command.runs import read_runs as read_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; 0 where there was something to show."""
    parser = argparse.ArgumentParser("python -m lightning_subspace.view", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="a folder of TensorBoard logs, a checkpoint, or a logger's JSON file")
    parser.add_argument("--out", type=Path, default=Path("subspace.html"), help="the file to write (%(default)s)")
    options = parser.parse_args(arguments)
    return command(["show", "--html", str(options.out), "--", str(options.path)])


if __name__ == "__main__":
    sys.exit(main())
