"""The bill at scale: the stored counts are those of its model, and of today's probes."""

import pytest

from lightning_subspace.subspace.room import DEVICE_SHARE
from tests.benchmarks import bill, ranks
from tests.benchmarks.bill import CARD, CARDS, MODELS, WAYS, Model
from tests.benchmarks.pages import stored

STORED = stored()["ranks"]["rows"]
COUNTED = ("calls a product", "bytes a product", "calls", "bytes")


def test_every_strategy_size_and_number_of_ranks_is_stored():
    cases = {(row["strategy"], row["ranks"], round(row["n"], -len(str(row["n"])) + 1)) for row in STORED}
    for strategy in ranks.STRATEGIES:
        for count in ranks.RANKS[strategy != "ddp" :]:
            assert {(strategy, count, n) for n in ranks.SIZES[:3]} <= cases
    assert ("ddp", 1, ranks.SIZES[-1]) in cases


@pytest.mark.parametrize("row", STORED, ids=lambda row: f"{row['strategy']}-{row['ranks']}-{row['n']}")
def test_what_is_stored_is_as_the_model_has_it(row):
    ranks.check(row)


@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
def test_a_probe_moves_today_what_is_stored(strategy):
    found = ranks.case(strategy, ranks.SIZES[0], 2)
    (then,) = (row for row in STORED if (row["strategy"], row["ranks"], row["n"]) == (strategy, 2, found["n"]))
    assert [found[name] for name in COUNTED] == [then[name] for name in COUNTED]


def test_more_ranks_take_less_each_and_move_as_much():
    for strategy in ("ddp", "fsdp2"):
        few, many = (Model(1e9, count, strategy=strategy) for count in (8, 64))
        assert bill.product_bytes(few) == bill.product_bytes(many) == {"all_gather": 4e9, "reduce_scatter": 4e9}
        assert bill.rank_bytes(many)["basis"] == bill.rank_bytes(few)["basis"] / 8
        assert bill.rank_bytes(many)["peak"] < bill.rank_bytes(few)["peak"]


def test_what_is_said_to_fit_has_its_basis_somewhere_and_the_rest_on_the_card():
    bills = [bill.bill(model, way, cards) for model in MODELS for cards in CARDS for way in WAYS]
    assert any(one.fits for one in bills)
    assert any(not one.fits for one in bills)
    for one in filter(lambda one: one.fits, bills):
        assert one.total <= CARD - (1.0 - DEVICE_SHARE) * (CARD - one.training)
        assert (one.size > 0) == (one.hosted > 0 or one.held["basis"] > 0) == (one.product > 0)
        assert min(one.hosted, one.held["basis"]) == 0


def test_a_bill_by_hand():
    """7 B on 64 cards by differences: each part as the page has its formula."""
    n, shard = 6.7e9, 4 * 6.7e9 / 64
    one = bill.bill(MODELS[1], WAYS[2], 64)
    assert one.training == pytest.approx(16 * n / 64)
    assert one.held == {
        "copies": pytest.approx(shard),
        "transfers": 0.0,
        "basis": pytest.approx(31 * shard),
        "vectors": pytest.approx(18 * shard),
        "product": pytest.approx(6 * shard + 64 * n / 32),
    }
    assert one.graph == pytest.approx(2 * 34 * 4096 * 32 * 2048)
    evaluated, moved, basis = 2 * 6 * n * 2048 / 33.5e12, 24 * n / 50e9, 60 * shard / 3.35e12
    assert one.product == pytest.approx(evaluated + moved + basis)
    assert one.probe == pytest.approx(37 * one.product + 6 * n * 2048 * 9 / 33.5e12)
    assert one.share == pytest.approx(one.probe / (1_000 * 6 * n * 4e6 / 64 / 395.6e12))
