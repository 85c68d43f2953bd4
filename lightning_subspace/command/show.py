"""Command `show`: a table of what runs have measured, and files."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from lightning_subspace.command.runs import Runs, by_step, read_all
from lightning_subspace.command.table import as_csv, in_terminal

NAME, SUMMARY = "show", "show what runs have measured: a table, CSV, JSON, the page of the tab, a figure"
DESCRIPTION = """\
Show what SubspaceMonitor, or `lightning-subspace measure`, has measured. A PATH is a folder of logs, with
runs at any depth, of TensorBoard or of a logger that keeps a subspace_probes.json, as CSVLogger does; such a file;
or a checkpoint of a Trainer with a monitor. Without an option for a file the table is printed."""
EXAMPLES = """\
examples:
  lightning-subspace show lightning_logs
  lightning-subspace show lightning_logs --keys 'sharpness,noise/*' --last 5
  lightning-subspace show a.ckpt b.ckpt --csv both.csv
  lightning-subspace show lightning_logs --html subspace.html --png subspace.png
What each number means is said in the README, under "What is logged"."""
STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="logs, checkpoints, or JSON files")
    parser.add_argument("--csv", metavar="FILE", help="write one row a probe, with all numbers; - prints it")
    parser.add_argument("--json", metavar="FILE", help="write all that is known, which `show` reads again; - prints it")
    parser.add_argument("--html", metavar="FILE", help="write the page of TensorBoard's tab, with its data in it")
    parser.add_argument("--png", metavar="FILE", help="draw what `monitor.plot()` draws; one file a run (loads torch)")
    parser.add_argument("--keys", default="", metavar="KEYS", help="numbers of the table, as 'sharpness,noise/*'")
    parser.add_argument("--last", type=int, metavar="N", help="the last N probes of each run alone, in the table")


def run(options: argparse.Namespace) -> int:
    """Print the table, or write files; the exit code.

    Raises:
        OSError: where a path cannot be read.
        ValueError: for a path that is none of a run, a wrong option, or a file that cannot be written.
    """
    writers: dict[str, Callable[[Runs, argparse.Namespace], str]] = {"csv": _csv, "json": _json, "html": _html}
    wanted = [name for name in (*writers, "png") if getattr(options, name) is not None]
    _check(options, wanted)
    runs = read_all(options.paths)
    count = sum(len(probes) for tags in runs.values() for probes in tags.values())
    for name in wanted:
        target = getattr(options, name)
        if name == "png":
            from lightning_subspace.command.picture import draw

            files = draw(runs, Path(target))
        elif target == STDOUT:
            sys.stdout.write(writers[name](runs, options))
            continue
        else:
            files = [Path(target)]
            text = writers[name](runs, options)
            try:
                files[0].write_text(text, encoding="utf-8")
            except OSError as error:
                raise ValueError(f"--{name}: expected a file to write, got {target!r} ({error.strerror}).") from error
        told = f"{count} probes of {len(runs)} {'run' if len(runs) == 1 else 'runs'}"
        print(f"{told} in {', '.join(map(str, files))}")
    if not wanted:
        keys = [key.strip() for key in options.keys.split(",") if key.strip()]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(in_terminal(runs, keys, options.last, width))
    return 0


def _check(options: argparse.Namespace, wanted: list[str]) -> None:
    if options.last is not None and options.last < 1:
        raise ValueError(f"--last: expected a positive number of probes, got {options.last}.")
    given = {path.resolve() for path in options.paths}
    for name in wanted:
        target = getattr(options, name)
        if target == STDOUT and name in ("html", "png"):
            raise ValueError(f"--{name}: expected a file to write, got {STDOUT!r}; name one.")
        if target != STDOUT and Path(target).resolve() in given:
            raise ValueError(f"--{name}: expected a file to write, got {target!r}, which is to be read; name another.")


def _csv(runs: Runs, options: argparse.Namespace) -> str:
    return as_csv(runs)


def _json(runs: Runs, options: argparse.Namespace) -> str:
    ordered = {run: {tag: by_step(probes) for tag, probes in tags.items()} for run, tags in runs.items()}
    return json.dumps(ordered, indent=1, allow_nan=False) + "\n"


def _html(runs: Runs, options: argparse.Namespace) -> str:
    from lightning_subspace.tensorboard_tab.standalone import page

    return page(runs, title=f"Subspace: {', '.join(map(str, options.paths))}")
