"""Times of the tab's page in a browser: drawn from nothing, and one step of the slider.

    python -m tests.benchmarks.tab_page [--json tab_page.json]

Pages that stand alone, with every panel: three runs of 1,000 probes and one of 10,000 at k = 10, and one at k = 50, of
which most is loaded. The first time runs from the address to the last panel. A step is what the browser does for it by
Chromium's own counters: the script alone, and all work of the page with layout, styles and painting; medians, and the
largest, over 60 places of the slider. Ends in an error at k = 10 above 2 seconds, or above 25 ms a step. Needs
playwright and a Chromium that is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.tensorboard_tab.browser import CHROMIUM, Tab, of_one_monitor, write_page, written

# Runs, probes of each, and eigenvalues.
PAGES = {
    "3 runs of 1,000 probes": (3, 1_000, 10),
    "1 run of 10,000 probes": (1, 10_000, 10),
    "the same of 50 eigenvalues": (1, 10_000, 50),
}
BOUNDED, PLACES = 10, 60  # eigenvalues up to which the bounds hold; places of the slider
MOST_COLD, MOST_STEP = 2.0, 0.025  # seconds


class Counters:
    """Seconds that a page has worked, as the browser counts them."""

    def __init__(self, tab: Tab) -> None:
        self._session = tab.page.context.new_cdp_session(tab.page)
        self._session.send("Performance.enable")

    def read(self) -> tuple[float, float]:
        """Of the script alone, and of everything."""
        found = {item["name"]: item["value"] for item in self._session.send("Performance.getMetrics")["metrics"]}
        return found["ScriptDuration"], found["TaskDuration"]


def steps_of(tab: Tab) -> list[tuple[float, float]]:
    """Seconds of script, and of all work, at places all over the slider."""
    counters, last = Counters(tab), int(tab.find("#step").get_attribute("max"))
    taken = []
    for place in range(PLACES):
        before = counters.read()
        tab.choose(round(last * (place * 37 % PLACES) / PLACES))  # not in order: as somebody who searches
        after = counters.read()
        taken.append((after[0] - before[0], after[1] - before[1]))
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="the rows")
    asked = parser.parse_args()
    if CHROMIUM is None:
        print("no Chromium is installed; on Debian: apt install chromium")
        return 2
    from playwright.sync_api import sync_playwright

    failed, rows = False, []
    print("| runs | MB | drawn from nothing | script of a step | all work of a step | largest |")
    print("| --- | --- | --- | --- | --- | --- |")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for title, (runs, probes, k) in PAGES.items():
            held = {str(i): written(range(probes), 1 + i / 5, k, complete=True, rich=True) for i in range(runs)}
            address = write_page(Path(folder), of_one_monitor(held), title)
            begin = time.perf_counter()
            tab = Tab(browser, address).wait()
            cold = time.perf_counter() - begin
            script, work = zip(*steps_of(tab), strict=True)
            size = Path(address.removeprefix("file://")).stat().st_size / 1e6
            medians = [statistics.median(times) for times in (script, work)]
            shown = " | ".join(f"{1e3 * value:.0f} ms" for value in (*medians, max(work)))
            print(f"| {title} | {size:.0f} | {cold:.1f} s | {shown} |")
            failed |= bool(tab.said) or (k <= BOUNDED and (cold > MOST_COLD or medians[1] > MOST_STEP))
            row = {"runs": runs, "probes": probes, "k": k, "megabytes": size}
            rows.append(row | {"cold": cold, "script": medians[0], "work": medians[1]})
            tab.close()
        browser.close()
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
