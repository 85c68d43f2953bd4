"""Tables, sentences with numbers and printed text, in README.md and the pages, made from stored results.

A benchmark leaves `results/NAME.json`; the function of its name in `made.py` makes pieces of pages from it. A table
is found by its header and replaced down to its last row; a sentence is found by its words and gets new numbers; what is
printed is found by the lines in front of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
NUMBER = r"-?[\d,]*\.?\d+(?:e-?\d+)?"
RULE = re.compile(r"\|( -+ \|)+")


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        page: path from the root of the repository.
        header: its columns, by which it is found; no other table of the page has them.
        rows: cells.
    """

    page: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def put_into(self, text: str) -> str:
        """The page with these rows.

        Raises:
            LookupError: where the page has no such table, or several.
        """
        lines = text.split("\n")
        places = [i for i, line in enumerate(lines) if line == row(self.header)]
        if len(places) != 1 or not RULE.fullmatch(lines[places[0] + 1]):
            raise LookupError(f"{self.page}: expected one table {row(self.header)}, got {len(places)}")
        first = last = places[0] + 2
        while last < len(lines) and lines[last].startswith("|"):
            last += 1
        return "\n".join([*lines[:first], *map(row, self.rows), *lines[last:]])


@dataclass(frozen=True)
class Sentence:
    """Words of a page with numbers in them.

    Attributes:
        page: path from the root of the repository.
        words: the text, lines broken anywhere, with `{}` for each number; it occurs once.
        numbers: as they are to be written.
    """

    page: str
    words: str
    numbers: tuple[str, ...]

    def put_into(self, text: str) -> str:
        """The page with these numbers.

        Raises:
            LookupError: where the page has no such words, or several times.
        """
        pattern = re.escape(self.words).replace(r"\{\}", f"({NUMBER})").replace(r"\ ", r"\s+")
        found = list(re.finditer(pattern, text))
        if len(found) != 1:
            raise LookupError(f"{self.page}: expected {self.words!r} once, got it {len(found)} times")
        for group, number in reversed(list(enumerate(self.numbers, 1))):
            text = text[: found[0].start(group)] + number + text[found[0].end(group) :]
        return text


@dataclass(frozen=True)
class Block:
    """What a command has printed, between fences.

    Attributes:
        page: path from the root of the repository.
        before: the last lines in front of the block, by which it is found; they occur once.
        text: what was printed.
    """

    page: str
    before: str
    text: str

    def put_into(self, text: str) -> str:
        """The page with this text.

        Raises:
            LookupError: where the page has no block behind such lines, or several.
        """
        pattern = re.escape(self.before) + r"\n\n```(?:text)?\n(.*?)^```$"
        found = list(re.finditer(pattern, text, re.DOTALL | re.MULTILINE))
        if len(found) != 1:
            raise LookupError(f"{self.page}: expected a block behind {self.before!r} once, got it {len(found)} times")
        return text[: found[0].start(1)] + self.text.rstrip("\n") + "\n" + text[found[0].end(1) :]


Piece: TypeAlias = Table | Sentence | Block


def row(cells: Sequence[str]) -> str:
    """A line of a table in Markdown; an empty cell takes one blank."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def short(value: float, digits: int) -> str:
    """A number as the pages write it: without the zero before the point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


def power(value: float, digits: int = 0) -> str:
    """A number with a power of ten, which has no zero in front."""
    return f"{value:.{digits}e}".replace("e-0", "e-")


def keep(file: Path, rows: Iterable[Any], names: Sequence[str]) -> None:
    """Store some attributes of what was measured."""
    file.write_text(json.dumps([{name: getattr(row, name) for name in names} for row in rows], indent=1) + "\n")


def stored() -> dict[str, Any]:
    """What was measured, by the name of the benchmark."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def rewritten(pieces: Sequence[Piece]) -> dict[str, str]:
    """The pages that differ from what the pieces make of them: their new texts."""
    before = {page: (ROOT / page).read_text() for page in dict.fromkeys(piece.page for piece in pieces)}
    after = dict(before)
    for piece in pieces:
        after[piece.page] = piece.put_into(after[piece.page])
    return {page: text for page, text in after.items() if text != before[page]}
