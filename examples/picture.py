"""A picture of what the tab "Subspace" of TensorBoard shows of a folder of logs.

    python examples/picture.py LOGS FILE [--height 1332]

Opens TensorBoard in a Chromium that is installed, by playwright.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("logs", type=Path, help="folder of TensorBoard's files")
    parser.add_argument("file", type=Path, help="where to save it, .png")
    parser.add_argument("--height", type=int, default=1332, help="in pixels; the width is 1280")
    arguments = parser.parse_args()
    take_picture(arguments.logs, arguments.file, height=arguments.height)


def take_picture(logs: Path, file: Path, *, height: int = 1332) -> None:
    """Save what the tab shows of these logs, with all runs in them that have something to show."""
    from playwright.sync_api import sync_playwright
    from tensorboard import program

    server = program.TensorBoard()
    server.configure(argv=["tensorboard", "--logdir", str(logs), "--port", "0"])
    address = server.launch()
    runs = len({events.parent for events in logs.rglob("events.out.tfevents.*")})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": height})
        page.goto(f"{address}#lightning_subspace")
        frame = page.frame_locator("iframe[src*=lightning_subspace]")
        frame.locator(f"body[data-ready='{runs}']").wait_for(timeout=60_000)
        page.screenshot(path=file)
        browser.close()


if __name__ == "__main__":
    main()
