"""Modules that are drawn at random, with state of every kind at every place: training is the same, or it is told.

Each example trains twice, with measurements between the steps and without. Parameters, optimizer, random numbers and
all that a training step has seen of its state have to be equal to the bit. Where a loss is refused, they have to be
equal as well, unless the refusal says that something could not be put back: that may happen once.
"""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.loss import kinds_of_state as table
from tests.loss.generated_modules import OWNERS, TIMES, State, require_the_same
from tests.thorough import how_many

states = st.builds(
    State,
    kind=st.sampled_from(sorted(table.KINDS)),
    place=st.sampled_from(sorted(table.PLACES)),
    owner=st.sampled_from(OWNERS),
    time=st.sampled_from(TIMES),
    is_read=st.booleans(),
)


@settings(
    max_examples=how_many(25, thorough=300), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.lists(states, min_size=1, max_size=4))
def test_a_measured_training_is_the_same_or_it_is_told(drawn):
    require_the_same(drawn)
