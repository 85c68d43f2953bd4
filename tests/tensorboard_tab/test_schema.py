"""The JSON of a probe: what goes in comes out, in few bytes, and is JSON to a browser as well."""

import json
import math

import pytest

from lightning_subspace.tensorboard_tab.schema import PLUGIN, SCHEMA, from_json, tag_of, to_json
from lightning_subspace.tensorboard_tab.summary import summary_of
from tests.tensorboard_tab.runs import probes

# Residuals are bounds, and overlaps have an error of their own.
NEAR = {
    "metrics": lambda value, rel: pytest.approx(value, rel=5e-5),
    "layers": lambda value, rel: pytest.approx(value, rel=5e-3),
    "residuals": lambda value, rel: pytest.approx(value, rel=5e-2),
    "overlaps": lambda value, rel: pytest.approx(value, abs=5e-4),
}


@pytest.mark.parametrize(
    "probe", list(probes(range(0, 1000, 100), density=True, rich=True)), ids=lambda probe: str(probe["step"])
)
def test_a_probe_comes_back_to_its_digits(probe):
    def compare(found, given, near=pytest.approx):
        if isinstance(given, dict):
            assert found.keys() == given.keys()
            for key, value in given.items():
                compare(found[key], value, NEAR.get(key, near))
        elif isinstance(given, list):
            assert len(found) == len(given)
            for one, other in zip(found, given, strict=True):
                compare(one, other, near)
        else:
            assert found == (near(given, rel=5e-6) if isinstance(given, float) else given)

    compare(from_json(to_json(probe)), {"v": SCHEMA, **probe})


def test_what_is_no_number_is_left_out_of_a_mapping_and_null_in_a_list():
    probe = {"step": 1, "lr": math.nan, "metrics": {"a": math.inf, "b": 1.5}, "overlaps": [[0, 1], [-math.inf, 0.5]]}
    assert from_json(to_json(probe)) == {"v": 1, "step": 1, "metrics": {"b": 1.5}, "overlaps": [[0, 1], [None, 0.5]]}


def test_digits_are_those_of_a_number_s_place_and_names_are_kept_as_they_are():
    value = 1 / 7
    metrics = {"100 % of {it}": value, "a/%s": value, 'a/"λ"/b': value, "b": 2.0, "/": value, "": 1e6}
    probe = {
        "metrics": metrics,
        "layers": {"groups": ["%d"], "metrics": [value, None]},
        "residuals": [value],
        "x": value,
    }
    found = from_json(to_json(probe))
    assert list(found["metrics"]) == ["100 % of {it}", "b", "", "a/%s", 'a/"λ"/b', "/"]
    assert found["metrics"] == {key: float(f"{value:.5g}") for key, value in metrics.items()}
    assert found["layers"] == {"groups": ["%d"], "metrics": [0.143, None]}
    assert (found["residuals"], found["x"]) == ([0.14], 0.142857)
    # The next probe with the same names has its own numbers, and one without some of them leaves these out.
    assert from_json(to_json({"metrics": dict.fromkeys(metrics, 3.0)}))["metrics"] == dict.fromkeys(metrics, 3.0)
    assert from_json(to_json({"metrics": {**metrics, "b": math.nan}}))["metrics"].keys() == metrics.keys() - {"b"}


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


def test_long_parts_are_written_in_few_bytes():
    metrics = {"sharpness": 2.5, "noise/scale": 3.0, "noise/a/b": 4.0, "solver/seconds": 1.0}
    probe = {"step": 300, "metrics": metrics, "overlaps": [[50, 100, 250], [1.0, 0.1234, 0.0]]}
    text = to_json(probe)
    assert text == (
        '{"v":1,"step":300,"metrics":{"sharpness":2.5,"noise/":{"scale":3,"a/b":4},"solver/":{"seconds":1}},'
        '"packed":[[50,50,150],[1000,123,0]]}'
    )
    assert from_json(text)["overlaps"] == [[50, 100, 250], [1.0, 0.123, 0.0]]
    assert from_json(text)["metrics"] == metrics
    # Also within a file of several runs.
    assert from_json(f'{{"a":{{"subspace/probes":[{text}]}}}}')["a"]["subspace/probes"][0] == from_json(text)
