"""From what products and the state around them cost to pieces of pages."""

from __future__ import annotations

from typing import Any

from lightning_subspace.curvature.central_difference import STEPS
from tests.benchmarks.pages import Piece, Sentence, Table, power, short

README = "README.md"
BENCHMARKS = "tests/benchmarks/README.md"
CURVATURE = "lightning_subspace/curvature/README.md"
PARALLEL = "lightning_subspace/parallel/README.md"
LOSS = "lightning_subspace/loss/README.md"
LINALG = "lightning_subspace/linalg/README.md"
MEASUREMENTS = "lightning_subspace/measurements/README.md"


def operations(result: Any) -> list[Piece]:
    """Prices of a product, and the convolutions that it asks for."""
    exact, ggn, rebuilt = (
        tuple(f"{of[way]:.1f}" for of in result["prices"].values()) for way in ("exact", "ggn", "rebuilt")
    )
    bounds = tuple(f"{of['rebuilt'] / of['exact']:.1f}" for of in result["prices"].values())
    ways = ("gradient", "exact", "ggn")
    rows = [
        ("the first, whose image has no gradient", *(str(result["first"][way]) for way in ways)),
        ("any other", *(str(result["other"][way]) for way in ways)),
        ("operations of a ResNet-18, in gradients", "1", *(f"{result['resnet'][way]:.1f}" for way in ways[1:])),
    ]
    of_three = "{} (MLP), {} (CNN) or {} (ViT) gradients"
    bounded = "gradients of operations, where rebuilding the graph takes {}, {} or {}. That is at most {}, {} and {}"
    return [
        Sentence(README, "products of {} to {} gradients each", (min(exact), max(exact))),
        Sentence(CURVATURE, f"products of {of_three} each", exact),
        Sentence(CURVATURE, "kept for the whole probe | {}, {}, {} |", exact),
        Sentence(CURVATURE, "through the network's output | {}, {}, {} |", ggn),
        Sentence(CURVATURE, f"A rebuilt graph makes a product {of_three}", rebuilt),
        Table(CURVATURE, ("convolutions asked for, by layer", "a gradient", "H v", "G v"), tuple(rows)),
        Sentence(PARALLEL, "with c = {} gradients for an exact product", (rebuilt[-1],)),
        Sentence(BENCHMARKS, f"a retained graph takes {of_three} of operations", exact),
        Sentence(BENCHMARKS, bounded, (*rebuilt, *bounds)),
    ]


def joining(result: Any) -> list[Piece]:
    """Products over single and joined micro-batches."""
    sizes = {
        "gpt": "GPT, n = {:,}, 2 x 32 tokens",
        "mlp": "MLP, n = {:,}, 4 images",
        "cnn": "CNN, n = {:,}, 4 images of 32 x 32",
    }
    rows = [
        (label.format(result[name]["n"]), *(f"{1e3 * result[name][way]:.3g} ms" for way in ("single", "joined")))
        for name, label in sizes.items()
    ]
    return [Table(CURVATURE, ("network, micro-batch", "single", "joined"), tuple(rows))]


def state(result: Any) -> list[Piece]:
    """Contexts around a loss, the mode of the wider default type, and the state of an optimizer."""
    rows = [(row["holds"], *(rounded(row[key]) for key in ("first", "later", "each"))) for row in result["contexts"]]
    header = ("the module holds", "first time", "opening and closing later", "each evaluation")
    gpt, resnet = (result["default_type"][of] for of in ("gpt", "resnet"))
    words = (
        "a forward pass of a GPT of four layers, width 64, took {} ms for {} on one core, and one of ResNet-18 {} for "
        "{} ms; a Hessian product, {} and {} ms, was as fast as without, to {} %"
    )
    apart = max(abs(of["ratio"] - 1) for of in (gpt, resnet))
    forward = [f"{1e3 * of[way]:.3g}" for of in (gpt, resnet) for way in ("forward_with", "forward_without")]
    products = [f"{1e3 * of['product_with']:.0f}" for of in (gpt, resnet)]
    optimizer = result["optimizer"]
    summed = (f"{optimizer['numbers'] / 1e6:.0f}", f"{1e3 * optimizer['seconds']:.0f}")
    return [
        Table(LOSS, header, tuple(rows)),
        Sentence(LOSS, words, (*forward, *products, f"{100 * apart:.0f}")),
        Sentence(LOSS, "is summed twice a probe, {} million numbers in {} ms each time", summed),
    ]


def vectors(result: Any) -> list[Piece]:
    """Random vectors, and the two places of a basis."""
    words = "a random vector takes {} ns a coordinate and rank, a draw by `torch.randn` {} ns in float32 and {} ns in"
    drawn = tuple(f"{1e9 * seconds:.0f}" for seconds in result["normals"].values())
    moved = "{} s of processor time a product in place of {} s, for n = {}, k = {}, the mean over the first {}"
    seconds = (short(result["basis"][place], 2) for place in ("cpu", "device"))
    of = (f"{result['n']:.0e}".replace("e+0", "e"), str(result["k"]), str(result["products"]))
    return [Sentence(LINALG, words, drawn), Sentence(LINALG, moved, (*seconds, *of))]


def fisher(result: Any) -> list[Piece]:
    """The gradient in two top spaces, and gradients that the empirical Fisher costs."""
    held = "its top 10 held {} to {} of the gradient, the Hessian's {} to {}, and the two spaces overlapped by {} to {}"
    ends = [
        short(of(row[key] for row in result["shares"]), 2)
        for key in ("fisher", "hessian", "overlap")
        for of in (min, max)
    ]
    cost = result["costs"]
    made, kept, anew = (f"{cost[key]:.0f}" for key in ("made", "kept", "anew"))
    words = (
        "with n = {} and 1,024 examples it costs {} gradients of the sample (in batches of 64) to begin with, then {} "
        "a product with all gradients kept, and {} with none"
    )
    return [
        Sentence(CURVATURE, held, tuple(ends)),
        Sentence(CURVATURE, words, (f"{cost['n']:,}", made, kept, anew)),
        Sentence(
            CURVATURE, "those beyond half of the free memory are taken anew | {} (MLP, and {} once)", (kept, made)
        ),
    ]


def differences(result: Any) -> list[Piece]:
    """Errors of differences, over the smooth networks and with kinks, and gradients of a product."""
    smooth, kinked = ([row for row in result if row["is_smooth"] == is_smooth] for is_smooth in (True, False))

    def errors(way: str, along: str) -> list[float]:
        return [row["errors"][way][along] for row in smooth]

    def gradients(way: str, rows: Any) -> str:
        return str(max(row["gradients"][way] for row in rows))

    forward, top, one_side = (
        tuple(power(end(errors(*of))) for end in (min, max))
        for of in (("forward", "eigenvectors"), ("shards", "top"), ("one_side", "top"))
    )
    others = tuple(power(max(errors("shards", along))) for along in ("gradient", "random"))
    wrong = max(row["errors"]["shards"][along] for row in kinked for along in ("top", "gradient", "random"))
    of_shards = (
        "differences leave {} to {} of |H v| along the top eigenvector of these networks, up to {} along the gradient, "
        "and up to {} along a random direction"
    )
    central = (
        "central differences of float64 gradients | {} of float64, more at a kink ({} were measured, {} at most) |"
    )
    return [
        Sentence(CURVATURE, "forward differences of float32 gradients | {} |", (gradients("forward", smooth),)),
        Sentence(CURVATURE, central, (*(gradients("central", rows) for rows in (smooth, kinked)), str(2 * len(STEPS)))),
        Sentence(CURVATURE, "central differences of float32 gradients | {} |", (gradients("shards", result),)),
        Sentence(CURVATURE, "Forward differences leave {} to {} of lambda_1", forward),
        Sentence(CURVATURE, of_shards, (*top, *others)),
        Sentence(CURVATURE, "cost half and leave {} to {} along the top eigenvector", one_side),
        Sentence(CURVATURE, "With kinks products are off by up to {} of |H v|", (f"{wrong:.0f}",)),
    ]


def beside(result: Any) -> list[Piece]:
    """Least and most of the three networks, in gradients."""
    graph, noise, forward = (
        tuple(short(end(of[what] for of in result.values()), digits) for end in (min, max))
        for what, digits in (("graph", 1), ("noise", 3), ("forward", 1))
    )
    return [
        Sentence(CURVATURE, "one graph of the sample ({} to {} gradients)", graph),
        Sentence(MEASUREMENTS, "Cost: a forward pass, {} to {} gradients", forward),
        Sentence(MEASUREMENTS, "gradients that are there anyway ({} to {} of their pass", noise),
    ]


def rounded(seconds: float) -> str:
    """Two digits, without an exponent."""
    return f"{float(f'{seconds:.2g}'):.6f}".rstrip("0").rstrip(".")
