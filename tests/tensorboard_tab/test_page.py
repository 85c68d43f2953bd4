"""The page in a browser: within a TensorBoard, and as a file of its own."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tests.tensorboard_tab.browser import FRAME, Tab, at_step, of_one_monitor, write_page, written
from tests.tensorboard_tab.runs import FAILED, REASON, UNCONVERGED, WITHHELD, K, write
from tests.tensorboard_tab.server import Server
from tests.thorough import IS_THOROUGH, usual

STEPS = range(0, 1100, 100)
SCALES = {"a": 1.0, "b": 3.0}
STATES = {WITHHELD: ("undetermined", REASON), UNCONVERGED: ("unconverged", "20 products did not suffice")}
STATES[FAILED] = ("failed", "RuntimeError: no second derivative")


def eigenvalue(step, index, scale=1.0):
    """Of index 1 to K, see `runs.probes`."""
    return scale * math.exp(-step / 10_000) * (K + 1 - index)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """Of the same two runs in a TensorBoard, and in a page that stands alone."""
    folder = tmp_path_factory.mktemp("page")
    for name, scale in SCALES.items():
        write(folder / "logs" / name, STEPS, scale, density=True).close()
    alone = write_page(folder, of_one_monitor({n: written(STEPS, s, density=True) for n, s in SCALES.items()}))
    server = Server(folder / "logs")
    server.wait_for(lambda: server.runs().keys() == SCALES.keys())
    yield {"tensorboard": f"{server.url}/#lightning_subspace", "file": alone}
    server.close()


# What is drawn is the same in both, as tables of the same numbers are: the file opens in a third of the time.
@pytest.fixture(params=usual(["file"], thorough=["tensorboard"]))
def tab(request, addresses, opened):
    return opened(addresses[request.param])


# Addresses go through the frame of TensorBoard, or do not; so do keys and files, see `test_the_same_numbers_in_both`.
in_both = pytest.mark.parametrize("tab", ["tensorboard", "file"], indirect=True)


def test_there_is_a_line_for_each_eigenvalue_and_the_hover_names_it(tab):
    tab.shot(f"two_runs_{'file' if tab.is_alone else 'tensorboard'}")
    tab.only("a")
    card = tab.card("eigenvalues")
    assert card.locator(".series").count() == K + 2  # the next one, and the threshold
    hit, found = card.locator(".hit"), set()
    for height in range(2, 99, 3 if IS_THOROUGH else 6):
        tab.hover(hit, at_step(500), height / 100)
        index = int(re.fullmatch(r"step 500 · index (\d)", tab.find(".tip-title").inner_text())[1])
        value, residual = tab.find(".strong .tip-value").inner_text().split(" ± ")
        assert float(value) == pytest.approx(eigenvalue(500, index), rel=1e-3)
        assert float(residual) == pytest.approx(1e-3 * eigenvalue(500, K), rel=1e-2)
        found.add(index)
    assert found == set(range(1, K + 1))
    tab.shot("hover")


def test_a_line_has_a_gap_where_a_value_is_missing(tab):
    tab.only("a")
    [first] = tab.card("eigenvalues").locator(".series").nth(K).locator("path[fill=none]").all()
    # Of eleven probes one has not converged and one has failed: 0 to 500, 700, 900 and 1,000.
    assert first.get_attribute("d").count("M") == 3


def test_the_slider_and_the_keyboard_move_all_panels(tab):
    tab.only("b")
    tab.choose(7)
    assert tab.card("spectrum").locator("h3").inner_text() == "Spectrum at step 700"
    assert tab.card("survival").locator("h3").inner_text() == "Overlap with the space of step 700"
    assert (
        tab.find("#words").inner_text().startswith("step 700: 70 % of the gradient lies in the 4 sharpest directions")
    )
    assert tab.card("spectrum").locator(".gap").count() == 1  # the next eigenvalue is known at odd probes
    cursors = tab.find(".cursor").all()
    assert len(cursors) >= 3
    assert len({cursor.evaluate("e => (e.getBoundingClientRect().x - "
                                "e.ownerSVGElement.getBoundingClientRect().x - 58) / "
                                "(e.ownerSVGElement.getBoundingClientRect().width - 72)").__round__(2)
                for cursor in cursors}) == 1  # fmt: skip
    tab.find("#main").click(position={"x": 3, "y": 900})  # to where the keys go
    tab.press("ArrowLeft")
    assert tab.steps() == "600 (7 of 11)"
    assert "did not converge" in tab.card("spectrum").locator(".note").inner_text()
    tab.press("End")
    assert tab.steps() == "1,000 (11 of 11)"
    tab.press("Home")
    assert tab.steps() == "0 (1 of 11)"
    tab.press("PageUp")
    assert tab.steps() == "1,000 (11 of 11)"


def test_a_click_chooses_the_step(tab):
    tab.page.mouse.click(*tab.place(tab.card("shares").locator(".hit"), at_step(420), 0.5))
    tab.drawn()
    assert tab.steps() == "400 (5 of 11)"
    maps = tab.card("overlaps").locator(".hit")
    assert maps.count() == 2
    tab.page.mouse.click(*tab.place(maps.first, 0.99, 0.01))
    tab.drawn()
    assert tab.steps() == "1,000 (11 of 11)"


def test_a_probe_that_left_something_out_says_why(tab):
    tab.only("a")
    for step, (state, reason) in STATES.items():
        [mark] = tab.card("shares").locator(f".mark.{state}").all()
        tab.hover(mark)
        assert reason in tab.tip()
        assert tab.tip().startswith(f"a · step {step} · {state}")
        tab.shot(f"mark_{state}")
        tab.hover(tab.find("#words"))
        mark.focus()  # as the keyboard does
        assert reason in tab.tip()
        assert f"1 {state}" in tab.card("costs").inner_text()
        assert f"1 {state}" in tab.card("shares").locator(".note").inner_text()
        tab.choose(list(STEPS).index(step))
        assert reason in tab.find("#words").inner_text()


def test_overlaps_are_read_from_the_map(tab):
    tab.only("b")
    hit = tab.card("overlaps").locator(".hit")
    fine = [step for step in STEPS if step not in STATES]
    side = len(fine)
    for i, j in ((0, side - 1), (2, 5), (4, 4)):
        tab.hover(hit, (i + 0.5) / side, 1 - (j + 0.5) / side)
        expected = math.exp(-abs(math.log1p(fine[i]) - math.log1p(fine[j])) / 2)
        title, _, value = tab.tip().split("\n")
        assert title == f"b: step {fine[j]:,} with {fine[i]:,}"
        assert float(value) == pytest.approx(expected, abs=1e-3)


def test_a_drag_zooms_and_a_double_click_resets(tab):
    hit = tab.card("eigenvalues").locator(".hit")
    tab.drag(hit, (at_step(180), 0.5), (at_step(520), 0.5))
    tab.find("text=show all").wait_for()
    ticks = tab.card("shares").locator(".axes text[text-anchor=middle]").all_text_contents()
    assert ticks[:-2] == ["200", "300", "400", "500"]  # in all panels; the last two are the labels of the axes
    low, high = map(float, re.search(r"range=([\d.]+)(?:%2C|,)([\d.]+)", tab.page.url).groups())
    assert (low, high) == (pytest.approx(180, abs=4), pytest.approx(520, abs=4))
    tab.shot("zoomed")
    tab.card("eigenvalues").locator(".hit").dblclick()
    tab.find("text=show all").wait_for(state="hidden")
    assert "range" not in tab.page.url


def test_a_drag_in_both_directions_zooms_values_and_another_scale_forgets_what_it_cannot_show(tab):
    tab.only("a")
    tab.find("label", has_text="log eigenvalues").locator("input").uncheck()
    card = tab.card("eigenvalues")
    tab.drag(card.locator(".hit"), (0.1, 0.4), (0.9, 0.999))
    tab.find("text=show all").wait_for()
    high = float(card.locator(".axes text[text-anchor=end]").last.text_content())
    assert high < 20 * 1.05  # the threshold is no longer within the axis
    tab.find("label", has_text="log eigenvalues").locator("input").check()
    assert card.locator(".series").count() == K + 2


# Tables go through the frame of TensorBoard as files do, see `test_the_same_numbers_in_both`. What all drawings hold is
# read in test_page_panels.py.
def test_a_drawing_is_a_file_that_stands_alone(tab):
    others = ("spectrum", "shares", "survival", "others", "at_loss", "density")
    for name in ("eigenvalues", "overlaps", *(others if tab.is_alone and IS_THOROUGH else ())):
        card = tab.card(name)
        file, text = tab.download(card, "SVG")
        assert file == f"subspace_{name}.svg"
        assert "var(--" not in text
        assert 'class="hit"' not in text
        drawing = ElementTree.fromstring(text)
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        sizes = re.findall(r"font-size: ?([\d.]+)px", text)
        assert sizes
        assert min(map(float, sizes)) >= 11
    assert tab.card("costs").locator(".download").all_inner_texts() == ["CSV"]


def test_a_table_has_the_numbers(tab):
    tab.only("a")
    rows = {int(row["step"]): row for row in tab.table(tab.card("eigenvalues"))}
    assert rows.keys() == set(STEPS)
    for step in set(STEPS) - {UNCONVERGED, FAILED}:
        for index in range(1, K + 1):
            assert float(rows[step][f"eigenvalue {index}"]) == pytest.approx(eigenvalue(step, index), rel=1e-5)
    assert rows[FAILED]["eigenvalue 1"] == ""
    reasons = {int(row["step"]): row["reason"] for row in tab.table(tab.card("shares")) if row["state"] != "fine"}
    assert reasons == {step: reason for step, (_, reason) in STATES.items()}
    assert {row["name"] for row in tab.table(tab.card("costs"))} >= {"probes", "products", "time", "sample"}


@in_both
def test_the_address_holds_the_view_and_another_page_shows_the_same(tab, opened):
    tab.only("b")
    tab.choose(4)
    tab.find("label", has_text="log steps").locator("input").check()
    tab.find("label", has_text="keep scale").locator("input").uncheck()
    tab.find(".chip", has_text="update").click()
    tab.card("others").locator("select").select_option("gradient_norm")
    tab.drag(tab.card("eigenvalues").locator(".hit"), (0.1, 0.5), (0.9, 0.5))
    tab.find("#count").evaluate("e => { e.value = 2; e.dispatchEvent(new Event('input')); }")
    other = opened(tab.page.url)
    for selector in ("#at", "#words", "#bar", "#side", ".others h3", ".shares .note", ".eigenvalues .note"):
        assert other.find(selector).inner_text() == tab.find(selector).inner_text()
    boxes = [[box.is_checked() for box in one.find("input[type=checkbox]").all()] for one in (tab, other)]
    assert boxes[0] == boxes[1] == [False, True, True, True, False]
    assert other.find(".chip.on").all_inner_texts() == tab.find(".chip.on").all_inner_texts() == ["gradient"]
    lines = [one.card("eigenvalues").locator(".series path").first.get_attribute("d") for one in (tab, other)]
    assert lines[0] == lines[1]
    assert other.page.url == tab.page.url


def test_the_slider_of_eigenvalues_can_be_dragged(tab):
    tab.only("a")
    slider = tab.find("#count")
    tab.drag(slider, (0.95, 0.5), (0.4, 0.5))
    assert slider.evaluate("e => e === document.activeElement")
    assert slider.input_value() == "2"
    assert tab.card("eigenvalues").locator(".series").count() == 3  # two, and the threshold
    tab.press("ArrowRight")
    assert slider.input_value() == "3"


def test_text_can_be_read_and_nothing_overlaps(addresses, opened):
    for width in usual([1000, 2500], thorough=[1440]):
        tab = opened(addresses["file"], viewport={"width": width, "height": 1400})
        tab.shot(f"width_{width}")
        sizes = tab.find("body").evaluate(
            "() => [...document.querySelectorAll('body *')].filter(e => e.childNodes.length && "
            "[...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length)"
            ".map(e => [parseFloat(getComputedStyle(e).fontSize), e.textContent])"
        )
        assert [size for size in sizes if size[0] < 11] == []
        assert tab.find("body").evaluate(
            "() => ['html', 'body', '#main'].every(s => { const e = document.querySelector(s);"
            " return e.scrollWidth <= e.clientWidth; })"
        )
        boxes = [card.bounding_box() for card in tab.find(".card").all() if card.is_visible()]
        assert len(boxes) >= 8
        for i, one in enumerate(boxes):
            assert one["x"] + one["width"] <= width
            assert not any(overlap(one, other) for other in boxes[:i])
        # A drawing is not cut by its card, nor a label by its drawing.
        outside = tab.find("body").evaluate(
            "() => [...document.querySelectorAll('.card svg text')].filter(t => { const r = t.getBoundingClientRect(), "
            "s = t.ownerSVGElement.getBoundingClientRect(); return r.width && (r.left < s.left - 1 || "
            "r.right > s.right + 1 || r.top < s.top - 1 || r.bottom > s.bottom + 1); }).map(t => t.textContent)"
        )
        assert outside == []


def overlap(one, other):
    return (
        one["x"] < other["x"] + other["width"]
        and other["x"] < one["x"] + one["width"]
        and one["y"] < other["y"] + other["height"]
        and other["y"] < one["y"] + one["height"]
    )


def test_tensorboard_may_be_in_a_frame_of_another_page(addresses, browser):
    """As a cell of a notebook shows it; test_notebook.py runs one."""
    board = addresses["tensorboard"].partition("#")[0]
    tab = Tab(browser, f"{board}data/plugins_listing")  # any page of the same host, as a file may hold no such frame
    try:
        tab.page.set_content(f'<iframe width="1300" height="1200" src="{board}"></iframe>')
        board = tab.page.frame_locator("iframe")
        board.get_by_role("tab", name="Subspace").click()  # in a frame it does not keep to the address
        inside = board.frame_locator(FRAME)
        inside.locator("body[data-ready]").wait_for()
        assert inside.locator("#at").inner_text() == "1,000 (11 of 11)"
        inside.locator(".shares .hit").click()
        inside.locator("h3", has_text="Spectrum at step 500").wait_for()
    finally:
        tab.close()


def test_a_page_that_stands_alone_asks_for_nothing(addresses, opened):
    tab = opened(addresses["file"])
    tab.only("a")
    tab.choose(3)
    beyond = [url for url in tab.requests if not url.startswith("data:") and url != addresses["file"]]
    assert beyond == []


def test_the_same_numbers_in_both(addresses, opened):
    tables = []
    for address in addresses.values():
        tab = opened(address)
        tables.append({name: tab.table(tab.card(name)) for name in ("eigenvalues", "shares", "overlaps", "others")})
        tab.find("#main").click(position={"x": 3, "y": 900})  # to where the keys go
        tab.press("ArrowLeft")
        assert tab.steps() == "900 (10 of 11)"
    assert tables[0] == tables[1]
    assert json.dumps(tables[0]).count("eigenvalue 1") > 10
