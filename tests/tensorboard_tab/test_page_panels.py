"""Panels of the page for the step that was taken, the noise, the layers, and projections."""

import math
import re
from itertools import pairwise

import pytest

from tests.tensorboard_tab.browser import at_step, of_one_monitor, write_page, written
from tests.tensorboard_tab.runs import (
    GROUPS,
    SIZES,
    TOO_SMALL,
    UPHILL,
    layers,
    noise,
    step_taken,
)
from tests.thorough import usual

STEPS = range(0, 1100, 100)
LEVEL = "line[stroke-dasharray='8 3 2 3']"


@pytest.fixture
def tab(tmp_path, opened):
    """A page of a run with all panels."""
    address = write_page(tmp_path, of_one_monitor({"a": written(STEPS, rich=True)}))
    return opened(address, viewport={"width": 1440, "height": 3000})  # a pointer reaches what is within it


def projected(steps, keep="bulk", chi_until=0):
    """Entries of a projection, which removes 0.9 of a step and less later on."""
    found = []
    for step in steps:
        metrics = {"removed": 0.9 - step / 10_000} | ({"chi": 0.1 + step / 2000} if step < chi_until else {})
        found.append({"v": 1, "step": step, "metrics": metrics})
    found[0]["run"] = {"keep": keep, "k": 10, "n": 1930, "optimizer": "SGD", "sample": 512}
    return found


# The step that was taken


def test_gain_and_change_are_on_one_axis_and_the_edge_ratio_beside_its_line(tab):
    card = tab.card("taken")
    tab.shot("rich")
    assert "gain, change: loss" in card.locator(".axes text.label").all_text_contents()
    losses, ratio = card.locator("svg[role=img]").all()
    assert losses.locator(".series").count() == 2
    # The edge is where the axis has its 1.
    edge = float(ratio.locator(LEVEL).get_attribute("y1"))
    [one] = [text for text in ratio.locator(".axes text[text-anchor=end]").all() if text.text_content() == "1"]
    assert float(one.get_attribute("y")) - 4 == pytest.approx(edge, abs=0.1)
    # It is not defined uphill, nor where the probe failed.
    assert ratio.locator(".series path[fill=none]").get_attribute("d").count("M") == 3


def test_the_hover_says_what_a_step_did(tab):
    losses, ratio = tab.card("taken").locator(".hit").all()
    tab.hover(losses, at_step(200), 0.3)
    told = tab.tip()
    expected = step_taken(200)
    for text in (f"{expected['step/gain']:.4g}", f"{expected['step/change']:.4g}"):
        assert text in told
    assert "what the gradient promises of the step" in told
    assert "below 0 the step helped" in told
    for step, said in ((200, "0.7, the step lowered the loss"), (900, "1.4, the step raised the loss")):
        tab.hover(ratio, at_step(step), 0.5)
        assert said in tab.tip()
        assert "above 1 the step raised the loss" in tab.tip()
    tab.hover(ratio, at_step(UPHILL), 0.5)
    assert "the step goes uphill" in tab.tip()


def test_the_other_numbers_of_a_step_are_chosen_and_the_address_keeps_them(tab, opened):
    card = tab.card("taken")
    offered = card.locator("select option").all_text_contents()
    first = ["edge_ratio", "curvature", "norm", "relative_norm", "cosine_previous"]
    assert offered == [f"step/{key}" for key in first]
    card.locator("select").select_option("step/cosine_previous")
    assert "cosine with the step before" in card.locator(".axes text.label").all_text_contents()
    tab.hover(card.locator(".hit").nth(1), at_step(300), 0.5)
    assert "0.3" in tab.tip()
    other = opened(tab.page.url).card("taken")
    assert other.locator("select").input_value() == "step/cosine_previous"
    assert "step/" not in "".join(tab.card("others").locator("option").all_text_contents())
    rows = {int(row["step"]): row for row in tab.table(card)}
    assert float(rows[300]["step/curvature"]) == pytest.approx(step_taken(300)["step/curvature"])
    assert rows[UPHILL]["step/edge_ratio"] == ""


def test_the_sentence_says_what_the_step_did(tab):
    tab.choose(2)
    assert "lowered the loss by 0.0154, 30 % of what its gradient promised." in tab.find("#words").inner_text()
    tab.choose(9)
    assert "raised the loss by 0.00199." in tab.find("#words").inner_text()


# The noise


def test_the_noise_has_its_error_and_a_logarithmic_axis(tab):
    card = tab.card("noise")
    assert card.locator("h3").inner_text() == "Noise of the gradient"
    assert "noise scale, in examples" in card.locator(".axes text.label").all_text_contents()
    ticks = card.locator(".axes text[text-anchor=end]").all()
    values = [float(tick.text_content().replace(",", "")) for tick in ticks]
    heights = [float(tick.get_attribute("y")) for tick in ticks]
    slopes = {round((heights[i] - heights[0]) / math.log(values[i] / values[0])) for i in range(1, len(values))}
    assert len(slopes) == 1
    # Three areas: the one of step 400 is withheld, and that of 800 failed.
    assert card.locator(".band").count() == 3
    tab.hover(card.locator(".hit"), at_step(200), 0.5)
    value = noise(200)
    assert (
        f"{value['noise/scale']:.0f} ({value['noise/scale_low']:.0f} to {value['noise/scale_high']:.0f})" in tab.tip()
    )
    tab.hover(card.locator(".hit"), at_step(500), 0.5)
    assert f"outside of the top space\n{noise(500)['noise/scale_bulk']:.0f}\n" in tab.tip()
    # What is looked for at every fifth probe is no gap at the others; the probe of step 800 failed.
    dashed = card.locator(".series path[stroke-dasharray='5 3']").get_attribute("d")
    assert (dashed.count("M"), dashed.count("L")) == (2, 1)


def test_noise_that_a_small_sample_does_not_show_is_withheld(tab):
    card = tab.card("noise")
    [mark] = card.locator(".mark").all()
    tab.hover(mark)
    assert tab.tip().startswith(f"a · step {TOO_SMALL} · withheld")
    assert "the sample of 512 examples is too small to tell the gradient from its noise; it is above 123" in tab.tip()
    assert "1 withheld" in card.locator(".note").inner_text()
    tab.hover(card.locator(".hit"), at_step(TOO_SMALL), 0.5)
    assert "withheld, above 123" in tab.tip()
    assert tab.tip().count("\N{EN DASH}") == 2  # which were not looked for


# The layers


def lengths(card, share):
    return [float(bar.get_attribute("width")) for bar in card.locator(f".bar.{share}").all()]


def test_bars_are_the_shares_of_the_groups_at_the_chosen_step(tab):
    card = tab.card("layers")
    for index, step in ((0, 0), (5, 500)):
        tab.choose(index)
        assert card.locator("h3").inner_text() == f"Layers at step {step}"
        expected = layers(step)
        unit = lengths(card, "participation")[0] / expected["participation"][0]
        for share in ("participation", "gradient", "update"):
            assert lengths(card, share) == pytest.approx([unit * value for value in expected[share]], rel=5e-3)
        zero = float(card.locator(".bar").first.get_attribute("x"))
        ticks = [float(tick.get_attribute("x1")) - zero for tick in card.locator(".null").all()]
        assert ticks == pytest.approx([unit * size for size in SIZES], rel=5e-3)
        sharp = [float(text) for text in card.locator(".sharpness").all_text_contents()]
        assert sharp == [pytest.approx(value, rel=5e-3) for value in expected["block_sharpness"] if value is not None]
    names = card.locator("text.row title").all_text_contents()
    assert names == GROUPS * 2  # beside the bars and beside the map
    tab.hover(card.locator("svg[role=img]").first.locator(".hit").nth(4), 0.5, 0.5)
    assert tab.tip().startswith(GROUPS[4])
    assert "largest eigenvalue of its block" in tab.tip()


def test_the_map_has_the_part_of_each_group_at_each_step(tab):
    hit = tab.card("layers").locator("svg[role=img]").last.locator(".hit")
    for step in (0, 200, 1000):
        for g, group in enumerate(GROUPS):
            tab.hover(hit, at_step(step), (g + 0.5) / len(GROUPS))
            title, _, value = tab.tip().split("\n")
            assert title == f"step {step:,} · {group}"
            assert float(value) == pytest.approx(layers(step)["participation"][g], rel=1e-2)
    colours = hit.evaluate(
        """async (hit) => {
          const image = new Image();
          image.src = hit.ownerSVGElement.querySelector('image').getAttribute('href');
          await image.decode();
          const canvas = document.createElement('canvas');
          [canvas.width, canvas.height] = [image.width, image.height];
          const context = canvas.getContext('2d', { willReadFrequently: true });
          context.drawImage(image, 0, 0);
          const at = (part, row) => [...context.getImageData(part * image.width, row, 1, 1).data];
          return [at(0.02, 0), at(0.02, 1), at(0.98, 4)];
        }"""
    )
    assert colours[0] == [253, 231, 37, 255]  # the largest of all: the end of the colours
    assert colours[1][2] > colours[1][0]  # nearly nothing: dark and blue
    assert colours[2][0] > 150  # the last group at the end
    tab.page.mouse.click(*tab.place(hit, at_step(300), 0.5))
    tab.drawn()
    assert tab.steps().startswith("300 ")


def test_shares_of_layers_are_chosen_and_the_address_keeps_them(tab, opened):
    card = tab.card("layers")
    card.locator(".chip", has_text="update").click()
    assert card.locator(".bar.update").count() == 0
    other = opened(tab.page.url).card("layers")
    assert other.locator(".bar").count() == 2 * len(GROUPS)
    rows = [row for row in tab.table(card) if row["step"] == "200"]
    assert [float(row["participation"]) for row in rows] == pytest.approx(layers(200)["participation"], rel=1e-2)
    assert [row["group"] for row in rows] == GROUPS


def test_many_groups_of_long_names_have_a_row_each(tmp_path, opened):
    groups = [f"transformer.layers.{i}.self_attention.{part}.weight" for i in range(12) for part in ("qkv", "out")]
    probes = written(STEPS, rich=True)
    for probe in probes:
        if "layers" in probe:
            probe["layers"] = {"groups": groups, "participation": [1 / 24] * 24, "null": [1 / 24] * 24}
    tab = opened(write_page(tmp_path, of_one_monitor({"a": probes})))
    tab.shot("layers_24")
    names = tab.card("layers").locator("svg[role=img]").first.locator("text.row").all()
    tops = [name.bounding_box() for name in names]
    assert len(tops) == 24
    assert all(one["y"] + 11 <= other["y"] for one, other in pairwise(tops))
    assert len({name.locator("title").text_content() for name in names}) == 24
    assert all("\N{HORIZONTAL ELLIPSIS}" in name.text_content() for name in names)


def test_without_these_numbers_there_are_no_such_panels(tmp_path, opened):
    tab = opened(write_page(tmp_path, of_one_monitor({"a": written(STEPS)})))
    for name in ("taken", "noise", "layers", "projection"):
        assert not tab.card(name).is_visible()


# Projections


def test_a_run_of_a_projection_is_shown(tmp_path, opened):
    runs = {"bulk": projected(STEPS, chi_until=300), "top": projected(STEPS, "top")}
    tab = opened(write_page(tmp_path, of_one_monitor(runs, "projection")))
    tab.shot("projection")
    card = tab.card("projection")
    said = card.locator(".note").inner_text()
    assert "bulk: only what lies outside of the 10 sharpest directions is kept" in said
    assert "top: only what lies in the 10 sharpest directions is kept" in said
    tab.hover(card.locator(".hit"), at_step(200), 0.5)
    assert "0.88" in tab.tip()
    assert "0.2" in tab.tip()
    for name in ("eigenvalues", "spectrum", "shares", "survival", "overlaps", "others", "taken"):
        assert not tab.card(name).is_visible()
    assert tab.find("#words").inner_text() == (
        "bulk, step 1,000: 80 % of the step was taken away: "
        "only what lies outside of the 10 sharpest directions is kept."
    )
    assert "10 of 1,930 directions, steps keep the bulk" in tab.card("costs").inner_text()
    assert not tab.find("label", has_text="log eigenvalues").is_visible()
    assert [float(row["removed"]) for row in tab.table(card) if row["run"] == "top"] == [
        0.9 - s / 10_000 for s in STEPS
    ]


def test_a_step_at_which_a_projection_found_no_space_has_a_mark_and_its_reason(tmp_path, opened):
    run = projected(STEPS)
    run[3]["reason"] = run[-1]["reason"] = "RuntimeError: no second derivative"
    tab = opened(write_page(tmp_path, of_one_monitor({"bulk": run}, "projection")))
    card = tab.card("projection")
    marks = card.locator(".mark.withheld")
    assert marks.count() == 2
    assert "no new space" in card.locator(".note").inner_text()
    marks.first.focus()
    tab.shot("projection_lack")
    assert tab.tip().split("\n")[:2] == [f"bulk · step {STEPS[3]} · no new space", "RuntimeError: no second derivative"]
    assert (
        tab.find("#words")
        .inner_text()
        .startswith("step 1,000: no new space: RuntimeError: no second derivative. 80 % of the step was taken away")
    )
    told = {float(row["step"]): row["reason"] for row in tab.table(card) if row["reason"]}
    assert told == dict.fromkeys((STEPS[3], STEPS[-1]), "RuntimeError: no second derivative")


def test_beside_a_monitor_its_projection_can_be_chosen(tmp_path, opened):
    run = {"projection/probes": projected(STEPS), "subspace/probes": written(STEPS)}
    tab = opened(write_page(tmp_path, {"a": run}))
    assert tab.card("spectrum").is_visible()  # the monitor comes first
    tab.find("select[aria-label=monitor]").select_option("projection/probes")
    assert tab.card("projection").is_visible()
    assert not tab.card("spectrum").is_visible()
    assert opened(tab.page.url).card("projection").is_visible()


# What a file of a drawing holds


ALL = (
    "eigenvalues",
    "spectrum",
    "shares",
    "survival",
    "overlaps",
    "taken",
    "noise",
    "layers",
    "others",
    "at_loss",
    "density",
)


@pytest.mark.parametrize("scheme", usual(["light"], thorough=["dark"]))  # `test_in_the_dark` has one in the dark
def test_a_drawing_alone_says_what_it_shows(tmp_path, opened, browser, scheme):
    runs = {name: written(STEPS, scale, rich=True, density=True) for name, scale in (("first", 1.0), ("other", 3.0))}
    tab = opened(write_page(tmp_path, of_one_monitor(runs)), color_scheme=scheme)
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    for name in ALL:
        card = tab.card(name)
        title, (file, text) = card.locator("h3").inner_text(), tab.download(card, "SVG")
        assert file == f"subspace_{name}.svg"
        assert "var(--" not in text
        assert min(map(float, re.findall(r"font-size: ?([\d.]+)px", text))) >= 11
        page.set_content(text)
        if name in ("taken", "layers"):
            page.screenshot(path=tmp_path / f"{name}.png")
        texts = page.locator("svg text").all_text_contents()
        assert texts[0] == title
        expected = {"step"} if name not in ("spectrum", "at_loss", "density", "layers") else set()
        if name not in ("density", "layers"):
            expected |= {"first", "other"}
        assert expected <= set(texts)
        assert not re.search(r'class="(cursor|hit|zoom|cross|chosen)"', text)
        # All of it lies within the drawing, and no two lines of the legend meet.
        outside = page.evaluate(
            "() => { const s = document.querySelector('svg').getBoundingClientRect();"
            " return [...document.querySelectorAll('svg text')].filter(t => { const r = t.getBoundingClientRect();"
            " return r.width && (r.left < s.left || r.right > s.right + 1 || r.top < s.top || r.bottom > s.bottom); })"
            ".map(t => t.textContent); }"
        )
        assert outside == []
        back, ink = page.evaluate(
            "() => ['svg > rect', 'svg > text'].map(s => getComputedStyle(document.querySelector(s)).fill)"
        )
        light = sum(map(int, re.findall(r"\d+", back))), sum(map(int, re.findall(r"\d+", ink)))
        assert (light[0] - light[1] > 400) if scheme == "light" else (light[1] - light[0] > 400)
    page.close()


def test_a_drawing_of_one_run_names_it_and_its_lines(tab):
    text = tab.download(tab.card("eigenvalues"), "SVG")[1]
    for word in ("a: Eigenvalues of the Hessian", "λ₁", "λ₄", "λ₅, estimated", "threshold of stability"):
        assert f">{word}</text>" in text
    text = tab.download(tab.card("shares"), "SVG")[1]
    for word in ("gradient", "update", "k/n, chance", "▲ 1 undetermined", "✕ 1 unconverged", "■ 1 failed"):
        assert f">{word}</text>" in text


# What was zoomed to


def test_values_that_were_zoomed_to_are_in_the_address(tab, opened):
    panels = ("eigenvalues", "spectrum", "at_loss", "shares", "taken")
    for name in panels:
        tab.drag(tab.card(name).locator(".hit").first, (0.2, 0.3), (0.8, 0.7))
        tab.drawn()
    other = opened(tab.page.url)
    for name in panels:
        ticks, whole = (
            [text.text_content() for text in one.card(name).locator(".axes text").all()] for one in (tab, other)
        )
        assert ticks == whole
    axes = re.findall(r"zoom=(\w+)(?:%3A|:)", tab.page.url)
    assert sorted(axes) == sorted([*panels, "training_loss"])
    other.card("eigenvalues").locator(".hit").dblclick()
    assert "eigenvalues" not in re.findall(r"zoom=(\w+)", other.page.url)
    other.find("text=show all").click()
    assert "zoom=" not in other.page.url
    assert "range=" not in other.page.url
    assert not other.find("text=show all").is_visible()
