"""A browser, pages of the tab in it, and what a person does there.

Screenshots of the main states go to the folder that SUBSPACE_TAB_SHOTS names, if it names one.
"""

import csv
import io
import os
import re
import shutil
from pathlib import Path

from lightning_subspace.tensorboard_tab.schema import from_json, tag_of, to_json
from lightning_subspace.tensorboard_tab.standalone import page as page_of
from tests.tensorboard_tab.runs import probes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FRAME = "iframe[src*=lightning_subspace]"
PATIENCE = 30_000  # milliseconds, on a machine that has other work
BETWEEN_DOWNLOADS = 110  # milliseconds: Chromium drops what a page saves beyond ten files a second, without a word


def written(*arguments, **options):
    """The probes of `runs.probes` as a page holds them."""
    return [from_json(to_json(probe)) for probe in probes(*arguments, **options)]


def of_one_monitor(runs, name="subspace"):
    return {run: {tag_of(name): found} for run, found in runs.items()}


class Tab:
    """An open page. What the console says is kept in `said`."""

    def __init__(self, browser, address, **options):
        self.said, self.requests = [], []
        self.page = browser.new_page(**{"viewport": {"width": 1440, "height": 2000}, **options})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.is_alone = address.startswith("file:")
        self.page.goto(address)

    def _hear(self, message):
        is_ours = "lightning_subspace" in message.location.get("url", "") or self.is_alone
        if message.type == "error" or (message.type == "warning" and is_ours):
            self.said.append(message.text)

    def wait(self):
        self.find("body[data-ready]").wait_for()
        return self

    @property
    def inside(self):
        return self.page if self.is_alone else self.page.frame_locator(FRAME)

    def find(self, selector, **options):
        return self.inside.locator(selector, **options)

    def card(self, name):
        return self.find(f".card.{name}")

    def steps(self):
        """What the bar says of the step."""
        return self.find("#at").inner_text()

    def tip(self):
        return self.find("#tip").inner_text()

    def only(self, run):
        self.find(".run", has=self.inside.get_by_text(run, exact=True)).dblclick()
        self.find("body[data-ready='1']").wait_for()

    def choose(self, index):
        """Drag the slider to a place."""
        slider = self.find("#step")
        slider.evaluate("(e, i) => { e.value = i; e.dispatchEvent(new Event('input')); }", index)
        self.drawn()

    def press(self, key):
        self.page.keyboard.press(key)
        self.drawn()

    def drawn(self):
        """Wait for the frame in which a step is drawn."""
        wait = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.find("body").evaluate(wait)

    def place(self, target, x, y):
        """Pixels of a place that is given in parts of an element."""
        box = target.bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def hover(self, target, x=0.5, y=0.5):
        self.page.mouse.move(*self.place(target, x, y))

    def drag(self, target, start, end):
        self.page.mouse.move(*self.place(target, *start))
        self.page.mouse.down()
        self.page.mouse.move(*self.place(target, *end), steps=3)
        self.page.mouse.up()

    def download(self, card, kind):
        """The name and the text of a file that a card offers."""
        with self.page.expect_download() as started:
            card.locator(".download", has_text=kind).click()
        download = started.value
        self.page.wait_for_timeout(BETWEEN_DOWNLOADS)
        return download.suggested_filename, Path(download.path()).read_text(encoding="utf-8")

    def table(self, card):
        """The rows of a card's CSV."""
        return list(csv.DictReader(io.StringIO(self.download(card, "CSV")[1], newline="")))

    def shot(self, name):
        folder = os.environ.get("SUBSPACE_TAB_SHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png")

    def close(self):
        self.page.close()


def at_step(step, last=1000):
    """Where a step is in a chart's width: the axis has 2 % of room on both sides."""
    return (step / last + 0.02) / 1.04


def write_page(folder, runs, title="runs", edit=lambda html: html):
    """A page that stands alone; its address."""
    file = folder / f"{re.sub(r'[^a-z]', '_', title)}.html"
    file.write_text(edit(page_of(runs, title)), encoding="utf-8")
    return file.as_uri()
