"""From what examples have measured to the tables of their page, and a sentence of another."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from tests.benchmarks.pages import ROOT, Piece, Sentence, Table, short

PAGE, CALLBACKS = "examples/README.md", "lightning_subspace/callbacks/README.md"
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


def two_tasks() -> list[Piece]:
    """Of the reproduction of this name, from what its claims say in the gallery."""
    claims = json.loads((ROOT / "examples" / "reproduce" / "results" / "two_tasks.json").read_text())["claims"]
    steps, fits = (
        {kind: values for claim in claims if words in claim["text"] for kind, values in by_kind(claim["ours"]).items()}
        for words in ("rises by", "SGD, the loss of A")
    )
    shares = {
        kind: [value / without for value, without in zip(steps[kind], steps["none"], strict=True)] for kind in steps
    }
    several = [100 * share for kind in ("classes", "micro-batches") for share in shares[kind]]
    words = (
        "come to .6, that of the first was {} to {}, {} to {} and at least {} with spaces of every step, every 10 and "
        "every 100, and {} to {} without a projection"
    )
    every, tenth, without = (
        tuple(short(end(fits[way]), 1) for end in (min, max))
        for way in ("micro-batches, every step", "micro-batches", "none")
    )
    hundredth = short(min(fits["micro-batches, every 100"]), 1)
    once = "one step outside of the mean gradient does {} to {} times as much as without"
    part = "which span the sharp directions, {} to {} % of what it does without"
    return [
        Sentence(CALLBACKS, once, tuple(short(end(shares["mean gradient"]), 1) for end in (min, max))),
        Sentence(CALLBACKS, part, tuple(f"{end(several):.0f}" for end in (min, max))),
        Sentence(CALLBACKS, words, (*every, *tenth, hundredth, *without)),
    ]


def by_kind(text: str) -> dict[str, list[float]]:
    """Numbers of "kind 1.2, 3; other, of this kind 4, 5", one for each seed."""
    found = re.findall(r"([^;]+?) (-?[\d.e-]+(?:, -?[\d.e-]+)*)(?:; |$)", text)
    return {kind: [float(number) for number in numbers.split(", ")] for kind, numbers in found}


def known(value: float | None) -> str:
    """A share; nothing where there is none."""
    return "" if value is None else short(value, 2) if value else "0"


def significant(value: float, digits: int) -> str:
    """A number of so many digits."""
    return short(value, max(digits - 1 - math.floor(math.log10(abs(value))), 0))
