"""From a stored result to pieces of pages, by the name of the benchmark.

A new benchmark whose numbers stand in a page gets a function here, a row in `MAKERS`, and `results/NAME.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.benchmarks import bill
from tests.benchmarks.constants import constants
from tests.benchmarks.example_pages import lora, text, two_tasks
from tests.benchmarks.pages import Piece, Sentence, Table, power, short
from tests.benchmarks.product_pages import beside, differences, fisher, joining, operations, state, vectors
from tests.benchmarks.repository_pages import moved, printed, suite
from tests.benchmarks.speed_pages import speed

BENCHMARKS = "tests/benchmarks/README.md"
CURVATURE = "lightning_subspace/curvature/README.md"
CALLBACKS = "lightning_subspace/callbacks/README.md"
LINALG = "lightning_subspace/linalg/README.md"
TAB = "lightning_subspace/tensorboard_tab/README.md"


def pieces(results: Mapping[str, Any]) -> list[Piece]:
    """All that the results make, and what the package itself and the gallery say."""
    return [*constants(), *two_tasks(), *(piece for name, result in results.items() for piece in MAKERS[name](result))]


def growth(result: Any) -> list[Piece]:
    """Rows of `growth.py`: over n, over the sample but its smaller ones, and of the default sample."""
    largest = max(row["sample"] for row in result["sample"])
    over_sample = [row for row in result["sample"] if row["sample"] in (1024, largest)]
    rows = [
        (
            f"{row['n']:,.0f}",
            f"{row['sample']:,.0f}" + " (the default)" * (row in result["default"]),
            short(row["product"], 4),
            f"{row['outside']:.1%}".replace("%", " %") if row["outside"] < 0.1 and row in result["default"]
            else f"{row['outside']:.0%}".replace("%", " %"),
            f"{row['vectors']:.1f}",
        )
        for row in (*result["n"], *over_sample, *result["default"])
    ]  # fmt: skip
    header = ("n", "sample", "seconds a product", "outside of products", "vectors")
    return [Table(BENCHMARKS, header, tuple(rows))]


def big(result: Any) -> list[Piece]:
    """The row of `big.py`."""
    words = "n = {}, ncv = {} by the memory budget, {} products to a residual of {} lambda_1, {} s, {} GiB at the peak"
    numbers = (
        f"{result['n']:,}",
        f"{result['ncv']}",
        f"{result['matvecs']}",
        power(result["residual"]),
        f"{result['seconds']:.0f}",
        f"{result['peak_gib']:.1f}",
    )
    return [Sentence(BENCHMARKS, words, numbers)]


def overhead(result: Any) -> list[Piece]:
    """Of `overhead.py`, on one and on two ranks."""
    one, two = result["1"], result["2"]
    words = (
        "spent {} % of the first half and {} % of all on probes after the first; on two ranks (`--ranks 2`) it was {} "
        "and {} %. The first probe took {} and {} s, and {} and {} s were forecast"
    )
    shares = [f"{100 * of[key]:.1f}" for of in (one, two) for key in ("half", "all")]
    seconds = [short(of[key], 2) for key in ("first", "forecast") for of in (one, two)]
    return [Sentence(BENCHMARKS, words, (*shares, *seconds))]


def sample_size(result: Any) -> list[Piece]:
    """Means over the seeds, and what the error bars cover."""
    steps = sorted({row["step"] for row in result["rows"]} - {200})
    sizes = dict.fromkeys((row["sample"], row["gradient_sample"]) for row in result["rows"])
    rows = []
    for sample, gradient_sample in sizes:
        of_size = {
            row["step"]: row
            for row in result["rows"]
            if row["sample"] == sample and row["gradient_sample"] == gradient_sample
        }
        rows.append((number(sample), number(gradient_sample), *(mean(of_size[step]["fraction"]) for step in steps)))
    words = "the error bar covered the value of all data in each of the {} cases that had one"
    header = ("`sample`", "`gradient_sample`", *(f"step {step}" for step in steps))
    found: list[Piece] = [Table(BENCHMARKS, header, tuple(rows))]
    at_1000 = {
        (row["sample"], row["gradient_sample"]): row["fraction"] for row in result["rows"] if row["step"] == 1000
    }
    told = "at step 1,000 is {} with all 5,000 images, {} with 1,024 and 4,096, and {} with 512 and 512"
    means = tuple(mean(at_1000[size]) for size in (("all", "all"), (1024, 4096), (512, 512)))
    found.append(Sentence("README.md", told, means))
    if result["covered"] == result["cases"]:
        found.append(Sentence(BENCHMARKS, words, (f"{result['cases']}",)))
    return found


def mean(fraction: float | None) -> str:
    """A mean; none where every seed's was withheld."""
    return "withheld" if fraction is None else short(fraction, 2)


def number(size: int | str) -> str:
    """A size, or the word "all"."""
    return size if isinstance(size, str) else f"{size:,}"


def certificate(result: Any) -> list[Piece]:
    """Of `certificate.py`, beside the same of the first certificate, which is kept in the result."""
    spectra = [
        (
            row["name"],
            *(f"{row[key]:.0f}" for key in ("without", "before_with", "with")),
            *(f"{row[key]:.0%}" for key in ("before_trusted", "trusted")),
            *(f"{row[key]}" for key in ("before_undetermined", "undetermined")),
        )
        for row in result["spectra"]
    ]
    nets = [
        (row["name"], *(f"{row[key]:.1f}" for key in ("without", "before_more", "more")), f"{row['trusted']:.0%}")
        for row in result["nets"]
    ]
    more, without = (
        tuple(f"{end(row[key] for row in result['nets']):.0f}" for end in (min, max)) for key in ("more", "without")
    )
    [copies] = result["copies"]
    random = (
        "Of {} random spectra with copies below 3 % of the largest eigenvalue {} had a trusted space that was "
        "undetermined before, and {} a wrong eigenvalue that was verified; now it is {} and {}."
    )
    counts = ("spectra", "before_undetermined", "before_wrong", "undetermined", "wrong")
    columns = ("without", "with, before", "with", "trusted, before", "trusted", "undetermined, before", "undetermined")
    return [
        Table(LINALG, ("spectrum", *columns), tuple(spectra)),
        Table(LINALG, ("network", "without", "more, before", "more", "trusted"), tuple(nets)),
        Sentence("README.md", "on a trained network, {} to {} products of", without),
        Sentence("README.md", "and {} to {} to exclude missed copies", more),
        Sentence(CURVATURE, "on a trained network, {} to {} products of", without),
        Sentence(CALLBACKS, "for {} to {} more products each ({} to {} without)", (*more, *without)),
        Sentence(LINALG, random, tuple(str(copies[key]) for key in counts)),
    ]


def vocabulary(result: Any) -> list[Piece]:
    """The graph of torch beside the closed form."""
    header = ("in copies of all logits", "graph that is kept", "peak of a product", "seconds a product")
    rows = [
        (name, *(f"{row[key]:.1f}" for key in ("graph", "peak_of_product", "seconds_of_product")))
        for name, row in zip(("by the graph of torch", "in closed form"), result, strict=True)
    ]
    return [Table(CURVATURE, header, tuple(rows))]


def attention(result: Any) -> list[Piece]:
    """Math attention and blocks at two lengths, in turns."""
    header = ("T", "attention", "graph that is kept", "peak of a product", "seconds a product")
    names = (("1,024", "math"), ("", "in blocks"), ("2,048", "math"), ("", "in blocks"))
    rows = [
        (*name, f"{row['graph']:.0f} MB", f"{row['peak_of_product']:.0f} MB", short(row["seconds_of_product"], 2))
        for name, row in zip(names, result, strict=True)
    ]
    return [Table(CURVATURE, header, tuple(rows))]


def mnist(result: Any) -> list[Piece]:
    """Caption of the first picture, of `examples/mnist.py`."""
    seen = (
        "*A 784-100-100-10 ReLU network on {} MNIST images, learning rate {}, everything measured on the whole "
        "training set. Left: with SGD nearly all of the gradient lies in {} of {} directions"
    )
    kept = (
        "Right: of the space of the top {} at step {}, {} is left at step {}, of that of the next {} only {}. Made by "
        "`python examples/mnist.py` in {} s on two cores"
    )
    k, steps, left = str(result["k"]), f"{result['steps']:,}", [short(result[key], 2) for key in ("top", "next")]
    found = (f"{result['examples']:,}", str(result["learning_rate"]), k, f"{result['n']:,}")
    return [
        Sentence("README.md", "Three panels over {} optimizer steps", (steps,)),
        Sentence("README.md", seen, found),
        Sentence(
            "README.md",
            kept,
            (k, str(result["reference_step"]), left[0], steps, k, left[1], f"{result['seconds']:.0f}"),
        ),
    ]


def tab(result: Any) -> list[Piece]:
    """Bytes and times of an entry, at k = 10."""
    alone, layered = (next(row for row in result if (row["k"], row["layers"]) == (10, layers)) for layers in (0, 16))
    words = "has {} bytes at k = 10 without a density and layers, of which 16 add {} by the lengths of their names"
    size = (f"{alone['bytes']:,}", f"{layered['bytes'] - alone['bytes']:,}")
    times = tuple(short(1e3 * row["median"], 2) for row in (alone, layered))
    return [Sentence(TAB, words, size), Sentence(TAB, "takes {} ms of a processor, {} with layers", times)]


def tab_page(result: Any) -> list[Piece]:
    """The page, with three runs and with a long one, and with many eigenvalues."""
    *few, many = result
    words = (
        "Three runs of {} probes with k = 10 are drawn in {} s, one of {} in {} s, and a step of the slider "
        "takes {} and {} ms"
    )
    drawn = [text for row in few for text in (f"{row['probes']:,}", short(row["cold"], 1))]
    slow = (f"{many['probes']:,}", str(many["k"]), f"{1e3 * many['work']:.0f}", f"{many['megabytes']:.0f}")
    return [
        Sentence(TAB, words, (*drawn, *(f"{1e3 * row['work']:.0f}" for row in few))),
        Sentence(TAB, "With {} probes of {} eigenvalues it takes {} ms a step, and {} MB are loaded", slow),
    ]


MAKERS: dict[str, Callable[[Any], list[Piece]]] = {
    "speed": speed,
    "growth": growth,
    "big": big,
    "ranks": bill.pieces,
    "overhead": overhead,
    "sample_size": sample_size,
    "certificate": certificate,
    "vocabulary": vocabulary,
    "attention": attention,
    "operations": operations,
    "joining": joining,
    "state": state,
    "vectors": vectors,
    "fisher": fisher,
    "differences": differences,
    "beside": beside,
    "mnist": mnist,
    "lora": lora,
    "text": text,
    "tab": tab,
    "tab_page": tab_page,
    "moved": moved,
    "printed": printed,
    "suite": suite,
}
