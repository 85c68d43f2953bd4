"""The bill of a probe at scale: bytes a rank, seconds, share of a training run, computed from a model.

    python -m tests.benchmarks.bill    # prints the tables of lightning_subspace/parallel/README.md

`product_bytes` and `rank_bytes` are checked against processes by `ranks.py`, whose stored rows are printed first. What
follows for 1.1 and 7 billion parameters is computed: nothing of that size has run here. Each assumption is a constant
below, with its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from lightning_subspace.subspace.room import DEVICE_SHARE, HOST_SHARE, VECTORS, least_size, wanted_size
from lightning_subspace.subspace.solver import Solver
from tests.benchmarks.pages import Piece, Table, row, stored

PAGE = "lightning_subspace/parallel/README.md"
FLOAT = 4  # bytes
K, STEPS = 10, 1_000  # eigenpairs; steps between probes
WHOLE, IN_GRAPHS = 3, 3  # vectors of n numbers that an exact product makes for a while; in a graph that is rebuilt
SHARDS, GATHERED = 6, 16  # for differences on shards: of n / W numbers; of those of the layer that FSDP has gathered
# These four were found by `ranks.py`, which asserts that they suffice.

# A card of 80 GB: the vendor's data sheet of the H100 SXM, and the share of its peak that is taken to be reached.
CARD = 80e9  # bytes
FLOAT32 = 0.5 * 67e12  # operations a second in IEEE float32, which a probe computes in
BFLOAT16 = 0.4 * 989e12  # of training in bf16
MEMORY = 3.35e12  # bytes a second
HOST = 50e9  # bytes a second between host and card: PCIe 5 x16 has 63
LINKS = {8: 450e9, 64: 50e9}  # bytes a second and card in a collective: NVLink of 8 cards; 400 Gb/s between machines
NODE = 1e12  # bytes of host memory for 8 cards

# Gradients a product costs: `operations.py`, counted for a vision transformer, with graphs rebuilt.
EXACT, DIFFERENCE = round(stored()["operations"]["prices"]["vit"]["rebuilt"], 1), 2.0
ADAPTERS = 2 / 3  # of a gradient, where no weight's gradient is taken: forward 2 n, backward 2 n of 6 n a token
# Bytes a token and layer of width h that a forward pass saves in 16 bit, without attention's scores: 34 h (Korthikanti
# et al. 2022, arXiv 2205.05198, equation 2). In float32 twice that, and twice again with the graph of a gradient.
SAVED = 34
SEQUENCE = 2_048  # tokens
SAMPLE, GRADIENT_SAMPLE = 64, 512  # sequences


@dataclass(frozen=True)
class Model:
    """A probe of n parameters on W ranks.

    Attributes:
        strategy: "ddp", exact products of whole models; "fsdp2", of a gathered copy; "differences" on shards.
        rounds: micro-batches a rank.
        layer: parameters of the largest module that FSDP gathers at once.
    """

    n: float
    ranks: int
    k: int = K
    ncv: int = 2 * K + 10
    strategy: str = "ddp"
    rounds: int = 1
    layer: float = 0.0


def product_bytes(model: Model) -> dict[str, float]:
    """Bytes of the whole vectors that a product moves, by collective."""
    whole = FLOAT * model.n
    if model.ranks == 1:
        return {}
    if model.strategy == "differences":  # each of two gradients gathers in both passes, and scatters once
        return {"fsdp all_gather": 4 * model.rounds * whole, "fsdp reduce_scatter": 2 * model.rounds * whole}
    return {"all_gather": whole, "reduce_scatter": whole}


def rank_bytes(model: Model) -> dict[str, float]:
    """Bytes that a rank holds in a solve, beside graphs and examples, and their peak."""
    whole, share = FLOAT * model.n, FLOAT * model.n / model.ranks
    is_sharded = model.strategy == "differences"
    transfers = {"ddp": 2 * whole + 2 * share, "fsdp2": 4 * whole + 2 * share, "differences": 0.0}[model.strategy]
    found = {
        "copies": share if is_sharded else whole,
        "transfers": whole if model.ranks == 1 else transfers,
        "basis": (model.ncv + 1) * share,
        "vectors": (model.k + VECTORS) * share,
        "product": SHARDS * share + GATHERED * FLOAT * model.layer if is_sharded else WHOLE * whole,
    }
    return {**found, "peak": sum(found.values())}


@dataclass(frozen=True)
class Transformer:
    """A decoder: parameters, layers, width; tokens of a training step."""

    name: str
    n: float
    layers: int
    width: int
    batch: float


MODELS = [
    Transformer("1.1 B", 1.1e9, 22, 2_048, 2e6),  # as TinyLlama, arXiv 2401.02385
    Transformer("7 B", 6.7e9, 32, 4_096, 4e6),  # as Llama 2, arXiv 2307.09288
]
CARDS = [8, 64]
RANK, ADAPTED = 16, 4  # of an adapter; square matrices a layer that have one


@dataclass(frozen=True)
class Way:
    """One way to measure a model.

    Attributes:
        strategy: as `Model` has it.
        gradients: a product costs; 0: there are none.
        adapters: whether they are all that is trained and measured.
        instead: what to use where it does not fit.
    """

    name: str
    strategy: str
    gradients: float
    adapters: bool = False
    instead: str = ""


WAYS = [
    Way("exact, DDP", "ddp", EXACT, instead='FSDP2, `params=` or `curvature="none"`'),
    Way("exact, FSDP2", "fsdp2", EXACT, instead="differences, if the network is smooth"),
    Way(
        "differences, FSDP2",
        "differences",
        DIFFERENCE,
        instead='more cards, a smaller `k`, `params=` or `curvature="none"`',
    ),
    Way(
        "exact, LoRA, DDP",
        "ddp",
        EXACT * ADAPTERS,
        adapters=True,
        instead="FSDP2 and differences, or shorter sequences",
    ),
    Way('`curvature="none"`, FSDP2', "differences", 0.0),
]


@dataclass(frozen=True)
class Bill:
    """What a probe takes on each card, in bytes, and its time.

    Attributes:
        training: what training holds between two steps.
        held: by what it is for; the basis only where it lies on the card.
        graph: of one sequence.
        size: of the basis; 0: there is none.
        hosted: bytes of the basis on the host.
        product: seconds.
        probe: seconds.
        share: of the time of the steps between two probes.
    """

    training: float
    held: dict[str, float]
    graph: float
    size: int
    hosted: float
    product: float
    probe: float
    share: float

    @property
    def total(self) -> float:
        """Bytes on the card at the peak."""
        return self.training + sum(self.held.values()) + self.graph

    @property
    def fits(self) -> bool:
        """Whether a card has as many, with what `subspace/room.py` leaves free."""
        return self.total - self.training <= DEVICE_SHARE * (CARD - self.training)


def bill(model: Transformer, way: Way, cards: int) -> Bill:
    """The bill of one probe.

    Training holds 16 bytes a parameter: float32 weights and gradients, and two moments; its activations are not there
    while a probe is taken. With adapters it holds 2 bytes a frozen parameter, which the probe copies in float32.
    """
    n = model.layers * ADAPTED * 2 * RANK * model.width if way.adapters else model.n
    training = 2 * model.n + 16 * n if way.adapters else 16 * model.n
    training /= 1 if way.strategy == "ddp" else cards
    layer = model.n / model.layers if way.strategy == "differences" else 0.0
    wanted, least = wanted_size(K, None, int(n)), least_size(K, None, int(n))
    one = Model(n, cards, K, wanted, way.strategy, -(-SAMPLE // cards), layer)
    held = {name: count for name, count in rank_bytes(one).items() if name != "peak"}
    if way.adapters:
        held["copies"] = FLOAT * model.n
    saved = SAVED * model.width * model.layers * SEQUENCE
    graph = 2.0 * saved if way.strategy == "differences" else 4.0 * saved + IN_GRAPHS * FLOAT * n
    # As `subspace/room.py` decides.
    vector, size, hosted = FLOAT * n / cards, wanted, 0.0
    room = DEVICE_SHARE * (CARD - training) - graph - sum(held.values()) + held["basis"]
    if not way.gradients:
        held["basis"], held["vectors"], size = 0.0, 0.0, 0
    elif room >= (least + 1) * vector:
        size = min(wanted, int(room / vector) - 1)
        held["basis"] = (size + 1) * vector
    else:
        size = min(wanted, int(HOST_SHARE * NODE / 8 / vector) - 1)
        held["basis"], hosted = 0.0, (size + 1) * vector
    sequence = 6 * model.n * SEQUENCE  # operations of a gradient
    rows = (size + 14) * vector / HOST if hosted else 2 * size * vector / MEMORY  # of half a basis, on the mean
    evaluated = way.gradients * sequence * SAMPLE / cards / FLOAT32
    moved = sum(product_bytes(one).values()) / LINKS[cards]
    seconds = evaluated + moved + rows if way.gradients else 0.0
    products = Solver(K).expected_products(trained=True, verify=True)
    part = ADAPTERS if way.adapters else 1.0
    probe = products * seconds + part * sequence * (SAMPLE + GRADIENT_SAMPLE) / cards / FLOAT32
    step = part * 6 * model.n * model.batch / cards / BFLOAT16
    return Bill(training, held, graph, size, hosted, seconds, probe, probe / (STEPS * step))


def bill_table() -> Table:
    """The worked examples."""
    columns = ["model", "cards", "how", "training", "copies", "whole vectors and product", "vectors", "basis"]
    columns += ["one graph", "sum", "s a product", "s a probe", "share"]
    rows = []
    for model, cards, way in product(MODELS, CARDS, WAYS):
        one = bill(model, way, cards)
        basis = f"{_gb(one.held['basis'])} ({one.size})" if one.size else "none"
        if one.hosted:
            basis = f"host: {_gb(one.hosted)} ({one.size})" if one.fits else "no room"
        parts = [one.training, one.held["copies"], one.held["transfers"] + one.held["product"], one.held["vectors"]]
        costs = [f"{one.product:.2g}" if one.size else "none", f"{one.probe:,.0f}", f"{one.share:.1%}"]
        costs = costs if one.fits else [f"does not fit: {way.instead}", "", ""]
        rows.append((model.name, str(cards), way.name, *map(_gb, parts), basis, _gb(one.graph), _gb(one.total), *costs))
    return Table(PAGE, tuple(columns), tuple(rows))


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f}" if count < 99.95e9 else f"{count / 1e9:.0f}"


def ranks_table(result: Any) -> Table:
    """What `ranks.py` has measured."""
    columns = ["strategy", "ranks", "n", "bytes moved a product", "calls a product", "MB moved a probe"]
    columns += ["peak MB a rank", "in floats", "of the model's"]
    rows = []
    for case in result["rows"]:
        n, peak = case["n"], case["peak"]
        moved, calls = (sum(case[f"{what} a product"].values()) for what in ("bytes", "calls"))
        cells = [case["strategy"], str(case["ranks"]), f"{n:,}", f"{moved / n:.1f} n", f"{calls:.0f}"]
        cells += [f"{case['bytes'] / 1e6:,.1f}", f"{peak / 1e6:,.0f}", f"{peak / n / FLOAT:.0f} n"]
        rows.append((*cells, f"{peak / bound_bytes(case):.0%}"))
    return Table(PAGE, tuple(columns), tuple(rows))


# Of a stored case: micro-batches, and what libraries take that are loaded at the first backward pass.
STORED_BATCHES, OTHER = 8, 60e6


def model_of(row: dict[str, Any]) -> Model:
    """The model of a stored case."""
    rounds = -(-STORED_BATCHES // row["ranks"])
    return Model(row["n"], row["ranks"], row["k"], row["ncv"], row["strategy"], rounds, row["layer"])


def bound_bytes(row: dict[str, Any]) -> float:
    """The peak that the model allows for, with the graphs that the probe has counted."""
    return rank_bytes(model_of(row))["peak"] + row["graphs"] + OTHER


def pieces(result: Any) -> list[Piece]:
    """The measured table and the computed one."""
    return [ranks_table(result), bill_table()]


def main() -> None:
    for table in (ranks_table(stored()["ranks"]), bill_table()):
        print("\n".join(map(row, (table.header, ["---"] * len(table.header), *table.rows))), end="\n\n")


if __name__ == "__main__":
    main()
