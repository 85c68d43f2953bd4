"""Silence in one thread: others are heard, and filters and what has been said stay as they are."""

import threading
import warnings

from lightning_subspace.state.quiet import quiet


def say(text="said"):
    warnings.warn(text, stacklevel=2)


def test_it_drops_what_this_thread_says_and_nothing_else():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet():
            say("inside")
            other = threading.Thread(target=say, args=("beside",))
            other.start()
            other.join()
        say("behind")
    assert [str(warning.message) for warning in heard] == ["beside", "behind"]


def test_it_drops_them_where_they_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            say()


def test_what_is_said_once_is_not_said_again():
    """`catch_warnings` would make Python forget what it has said."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        for _ in range(3):
            say("once")
            with quiet():
                pass
    assert len(heard) == 1


def test_filters_that_are_set_meanwhile_stay():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with quiet():
            warnings.filterwarnings("ignore", message="another")
        assert warnings.filters[1:] == before
        say("another")
        say("ours")
    assert [str(warning.message) for warning in heard] == ["ours"]


def test_one_in_a_list_out_of_reach_does_nothing():
    """As where another thread has begun a `catch_warnings` meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with quiet():
            caught = warnings.catch_warnings(record=True)
            heard = caught.__enter__()  # keeps a copy of the filters
        say("behind")
        caught.__exit__()
    assert [str(warning.message) for warning in heard] == ["behind"]
