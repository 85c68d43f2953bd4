"""Make the gallery, README.md, from what the scripts have measured.

    python examples/reproduce/gallery.py [--check]

Every script that has run in full has left a figure and `results/NAME.json` here. With --check nothing is written, and
it is an error when README.md is not what the results make.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import HERE, MAX_FIGURE_BYTES

ORDER = (
    "figure1",
    "figure2",
    "table1",
    "solvable_model",
    "tiny_subspaces",
    "edge_of_stability",
    "outliers",
    "gauss_newton",
    "layers",
)
INTRODUCTION = """\
# Reproductions

What the paper reports, and what came after it, each by one script: the claim, the number in the paper, the number here,
and whether the condition in the claim is met. Made by `gallery.py` from the results of full runs, with the seconds of
one core; with `--quick` a script checks less and takes a minute at most.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare README.md with the results")
    arguments = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}
    unknown = found.keys() - set(ORDER)
    assert not unknown, f"results of scripts that are not in the gallery: {sorted(unknown)}"
    text = "\n".join([INTRODUCTION, *(section(found[name]) for name in ORDER if name in found)])
    readme = HERE / "README.md"
    if arguments.check:
        assert readme.read_text() == text, "README.md is not what the results make: run gallery.py"
        for result in found.values():
            size = (HERE / result["figure"]).stat().st_size
            assert size <= MAX_FIGURE_BYTES, f"{result['figure']} has {size:,} bytes, more than {MAX_FIGURE_BYTES:,}"
        print(f"{len(found)} reproductions")
    else:
        readme.write_text(text)


def section(result: dict[str, Any]) -> str:
    assert not result["quick"], f"{result['name']}: a quick run does not enter the gallery"
    script = Path(f"{result['name']}.py")
    rows = [
        f"| {cell(claim['text'])} | {cell(claim['paper'])} | {cell(claim['ours'])} | {verdict(claim)} |"
        for claim in result["claims"]
    ]
    return "\n".join(
        [
            f"## [{result['title']}]({script})",
            "",
            f"{result['source']}. `{result['command']}`, {result['seconds']:.0f} s.",
            "",
            f"![{result['title']}]({result['figure']})",
            "",
            "| claim | paper | here | |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def verdict(claim: dict[str, Any]) -> str:
    return "holds" if claim["holds"] else f"**does not reproduce**: {cell(claim['why_not'])}"


if __name__ == "__main__":
    main()
