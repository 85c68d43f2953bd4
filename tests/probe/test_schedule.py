"""When to probe, and what it costs, on a clock that the tests turn."""

import math
import re

import pytest

from lightning_subspace.probe.forecast import forecast
from lightning_subspace.probe.schedule import Schedule


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def started(every, max_overhead=None, step=0):
    clock = Clock()
    schedule = Schedule(every, max_overhead, clock)
    schedule.begin(step)
    return schedule, clock


def spend(schedule, clock, seconds, report=0.0):
    with schedule.probing():
        clock.now += seconds
    with schedule.aside():
        clock.now += report


# Steps


def test_an_interval_is_counted_by_crossings():
    schedule, _ = started(10)
    assert [step for step in range(1, 32) if schedule.is_due(step)] == [10, 20, 30]


def test_steps_that_jump_over_a_multiple_do_not_miss_it():
    schedule, _ = started(5)
    assert [step for step in range(2, 31, 2) if schedule.is_due(step)] == [6, 10, 16, 20, 26, 30]


def test_an_interval_continues_where_training_does():
    schedule, _ = started(10, step=17)
    assert [step for step in range(18, 42) if schedule.is_due(step)] == [20, 30, 40]


@pytest.mark.parametrize("listed", [[7, 3, 12], (3, 7, 12, 12), range(3, 13, 4)])
def test_a_list_is_taken_in_any_order_and_each_step_once(listed):
    schedule, _ = started(listed)
    assert [step for step in range(1, 20) if schedule.is_due(step)] == sorted(set(listed))


def test_listed_steps_are_counted_by_crossings_too():
    schedule, _ = started([3, 4, 7])
    assert [step for step in range(2, 12, 2) if schedule.is_due(step)] == [4, 8]


def test_the_start_is_probed_for_an_interval_and_on_request_for_a_list():
    assert started(10)[0].probes_first_step
    assert started(10, step=3)[0].probes_first_step
    assert started([0, 5])[0].probes_first_step
    assert not started([5])[0].probes_first_step


def test_the_end_is_probed_for_an_interval_if_the_budget_allows_it():
    schedule, clock = started(10, 0.2)
    spend(schedule, clock, 5.0)
    assert schedule.probes_last_step is False
    clock.now += 100.0
    assert schedule.probes_last_step is True
    assert started([5])[0].probes_last_step is False
    assert started(10)[0].probes_last_step is True


# The budget


def test_the_first_probe_is_free_and_the_next_waits_until_it_is_affordable():
    schedule, clock = started(1, 0.2)
    assert schedule.is_affordable()
    spend(schedule, clock, 4.0)
    waited = 0.0
    while not schedule.is_affordable():
        clock.now += 0.25
        waited += 0.25
    assert waited == 8.0  # an ordinary probe is expected to take half of the first: 2 / (8 + 2) = 0.2
    spend(schedule, clock, 2.0)
    assert schedule.later_overhead == pytest.approx(0.2)


def test_no_budget_means_the_exact_schedule():
    schedule, clock = started(1, None)
    for step in range(1, 20):
        assert schedule.is_due(step)
        spend(schedule, clock, 100.0)


def run(schedule, clock, steps, seconds_a_step, price):
    """Take steps, and the probes that the schedule asks for; the share of each after it."""
    shares = []
    for step in steps:
        clock.now += seconds_a_step(step)
        if schedule.is_due(step):
            spend(schedule, clock, price(len(shares)), report=0.05)
            shares.append(schedule.later_overhead)
    return shares


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize("max_overhead", [0.02, 0.2, 0.5])
@pytest.mark.parametrize(
    "seconds_a_step",
    [lambda step: 0.01, lambda step: 0.01 if step < 20_000 else 0.1, lambda step: 0.1 if step < 20_000 else 0.01],
    ids=["constant", "slower", "faster"],
)
def test_a_long_run_spends_its_budget_and_not_more(every, max_overhead, seconds_a_step):
    schedule, clock = started(every, max_overhead)
    spend(schedule, clock, 7.0, report=1.0)
    shares = run(schedule, clock, range(1, 60_001), seconds_a_step, lambda probe: 2.0)
    # The report of the second probe is the first that raises the price, so that one may go over by as much.
    assert max(shares[1:]) <= max_overhead + 1e-9
    affordable = 2.05 / (2.05 + every * 0.1)  # what probing at every candidate step would take, where steps are slow
    assert schedule.later_overhead >= 0.75 * min(max_overhead, affordable)


def test_a_probe_that_is_dearer_than_the_last_is_made_up_for():
    schedule, clock = started(10, 0.2)
    spend(schedule, clock, 3.0)
    shares = run(schedule, clock, range(1, 60_001), lambda step: 0.01, lambda probe: 2.0 if probe % 5 else 6.0)
    assert 0.15 <= schedule.later_overhead <= 0.2 + 6.0 / (60_000 * 0.01)
    assert max(shares[-20:]) <= 0.2 + 6.0 / (60_000 * 0.01)


def test_listed_steps_beyond_the_budget_are_remembered():
    schedule, clock = started([1, 2, 100], 0.2)
    assert schedule.is_due(1)
    spend(schedule, clock, 5.0)
    assert not schedule.is_due(2)
    clock.now += 100.0
    assert schedule.is_due(100)
    assert schedule.passed_over == [2]
    schedule.begin(0)
    assert schedule.passed_over == []


# The account


def test_time_is_counted_once():
    schedule, clock = started(10)
    with schedule.aside():  # the sample
        clock.now += 1.0
    with schedule.probing():
        with schedule.aside():  # the self-check
            clock.now += 2.0
        clock.now += 3.0
    with schedule.aside():  # the report
        clock.now += 4.0
    assert schedule.last_seconds == 3.0
    clock.now += 10.0
    assert schedule.overhead == pytest.approx(0.5)
    assert schedule.later_overhead == 0.0
    spend(schedule, clock, 3.0, report=2.0)
    clock.now += 5.0
    assert schedule.last_seconds == 3.0
    assert schedule.overhead == pytest.approx(15.0 / 30.0)
    assert schedule.later_overhead == pytest.approx(5.0 / 20.0)


def test_the_set_up_is_not_part_of_the_price():
    schedule, clock = started(1, 0.5)
    with schedule.aside():
        clock.now += 50.0
    with schedule.probing():
        with schedule.aside():
            clock.now += 20.0
        clock.now += 1.0
    with schedule.aside():
        clock.now += 30.0
    clock.now += 1.0
    assert schedule.is_affordable()


def test_what_raises_is_counted_too():
    schedule, clock = started(1, 0.5)

    def interrupted():
        clock.now += 2.0
        raise KeyboardInterrupt

    for context in (schedule.probing, schedule.aside):
        with pytest.raises(KeyboardInterrupt), context():
            interrupted()
    assert schedule.overhead == 1.0


def test_shares_are_zero_before_anything_has_happened_and_keep_their_value_after_the_end():
    schedule, clock = started(1)
    assert schedule.overhead == schedule.later_overhead == 0.0
    spend(schedule, clock, 1.0)
    clock.now += 1.0
    spend(schedule, clock, 1.0)
    clock.now += 2.0
    schedule.end()
    clock.now += 1000.0
    assert schedule.overhead == pytest.approx(2.0 / 5.0)
    assert schedule.later_overhead == pytest.approx(1.0 / 4.0)
    schedule.begin(0)
    assert schedule.overhead == 0.0


# The forecast


@pytest.mark.parametrize("max_overhead", [0.2, None])
def test_the_forecast_names_the_size_the_price_and_the_pace(max_overhead):
    text = forecast(n=1_000_000, k=10, memory="124.0 MB held", seconds=3.0, first=9.0, max_overhead=max_overhead)
    assert text.startswith("n = 1,000,000, k = 10: about 3.00 s a probe, 9.00 s the first; 124.0 MB held; ")
    if max_overhead is None:
        assert text.endswith("as scheduled")
    else:
        assert text.endswith("at most one every 15.0 s (max_overhead=0.2)")


def test_the_pace_of_the_forecast_is_that_of_the_schedule():
    schedule, clock = started(1, 0.2)
    spend(schedule, clock, 3.0)
    began = clock.now
    for step in range(1, 100_000):
        clock.now += 0.01
        if schedule.is_due(step):
            spend(schedule, clock, 3.0)
    probes = math.floor((clock.now - began) * 0.2 / 3.0)
    pace = float(
        re.search(r"every ([0-9.]+) s", forecast(n=9, k=1, memory="", seconds=3.0, first=9.0, max_overhead=0.2))[1]
    )
    assert (clock.now - began) / probes == pytest.approx(pace, rel=0.02)
