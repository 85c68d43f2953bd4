"""One browser for all, and pages whose console must be silent."""

import pytest

from tests.tensorboard_tab.browser import CHROMIUM, Tab


@pytest.fixture(scope="package")
def browser():
    """Chromium, driven by playwright."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def opened(browser):
    """Opens pages; an error or a warning in the console of one fails the test."""
    tabs = []

    def open_tab(address, **options):
        tab = Tab(browser, address, **options)
        tabs.append(tab)
        return tab.wait()

    yield open_tab
    said = [text for tab in tabs for text in tab.said]
    for tab in tabs:
        tab.close()
    assert said == []
