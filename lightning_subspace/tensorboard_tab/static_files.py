"""Files of the page, as they lie on the disk."""

from __future__ import annotations

from pathlib import Path

STATIC = Path(__file__).with_name("static")
TYPES = {".js": "text/javascript", ".css": "text/css"}


def static_files() -> dict[str, Path]:
    """All of them, by their names below the folder.

    Example:
        >>> sorted(name for name in static_files() if name.startswith("s"))
        ['scales.js', 'series.js', 'source.js', 'style.css', 'svg.js']
    """
    files = [file for file in STATIC.rglob("*") if file.suffix in TYPES]
    return {file.relative_to(STATIC).as_posix(): file for file in files}
