"""The JSON of a probe: what goes in comes out, in few bytes, and is JSON to a browser as well."""

import json
import math

import pytest

from lightning_subspace.tensorboard_tab.schema import PLUGIN, SCHEMA, from_json, tag_of, to_json
from lightning_subspace.tensorboard_tab.summary import summary_of
from tests.tensorboard_tab.runs import probes


@pytest.mark.parametrize("probe", list(probes(range(0, 1000, 100), density=True)), ids=lambda probe: str(probe["step"]))
def test_a_probe_comes_back_to_six_digits(probe):
    def compare(found, given):
        if isinstance(given, dict):
            assert found.keys() == given.keys()
            for key, value in given.items():
                compare(found[key], value)
        elif isinstance(given, list):
            assert len(found) == len(given)
            for one, other in zip(found, given, strict=True):
                compare(one, other)
        else:
            assert found == (pytest.approx(given, rel=5e-6) if isinstance(given, float) else given)

    compare(from_json(to_json(probe)), {"v": SCHEMA, **probe})


def test_what_is_no_number_is_left_out_of_a_mapping_and_null_in_a_list():
    probe = {"step": 1, "lr": math.nan, "metrics": {"a": math.inf, "b": 1.5}, "overlaps": [[0, 1], [-math.inf, 0.5]]}
    assert from_json(to_json(probe)) == {"v": 1, "step": 1, "metrics": {"b": 1.5}, "overlaps": [[0, 1], [None, 0.5]]}


@pytest.mark.parametrize("value", [1e-300, -1e300, 123456.5, 1e22, 2**53, 0.1 + 0.2, -0.0, 5e-324])
def test_a_number_of_any_size_stays_within_a_relative_error(value):
    assert from_json(to_json({"x": value}))["x"] == pytest.approx(value, rel=5e-6, abs=0)


def test_texts_of_any_kind_come_back():
    text = 'RuntimeError: "λ" \\ </script>\n\x00 \ud800'.encode("utf-8", "ignore").decode()
    assert from_json(to_json({"failed": text}))["failed"] == text


def test_a_summary_holds_the_text_and_the_schema():
    [value] = summary_of('{"v":1,"step":3}', tag_of("mine")).value
    assert (value.tag, value.tensor.string_val[0]) == ("mine/probes", b'{"v":1,"step":3}')
    assert value.metadata.plugin_data.plugin_name == PLUGIN
    assert json.loads(value.metadata.plugin_data.content) == {"v": SCHEMA}


@pytest.mark.parametrize("text", ["NaN", '{"a":Infinity}', "[-Infinity]", "", "{"])
def test_what_a_browser_does_not_read_is_refused(text):
    with pytest.raises(ValueError, match=r"the number|Expecting"):
        from_json(text)
