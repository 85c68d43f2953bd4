"""Command line, as `python -m lightning_subspace`."""

import sys

from lightning_subspace.command.main import main

if __name__ == "__main__":
    sys.exit(main())
