"""Page of the tab as one HTML file with its data.

It is for mail, artefacts of CI, and papers.

The modules of the page are joined in the order of their imports, as a browser refuses to import files from a disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_subspace.tensorboard_tab.page_files import STATIC

IMPORT = re.compile(r"^import (\{[^}]*\}) from '(\.[^']+)';\n", re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|let|class) (\w+))", re.MULTILINE)


def page(runs: Mapping[str, Mapping[str, list[dict[str, Any]]]], title: str) -> str:
    """The HTML of a page with these probes.

    Args:
        runs: by run and tag, of `event_files.read_probes`.
        title: of the page.

    Example:
        >>> html = page({"a": {"subspace/probes": [{"v": 1, "step": 0}]}}, title="a < b")
        >>> html.count("</script>"), "import {" in html, "<title>a &lt; b</title>" in html
        (2, False, True)
    """
    # "<" in a text would end the element where "/script>" follows.
    data = json.dumps(runs, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_escaped(title)}</title>\n"
        f'<style id="style">\n{style}</style></head><body>\n'
        f'<script id="probes" type="application/json">{data}</script>\n'
        f'<script type="module">\n{joined_modules()}module_index_js.render();\n</script>\n'
        "</body></html>\n"
    )


def joined_modules() -> str:
    """All modules of the page as one.

    Each becomes a function that is called once and returns what the module exports.
    """
    done: dict[Path, str] = {}

    def add(file: Path) -> None:
        if file in done:
            return
        text = file.read_text(encoding="utf-8")
        for _, name in IMPORT.findall(text):  # in no circle, or this would not end
            add((file.parent / name).resolve())
        names = ", ".join(EXPORT.findall(text))
        inside = IMPORT.sub(lambda found: f"const {found[1]} = {_name(file.parent / found[2])};\n", text)
        done[file] = f"const {_name(file)} = (() => {{\n{EXPORT.sub('', inside)}\nreturn {{ {names} }};\n}})();\n"

    add(STATIC / "index.js")
    return "".join(done.values())


def _name(file: Path) -> str:
    """Name of a module among all."""
    return "module_" + re.sub(r"\W", "_", file.resolve().relative_to(STATIC).as_posix())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
