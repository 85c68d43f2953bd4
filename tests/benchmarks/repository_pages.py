"""From what commands, examples and tests of the repository print, move and take to the pages that name them."""

from __future__ import annotations

import math
from typing import Any

from tests.benchmarks.pages import Block, Piece, Sentence, short

PARALLEL = "lightning_subspace/parallel/README.md"


def printed(result: Any) -> list[Piece]:
    """What `printed.py` has seen, each behind its command."""
    return [Block(row["page"], row["before"], row["text"]) for row in result]


def moved(result: Any) -> list[Piece]:
    """Bytes of whole probes of `moved.py`, with the fewest products and with the most."""
    words = (
        "{} MB with {} products, and {} MB with {}; under FSDP2, whose parameters are gathered once, {} MB with {}, "
        "and {} MB with {}."
    )
    rows = [row for way in ("ddp", "fsdp2") for row in result[way]]
    numbers = tuple(number for row in rows for number in (short(row["megabytes"], 2), str(row["products"])))
    return [Sentence(PARALLEL, words, numbers)]


def suite(result: Any) -> list[Piece]:
    """Minutes, rounded up, of `suite.py`."""
    minutes = {name: f"{math.ceil(row['seconds'] / 60)}" for name, row in result.items()}
    whole = (minutes["whole"], str(result["whole"]["cores"]))
    return [
        Sentence("README.md", "in about {} min on {} cores; `pytest -m fast` takes {}", (*whole, minutes["fast"])),
        Sentence("tests/README.md", "# all: about {} min on {} cores", whole),
        Sentence("tests/README.md", "# those that train little or nothing: {} min, on one", (minutes["fast"],)),
    ]
