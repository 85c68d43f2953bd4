"""Make the gallery, README.md, from what the scripts have measured.

    python examples/reproduce/gallery.py [--check | --write]

Every script that has run in full has left a figure and `results/NAME.json` here. With --check nothing is written, and
it is an error when README.md is not what the results make. --write is what it does without.
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
    "spikes",
    "slices",
    "outliers",
    "gauss_newton",
    "layers",
    "matrices",
    "second_loss",
    "two_tasks",
    "noise_scale",
    "step_taken",
    "update_spectrum",
)
INTRODUCTION = """\
# Reproductions

What the paper reports, and what came after it, each by one script: the claim, the number in the paper, the number here,
and whether the condition in the claim is met. Made by `gallery.py` from the results of full runs, with the seconds of
one core; with `--quick` a script checks less and takes a minute at most.
"""


LEFT_OUT = """\
## Measured and left out

Cheap stand-ins for the top eigenspace, and for the part of single layers in a curvature, were tried with code of their
own (digits with 1,930 parameters, a CNN of 17,122, MNIST; two seeds), and are not built.

*Class means, or the Fisher matrix of micro-batches, in place of the Hessian.* The gradient is a mean of those of the
classes, and of the micro-batches, so that it lies in their span by construction: its fraction there is 1 at every step,
where that in the true top 10 is .45 at the start, .01 at step 100, .78 at 200 and .99 at 500. The spaces themselves
overlap with the true one by .40, .67, .87, .88 (classes) and .39, .64, .82, .77 (32 micro-batches) at these steps.
Taken around their mean they give fractions of .96 and .88 at steps 500 and 2,000, and overlaps of .71 to .84.

*Cross-class means* (Papyan 2019, arXiv 1901.08244) do better: on digits they overlap by .98 to .99 from step 200 on,
with fractions of .80, .99, .98 and .95 for .78, .99, .99 and .94. But not before, .44 to .74; and on the CNN they
overlap by .95, .77, .49 with one seed and .82, .55, .75 with the other at steps 200, 400 and 800, with fractions of up
to .25 too much (.93 for .68), and no sign of that short of ten more products. They need the logits and labels of a
training step, too.

*The part of single layers in g.Hg, by random signs.* With a random sign for each layer's part of g, the mean of g.Hg is
the sum over layers of g_l.H_ll g_l. But the standard deviation of one draw is as large as the mean (1.8 and 1.7 at step
500 on digits): 100 products for 10 %, where one product a layer is exact.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare README.md with the results")
    parser.add_argument("--write", action="store_true", help="make README.md, as without")
    arguments = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}
    unknown = found.keys() - set(ORDER)
    assert not unknown, f"results of scripts that are not in the gallery: {sorted(unknown)}"
    text = "\n".join([INTRODUCTION, *(section(found[name]) for name in ORDER if name in found), LEFT_OUT])
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
