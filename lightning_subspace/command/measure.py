"""Command `measure`: a history of checkpoints."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_subspace.command.runs import read_runs
from lightning_subspace.command.table import in_terminal

if TYPE_CHECKING:
    from lightning_subspace.callbacks.saved_points import SavedPoint

NAME, SUMMARY = "measure", "measure the checkpoints of a run that had no monitor"
DESCRIPTION = """\
Measure saved checkpoints, all on the same examples of the training set, as a SubspaceMonitor would have done at
their steps. LightningCLI builds the module and its data from the configuration that it has saved; modules may be
in the current folder. The results are in FOLDER: history.ckpt, which `show` and read_history() read, and the
events of TensorBoard. A command that was interrupted goes on when it is given again."""
EXAMPLES = """\
examples:
  lightning-subspace measure --config lightning_logs/version_0/config.yaml \\
      --ckpt 'lightning_logs/version_0/checkpoints/*.ckpt'
  lightning-subspace measure --config config.yaml --ckpt 'epoch*.ckpt' --k 5 --sample all -- --data.root /data
  torchrun --nproc-per-node 2 -m lightning_subspace measure --config config.yaml --ckpt 'epoch*.ckpt'
What stands behind -- goes to LightningCLI, and takes precedence over the configuration; for a machine without a
GPU: -- --trainer.accelerator cpu --trainer.precision 32. The arguments are those of SubspaceMonitor; see its page.
Checkpoints should be all of one run: the overlaps between them are part of the results."""
FILE = "history.ckpt"
SOME_FAILED, INTERRUPTED = 3, 130
VERIFY = "exclude missed copies: 'always', 'never', or a number m for every m-th checkpoint (%(default)s)"
# Of the command line, what decides about the numbers.
ASKED = (
    "k", "which", "sample", "gradient_sample", "batch_size", "params", "loss_fn", "mode", "dtype", "curvature",
    "on_check_fail", "tol", "max_matvecs", "verify", "measurements", "seed",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add = parser.add_argument
    add("--config", type=Path, nargs="+", required=True, metavar="FILE", help="YAML of LightningCLI")
    add("--ckpt", nargs="+", required=True, metavar="PATTERN", help="checkpoints, or quoted patterns: 'epoch*.ckpt'")
    add("--out", type=Path, default=Path("subspace"), metavar="FOLDER", help="of the results (%(default)s)")
    add("--anew", action="store_true", help="write over earlier results in FOLDER")
    add("--trust", action="store_true", help="read checkpoints by pickle, which runs what is in them")
    add("--traceback", action="store_true", help="show where an error comes from, as in code of yours")
    project = parser.add_argument_group("the project, where the configuration does not say it all")
    project.add_argument("--model", metavar="CLASS", help="class path of the module, where no class_path is given")
    project.add_argument("--data", metavar="CLASS", help="class path of the data module, likewise")
    project.add_argument("--cli", metavar="CLASS", help="class path of a LightningCLI of yours, which links arguments")
    project.add_argument(
        "--script", type=Path, metavar="FILE", help="the file that was run, where class paths begin with __main__"
    )
    project.add_argument("overrides", nargs="*", metavar="-- ARGUMENT", help="arguments of LightningCLI")
    what = parser.add_argument_group("what is measured, and how; the defaults are those of SubspaceMonitor")
    what.add_argument("--k", type=int, default=10, help="number of top eigenpairs (%(default)s)")
    what.add_argument("--sample", type=_count, default=1024, metavar="N", help="examples, or 'all' (%(default)s)")
    what.add_argument(
        "--gradient-sample", type=_count, default=8192, metavar="N", help="for the gradient, or 'all' (%(default)s)"
    )
    what.add_argument("--batch-size", type=int, metavar="N", help="of the micro-batches (that of training)")
    what.add_argument("--params", nargs="+", metavar="PATTERN", help="of parameter names, as 'head.*' (all)")
    what.add_argument("--loss-fn", metavar="PATH", help="package.module.function in place of training_step")
    what.add_argument("--mode", choices=("train", "eval"), default="train", help="of the module (%(default)s)")
    what.add_argument("--which", choices=("LA", "SA", "LM", "BE"), default="LA", help="end of the spectrum")
    what.add_argument("--dtype", default="float32", help="float32, float64 or native (%(default)s)")
    what.add_argument("--curvature", default="hessian", help="the matrix (%(default)s)")
    what.add_argument("--on-check-fail", default="warn", help="where second derivatives are wrong (%(default)s)")
    what.add_argument("--tol", type=float, default=1e-3, help="of the eigenpairs (%(default)s)")
    what.add_argument("--max-matvecs", type=int, default=200, help="Hessian products a checkpoint (%(default)s)")
    what.add_argument("--verify", default="always", type=_verify, metavar="WHEN", help=VERIFY)
    what.add_argument("--measurements", nargs="+", default=[], metavar="NAME", help="more, by class: Trace Density")
    what.add_argument("--seed", type=int, default=0, help="of the sample and the start vectors (%(default)s)")
    what.add_argument("--name", default="subspace", help="prefix of all keys (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure what is left, and print all of it; the exit code.

    Raises:
        ValueError: for a wrong option, or a project that cannot be measured.
        OSError: where a file cannot be read or written.
    """
    from lightning_subspace.callbacks.saved_points import points_of
    from lightning_subspace.command.project import require_package

    require_package()
    is_first = int(os.environ.get("RANK", "0")) == 0
    points, unread = points_of(options.ckpt, trust=options.trust)
    failures, is_stopped = _walk(options, points)
    failures |= unread
    if is_first:
        for path, reason in failures.items():
            print(f"{path.name}: {reason}", file=sys.stderr)
        _tell(options)
    if is_stopped:
        return INTERRUPTED
    if not failures:
        return 0
    return SOME_FAILED if len(failures) < len(points) + len(unread) else 1


def _walk(options: argparse.Namespace, points: Sequence[SavedPoint]) -> tuple[dict[Path, str], bool]:
    """Measure; what failed and why, and whether it was stopped."""
    from lightning_subspace import CheckError, LossError, PeerError
    from lightning_subspace._lightning import MisconfigurationException
    from lightning_subspace.callbacks.saved_points import read
    from lightning_subspace.command.fit import walk
    from lightning_subspace.command.project import Configuration

    configuration = Configuration(
        options.config,
        options.overrides,
        options.cli,
        options.model,
        options.data,
        options.seed,
        options.script,
    )
    asked = {name: getattr(options, name) for name in ASKED}
    hyperparameters = read(points[0].path, trust=options.trust).get("hyper_parameters", {})
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        done = walk(
            configuration,
            points,
            asked,
            hyperparameters,
            file=options.out / FILE,
            name=options.name,
            trust=options.trust,
            anew=options.anew,
        )
    except (MisconfigurationException, CheckError, LossError, PeerError) as error:
        raise ValueError(str(error)) from error
    return {point.path: reason for point, reason in done.failures.items()}, done.is_stopped


def _tell(options: argparse.Namespace) -> None:
    """Print the table, and where all of it is."""
    file = options.out / FILE
    if file.exists():
        print(in_terminal(read_runs(file)))
        print(f"\nin {file}; lightning-subspace show {file}; tensorboard --logdir {options.out}")


def _count(text: str) -> int | str:
    """A number of examples, or "all"."""
    return _number_or(text, ("all",), "a number of examples")


def _verify(text: str) -> int | str:
    """When missed copies are excluded; a number: every so many times."""
    return _number_or(text, ("always", "never"), "a number of checkpoints")


def _number_or(text: str, words: Sequence[str], expected: str) -> int | str:
    try:
        return text if text in words else int(text)
    except ValueError:
        named = " or ".join(map(repr, words))
        raise argparse.ArgumentTypeError(f"expected {expected}, or {named}, got {text!r}") from None
