"""Files of the page: modules of JavaScript, and a style sheet."""

from __future__ import annotations

from pathlib import Path

STATIC = Path(__file__).resolve().with_name("static")
TYPES = {".js": "text/javascript", ".css": "text/css"}


def page_files() -> dict[str, Path]:
    """All of them, by their paths below `STATIC`.

    Example:
        >>> "panels/spectrum.js" in page_files()
        True
    """
    return {file.relative_to(STATIC).as_posix(): file for file in STATIC.rglob("*") if file.suffix in TYPES}
