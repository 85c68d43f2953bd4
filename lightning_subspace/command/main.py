"""Console script `lightning-subspace`, and its exit codes.

| code | means |
| --- | --- |
| 0 | all is done |
| 1 | it cannot be done; the message says what was expected and the way out |
| 2 | the command line is wrong |
| 3 | some checkpoints are measured, and others are not |
| 130 | interrupted by Ctrl-C; `measure` goes on when the command is given again |
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lightning_subspace import __version__
from lightning_subspace.command import environment, measure, show

FAILED, INTERRUPTED = 1, 130
DESCRIPTION = "How much of the gradient lies in the few sharpest directions of the loss: after a run."
CODES = """\
exit codes: 0 all is done; 1 it cannot be done, and why is told; 2 the command line is wrong;
3 some checkpoints could not be measured; 130 interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code.

    Raises:
        OSError: where the command line asks for a traceback.
        ValueError: likewise.
    """
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if getattr(options, "traceback", False):
            raise
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, with their help."""
    found = argparse.ArgumentParser(
        "lightning-subspace",
        description=DESCRIPTION,
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"lightning_subspace {__version__}")
    commands = found.add_subparsers(metavar="COMMAND", required=True)
    for command in (show, measure, environment):
        own = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return found
