"""States of the page that two plain runs do not show: other spaces, many probes, darkness, and a run that goes on."""

import html
import math
import re
import shutil
import time

import pytest

from tests.tensorboard_tab.browser import FRAME, Tab, at_step, of_one_monitor, write_page, written
from tests.tensorboard_tab.runs import K, write
from tests.tensorboard_tab.server import ROOT, Server
from tests.thorough import usual

STEPS = range(0, 1100, 100)


@pytest.fixture
def alone(tmp_path, opened):
    """Opens a page that stands alone, of runs of one monitor."""
    return lambda runs, title="runs", **options: opened(write_page(tmp_path, of_one_monitor(runs), title), **options)


def changed(probes, change):
    """Probes with a change made to each that has eigenvalues."""
    return [probe | change(probe) if "eigenvalues" in probe else probe for probe in probes]


def test_without_a_space_its_panels_are_hidden(alone):
    numbers = [{"v": 1, "step": step, "metrics": {"gradient_norm": 1.0 + step}} for step in STEPS]
    numbers[0]["run"] = {"k": 0, "n": 1930, "optimizer": "SGD"}
    tab = alone({"a": numbers})
    tab.shot("no_space")
    for name in ("eigenvalues", "spectrum", "shares", "survival", "overlaps"):
        assert not tab.card(name).is_visible()
    for name in ("others", "costs"):
        assert tab.card(name).is_visible()
    assert not tab.find("#count").is_visible()
    assert [float(row["gradient_norm"]) for row in tab.table(tab.card("others"))] == [1.0 + step for step in STEPS]


def test_negative_eigenvalues_are_drawn_on_both_sides_of_zero(alone):
    tab = alone({"a": changed(written(STEPS), lambda probe: {"eigenvalues": [300.0, 2.0, -1.0, -40.0], "next": -50.0})})
    tab.shot("negative")
    labels = tab.card("eigenvalues").locator(".axes text[text-anchor=end]").all_text_contents()
    values = [float(label) for label in labels]
    assert min(values) < 0 < max(values)
    assert 0 in values
    hit, found = tab.card("eigenvalues").locator(".hit"), set()
    for height in range(2, 99, 8):
        tab.hover(hit, at_step(500), height / 100)
        found.add(tab.find(".strong .tip-value").inner_text().split(" ± ")[0])
    assert found == {"300", "2", "-1", "-40"}
    stems = tab.card("spectrum").locator(".stems circle").all()
    heights = [float(stem.get_attribute("cy")) for stem in stems]
    assert heights == sorted(heights)


def test_the_legend_names_the_eigenvalues_that_are_drawn_and_no_others(alone):
    first, some = written(STEPS), {"eigenvalues": [3.0, 2.0, None, None], "next": None}
    odd = [probe | ({"next": 0.5} if i == 3 else {}) for i, probe in enumerate(changed(first, lambda _: some))]
    tab = alone({"all": first, "two": changed(first, lambda _: some), "once": odd})
    entries = tab.card("eigenvalues").locator(".key")
    for run, names in {
        "all": ["λ₁", "λ₄", "λ₅, estimated"],
        "two": ["λ₁", "λ₂"],
        "once": ["λ₁", "λ₂", "λ₅, estimated"],
    }.items():
        tab.only(run)
        assert [text for text in entries.all_inner_texts() if "λ" in text] == names, run


def test_residuals_above_their_eigenvalues_and_zeros_are_drawn(alone):
    edge = {"eigenvalues": [3.0, 1e-9, 0.0, None], "residuals": [5.0, 1.0, 0.5, 0.1]}
    tab = alone({"a": changed(written(STEPS), lambda probe: edge), "b": written(STEPS)})
    tab.only("a")
    tab.choose(5)
    tab.hover(tab.card("spectrum").locator(".hit"), 0.3, 0.5)
    assert "± " in tab.tip()


def test_two_runs_of_different_k(alone):
    tab = alone({"few": written(STEPS, k=2), "many": written(STEPS, k=12)})
    tab.shot("different_k")
    tab.find("#count").evaluate("e => { e.value = 12; e.dispatchEvent(new Event('input')); }")
    assert tab.card("eigenvalues").locator(".series").count() >= 2 + 12
    tab.hover(tab.card("spectrum").locator(".hit"), 0.9, 0.5)
    assert "\N{EN DASH}" in tab.tip()  # one of the two has no such index
    first = tab.find("#words").inner_text()
    tab.find(".run", has_text="many").locator(".name").click()
    assert "in the 12 sharpest directions" in tab.find("#words").inner_text() != first


def test_a_single_probe_is_drawn(alone):
    tab = alone({"a": written([0])})
    tab.shot("single")
    assert tab.steps() == "0 (1 of 1)"
    assert "no two spaces to compare yet" in tab.card("overlaps").inner_text()


@pytest.mark.parametrize("frame", usual(["sandbox='allow-scripts' src", "srcdoc"], thorough=["src"]))
def test_a_page_that_stands_alone_works_in_a_frame_of_another(tmp_path, opened, browser, frame):
    """As it does in a notebook, or in a viewer of artefacts."""
    address = write_page(tmp_path, of_one_monitor({"a": written(STEPS)}))
    value = html.escape((tmp_path / "runs.html").read_text()) if frame == "srcdoc" else address
    (tmp_path / "outer.html").write_text(f'<iframe width="1000" height="900" {frame}="{value}"></iframe>')
    tab = Tab(browser, (tmp_path / "outer.html").as_uri())
    try:
        inside = tab.page.frame_locator("iframe")
        inside.locator("body[data-ready]").wait_for()
        inside.locator(".shares .hit").click()
        inside.locator("h3", has_text="Spectrum at step 500").wait_for()
        assert tab.said == []
    finally:
        tab.close()


def test_one_of_several_monitors_is_chosen(tmp_path, opened):
    runs = {"a": {"first/probes": written(STEPS), "second/probes": written(STEPS[:3], 5.0)}}
    tab = opened(write_page(tmp_path, runs))
    assert tab.steps() == "1,000 (11 of 11)"
    tab.find("select[aria-label=monitor]").select_option("second/probes")
    assert tab.steps() == "200 (3 of 3)"
    assert opened(tab.page.url).steps() == "200 (3 of 3)"


def test_names_of_any_kind(alone, opened):
    names = ["lr=0.1,wd=0", "a&b=c#d", "<b>λ</b>", "../up", "a b"]
    tab = alone({name: written(STEPS) for name in names})
    tab.find("input[aria-label='show lr=0.1,wd=0']").uncheck()
    tab.find("input[aria-label='show a&b=c#d']").uncheck()
    assert sorted(tab.find(".run .name").all_inner_texts()) == sorted(names)
    other = opened(tab.page.url)
    checked = [box.is_checked() for box in other.find(".run input").all()]
    assert checked == [name not in names[:2] for name in other.find(".run .name").all_inner_texts()]
    tab.find("input[aria-label='show a b']").uncheck()
    assert tab.find("input[aria-label='show a b']").evaluate("e => e === document.activeElement")
    assert {row["run"] for row in tab.table(tab.card("eigenvalues"))} == {"<b>λ</b>", "../up"}


def test_with_no_run_shown_the_page_says_what_to_do(alone):
    tab = alone({"a": written(STEPS)})
    tab.find(".run input").uncheck()
    assert "No run is shown" in tab.find(".empty").inner_text()
    assert not tab.find("#grid").is_visible()
    tab.find(".run input").check()
    assert tab.card("spectrum").is_visible()


def test_without_probes_the_page_says_what_to_do(alone):
    tab = alone({})
    tab.shot("empty")
    assert "SubspaceMonitor()" in tab.find(".empty").inner_text()


def test_probes_of_a_newer_version_are_told(alone):
    tab = alone({"a": [*written(STEPS), {"v": 2, "step": 2000}]})
    assert "newer version" in tab.find("#side").inner_text()
    assert tab.steps() == "1,000 (11 of 11)"


def test_in_the_dark(alone):
    tab = alone({"a": written(STEPS, density=True)}, color_scheme="dark")
    tab.shot("dark")
    assert tab.find("html.dark").count() == 1
    back, ink = (tab.find("body").evaluate(f"e => getComputedStyle(e).{name}") for name in ("backgroundColor", "color"))
    assert (back, ink) == ("rgb(48, 48, 48)", "rgb(255, 255, 255)")
    text = tab.download(tab.card("eigenvalues"), "SVG")[1]
    assert "fill:rgb(66, 66, 66)" in text.replace("fill: ", "fill:")  # behind light text


def test_three_long_runs_are_drawn(alone):
    runs = {f"run {i}": written(range(0, 10_000, 10), 1.0 + i, complete=True) for i in range(3)}
    begin = time.monotonic()
    tab = alone(runs)
    assert time.monotonic() - begin < 20  # 2 s on a quiet machine
    tab.shot("long")
    assert tab.steps() == "9,990 (1,000 of 1,000)"
    tab.choose(500)
    assert tab.card("spectrum").locator("h3").inner_text() == "Spectrum at step 5,000"
    title = tab.card("overlaps").locator("h3").inner_text()
    assert re.fullmatch(r"Overlaps between \d\d of 1,000 probes", title)


def test_more_values_than_a_call_takes_arguments_are_drawn(alone):
    """10,000 probes of 20 eigenvalues; the overlaps, which are most of the bytes, are left out."""
    many = []
    for step in range(10_000):
        values = [math.exp(-i - step / 1e4) for i in range(20)]
        many.append({"v": 1, "step": step, "outcome": "CONVERGED", "trusted": False, "eigenvalues": values})
        many[-1] |= {"residuals": [1e-6] * 20, "threshold": 1e6, "metrics": {"sharpness": values[0]}}
    tab = alone({"a": many})
    tab.find("#count").evaluate("e => { e.value = 20; e.dispatchEvent(new Event('input')); }")
    assert "beyond the axis" in tab.card("eigenvalues").locator(".note").inner_text()


def see_new_probes(folder, opened, root=ROOT, patience=None):
    """A page that is open shows what a run writes; a page that is at an earlier step stays there."""
    writer = write(folder / "logs" / "live", STEPS[:2])
    server = Server(folder / "logs", root=root)
    try:
        stays, follows = (opened(f"{server.url}/#lightning_subspace") for _ in range(2))
        if patience:
            follows.page.set_default_timeout(patience)
        for tab in (stays, follows):
            assert tab.steps() == "100 (2 of 2)"
            tab.find("body").evaluate("() => { window.mark = 1; }")
        stays.choose(0)
        write(None, STEPS[2:5], writer=writer, header=False)
        server.wait_for(lambda: len(server.probes("live")) == 5)
        for tab in (follows, stays):
            tab.page.locator("app-header-reload button, button[title^='Reload']").first.click()
            tab.find("#at", has_text="of 5)").wait_for()
        assert (follows.steps(), stays.steps()) == ("400 (5 of 5)", "0 (1 of 5)")
        assert [tab.find("body").evaluate("() => window.mark") for tab in (stays, follows)] == [1, 1]
        # Another run that begins is listed, too.
        write(folder / "logs" / "later", STEPS).close()
        server.wait_for(lambda: "later" in server.runs())
        # It waits for a drag that is being made, which the page would lose.
        hit = stays.card("eigenvalues").locator(".hit")
        stays.page.mouse.move(*stays.place(hit, 0.2, 0.5))
        stays.page.mouse.down()
        with stays.page.expect_response(lambda answer: "run=later" in answer.url):
            stays.page.locator("app-header-reload button, button[title^='Reload']").first.evaluate("e => e.click()")
        stays.drawn()
        assert stays.find(".run", has_text="later").count() == 0
        stays.page.mouse.move(*stays.place(hit, 0.8, 0.5), steps=3)
        stays.page.mouse.up()
        stays.find(".run", has_text="later").wait_for()
        assert stays.find("text=show all").is_visible()
    finally:
        writer.close()
        server.close()


def test_a_page_that_is_open_shows_what_a_run_writes(tmp_path, opened):
    see_new_probes(tmp_path, opened)


def broken_copy(folder, name, old, new):
    """A copy of the package with another text in one of the page's files; where it is imported from."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_subspace", folder / "copy" / "lightning_subspace", ignore=ignored)
    file = folder / "copy" / "lightning_subspace" / "tensorboard_tab" / "static" / name
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    return folder / "copy"


@pytest.mark.thorough  # of the tests, as the next one
def test_broken_on_purpose_without_the_message_of_a_reload(tmp_path, opened):
    copy = broken_copy(tmp_path, "host.js", "if (message.type === 'experimental.DataReloaded') onReload();", "")
    with pytest.raises(Exception, match="Timeout"):
        see_new_probes(tmp_path, opened, copy, patience=4_000)


@pytest.mark.thorough
def test_broken_on_purpose_with_a_script_from_elsewhere(tmp_path, browser):
    first = "import { connect, onDark } from './host.js';"
    copy = broken_copy(tmp_path, "index.js", first, f"import 'https://cdn.example/plot.js';\n{first}")
    write(tmp_path / "logs" / "a", STEPS).close()
    server = Server(tmp_path / "logs", root=copy)
    tab = Tab(browser, f"{server.url}/#lightning_subspace")
    try:
        tab.page.wait_for_selector(FRAME)
        end = time.monotonic() + 20
        while not tab.said and time.monotonic() < end:
            tab.page.wait_for_timeout(100)
        assert any("cdn.example" in text for text in tab.said)
        assert tab.find("body[data-ready]").count() == 0
    finally:
        tab.close()
        server.close()


def test_behind_a_prefix_of_its_address_runs_have_the_colours_and_the_darkness_of_tensorboard(tmp_path, browser):
    """Also where their names are in another order than their first events, and one is not ours."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for number, name in enumerate(("zeta", "foreign", "mid", "alpha")):
        writer = EventFileWriter(str(tmp_path / "logs" / name))
        scalar = Summary(value=[Summary.Value(tag="loss", simple_value=1.0)])
        writer.add_event(Event(wall_time=1e9 + number, step=0, summary=scalar))
        if name != "foreign":
            write(None, STEPS, writer=writer, start=1e9 + number)
        writer.close()
    server = Server(tmp_path / "logs", prefix="/board")
    try:
        server.wait_for(lambda: len(server.runs()) == 3)
        tab = Tab(browser, f"{server.url}/?darkMode=true#lightning_subspace").wait()
        assert tab.steps() == "1,000 (11 of 11)"
        assert tab.find("html.dark").count() == 1
        names, dots = tab.find(".run .name").all_inner_texts(), tab.find(".run .dot").all()
        ours = {n: d.evaluate("e => getComputedStyle(e).backgroundColor") for n, d in zip(names, dots, strict=True)}
        tab.close()
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{server.url}/?darkMode=true#timeseries")
        page.wait_for_selector("button.run-color-swatch")
        theirs = page.evaluate(
            "() => Object.fromEntries([...document.querySelectorAll('button.run-color-swatch')].map(e => "
            "[e.closest('[role=row], tb-data-table-content-row, tr').innerText.trim().split('\\n')[0], "
            "getComputedStyle(e).backgroundColor]))"
        )
        page.close()
        assert len(set(ours.values())) == 3
        assert ours == {name: theirs[name] for name in ours}
    finally:
        server.close()


def test_the_eigenvalues_of_all_runs_are_those_that_were_written(alone):
    tab = alone({"a": written(STEPS, 7.0, complete=True)})
    rows = tab.table(tab.card("eigenvalues"))
    expected = [[7.0 * math.exp(-step / 10_000) * (K - i) for i in range(K)] for step in STEPS]
    found = [[float(row[f"eigenvalue {i + 1}"]) for i in range(K)] for row in rows]
    assert found == [pytest.approx(row, rel=1e-5) for row in expected]
