"""From what examples print to the tables of their page."""

from __future__ import annotations

import math
from typing import Any

from tests.benchmarks.pages import Piece, Sentence, Table, short

PAGE = "examples/README.md"
TOLD = (0, 50, 150, 300)  # steps of the LoRA
BATCHES = (50, 150, 250)  # of the text
# Optimizers by their name in `text/train.py`: the label, and how many steps Lightning counts a batch.
OPTIMIZERS = {"adamw": ("AdamW", 1), "muon": ("Muon", 2)}


def lora(result: Any) -> list[Piece]:
    """Along the training, and of one network by different factors."""
    rows = {row["step"]: row for row in result["history"]}
    history = tuple(
        (
            str(step),
            significant(rows[step]["sample_loss"], 3),
            significant(rows[step]["sharpness"], 3),
            *(known(rows[step].get(key)) for key in ("gradient_fraction", "layers/gradient/A", "layers/update/A")),
        )
        for step in TOLD
    )
    labels = [f"c = {c}" for c in ("1/4", "1/2", "1", "2", "4")] + ["merged, the same matrices as W + (alpha/r) BA"]
    networks = tuple(
        (
            label,
            significant(of["sharpness"], 3),
            short(of["gradient_fraction"], 3),
            short(of["gradient_norm"], 2),
        )
        for label, of in zip(labels, result["networks"].values(), strict=True)
    )
    counts = (f"{result['trainable']:,}", f"{result['parameters']:,}")
    return [
        Sentence(PAGE, "of {} trainable parameters in {}:", counts),
        Table(PAGE, ("step", "loss", "lambda_1", "f_top", "gradient in A", "update in A"), history),
        Table(PAGE, ("the network of step 300", "lambda_1", "f_top", r"\|g\|"), networks),
    ]


def text(result: Any) -> list[Piece]:
    """Steps of two optimizers, after as many batches."""
    found = {
        (name, batch): next(row for row in result["rows"][name] if row["step"] == batch * steps)
        for batch in BATCHES
        for name, (_, steps) in OPTIMIZERS.items()
    }
    rows = tuple(
        (
            f"{OPTIMIZERS[name][0]}, {batch}",
            short(row["sample_loss"], 2),
            short(row["step/relative_norm"], 4),
            significant(row["step/curvature"], 2),
            short(row["step/edge_ratio"], 2),
            short(row["critical_step"], 1),
            f"{row['noise/scale']:.0f}",
        )
        for (name, batch), row in found.items()
    )
    keys = ("step/relative_norm", "step/curvature", "step/edge_ratio", "critical_step", "noise/scale")
    times = [found["muon", batch][keys[0]] / found["adamw", batch][keys[0]] for batch in BATCHES]
    longer = tuple(f"{end(times):.1f}" for end in (min, max))
    return [
        Table(PAGE, ("optimizer, batch", "loss", *(f"`{key}`" for key in keys)), rows),
        Sentence(PAGE, "Muon's steps are {} to {} times as long", longer),
        Sentence(PAGE, "{} s on one core)", (f"{result['seconds']:.0f}",)),
    ]


def known(value: float | None) -> str:
    """A share; nothing where there is none."""
    return "" if value is None else short(value, 2) if value else "0"


def significant(value: float, digits: int) -> str:
    """A number of so many digits."""
    return short(value, max(digits - 1 - math.floor(math.log10(abs(value))), 0))
