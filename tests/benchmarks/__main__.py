"""All benchmarks one after another, and the numbers and pictures of the pages that are made of what they measure.

    python -m tests.benchmarks [--out benchmarks] [--only growth speed] [--big] [--data colour=cifar.npz]
    python -m tests.benchmarks --write      # README.md and the pages from what is stored, in seconds
    python -m tests.benchmarks --check      # an error where they are not what is stored
    python -m tests.benchmarks --only growth mnist --write      # measured anew first, and stored

Each runs in a process of its own. Writes results.md, with the command above each output, after every one. One that
fails is marked as such and does not keep the others from running; the exit code is then 1, and nothing is stored. All
of them take hours, on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.made import MAKERS, pieces
from tests.benchmarks.pages import RESULTS, ROOT, rewritten, stored

THREADS = {"big": "2", "mnist": "2", "tab.png": "2"}  # of the others: one
# By heading: a module of this folder, or a script, with arguments; {out} stands for the folder.
BENCHMARKS = {
    "speed": "speed --out {out}/rows.json --json {out}/speed.json",
    "growth": "growth --out {out}/growth.png --json {out}/growth.json",
    "ranks": "ranks --json {out}/ranks.json",
    "overhead": "overhead --ranks 1 --json {out}/overhead.json",
    "overhead, two ranks": "overhead --ranks 2 --json {out}/overhead.json",
    "sample_size": "sample_size --json {out}/sample_size.json",
    "certificate": "certificate --seeds 6 --probes 6 --json {out}/certificate.json",
    "vocabulary": "vocabulary --json {out}/vocabulary.json",
    "attention": "attention --json {out}/attention.json",
    "operations": "operations --json {out}/operations.json",
    "joining": "joining --json {out}/joining.json",
    "state": "state --json {out}/state.json",
    "vectors": "vectors --json {out}/vectors.json",
    "fisher": "fisher --json {out}/fisher.json",
    "differences": "differences --json {out}/differences.json",
    "beside": "beside --json {out}/beside.json",
    "tab": "tab --json {out}/tab.json",
    "tab_page": "tab_page --json {out}/tab_page.json",
    "moved": "moved --json {out}/moved.json",
    "printed": "printed --json {out}/printed.json",
    "suite": "suite --json {out}/suite.json",
    "big": "big --out {out}/big.json",
    "mnist": "examples/mnist.py --out {out} --json {out}/mnist.json",
    "lora": "examples/lora.py --out {out}/lora --json {out}/lora.json",
    "text": "examples/text/train.py --out {out}/text --json {out}/text.json",
    "tab.png": "examples/tab.py --out {out}/tab --picture {out}/tab.png",
    "cifar": "examples/cifar/train.py fit --config examples/cifar/config.yaml --config examples/cifar/cpu.yaml "
    "--trainer.logger.init_args.save_dir {out}",
    "cifar.png": "examples/picture.py {out}/cifar {out}/cifar.png --height 1266",
}
# Pictures of README.md and the pages, by name in the folder.
PICTURES = {
    "cifar.png": "examples/cifar/tab.png",
    "growth.png": "tests/benchmarks/growth.png",
    "mnist.png": "examples/mnist.png",
    "tab.png": "examples/tab.png",
}
# Puts what the reproductions have stored into their page itself, and with --check compares it.
GALLERY = (sys.executable, "examples/reproduce/gallery.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--big", action="store_true", help="also the model of 124 million parameters")
    parser.add_argument(
        "--data", nargs="*", default=[], metavar="NAME=FILE", help="for speed, from the root of the repository"
    )
    parser.add_argument("--write", action="store_true", help="pages from what is stored; with --only, measured before")
    parser.add_argument("--check", action="store_true", help="compare the pages with what is stored; measures nothing")
    asked = parser.parse_args()
    failed: list[str] = []
    if asked.only or not (asked.write or asked.check):
        out = asked.out.resolve()
        failed = measure(out, [name for name in asked.only or BENCHMARKS if name != "big" or asked.big], asked.data)
        if asked.write and not failed:
            store(out)
    if asked.write and not failed:
        write()
    return int(bool(failed) or (asked.check and differs()))


def measure(out: Path, names: list[str], data: list[str]) -> list[str]:
    """Run benchmarks; the names of those that have failed."""
    out.mkdir(parents=True, exist_ok=True)
    sections: list[str] = []
    failed: list[str] = []
    for name in names:
        words = [word.format(out=out) for word in BENCHMARKS[name].split()]
        words += ["--data", *data] if name == "speed" else []
        for word in words:  # one begins with what is stored, which it may keep parts of
            if word.endswith(".json") and (kept := RESULTS / Path(word).name).exists():
                shutil.copy(kept, word)
        print(f"{name} ...", flush=True)
        sections.append(section(name, words, failed))
        (out / "results.md").write_text("\n".join(["# Benchmarks", *sections]))
    print(f"{out / 'results.md'}; failed: {', '.join(failed) or 'none'}")
    return failed


def store(out: Path) -> None:
    """Keep what was measured: results, and pictures, as far as there are any."""
    for name in MAKERS:
        if (measured := out / f"{name}.json").exists():
            shutil.copy(measured, RESULTS)
    for name, place in PICTURES.items():
        if (picture := out / name).exists():
            shutil.copy(picture, ROOT / place)


def write() -> None:
    """Put what is stored into the pages."""
    for page, text in rewritten(pieces(stored())).items():
        (ROOT / page).write_text(text)
        print(page)
    subprocess.run([*GALLERY, "--write"], cwd=ROOT, check=True)


def differs() -> bool:
    """Whether a page is not what is stored makes of it; says which."""
    pages = list(rewritten(pieces(stored())))
    gallery = subprocess.run([*GALLERY, "--check"], cwd=ROOT)
    for page in pages:
        print(f"{page}: other numbers than the results make: python -m tests.benchmarks --write")
    return bool(pages or gallery.returncode)


def command(word: str) -> list[str]:
    """A script or a module as this Python runs it."""
    return [sys.executable, word] if word.endswith(".py") else [sys.executable, "-m", word]


def section(name: str, words: list[str], failed: list[str]) -> str:
    """Run one benchmark: its heading, its command and its output, and why it failed."""
    threads = THREADS.get(name, "1")
    module = words[0] if words[0].endswith(".py") else f"tests.benchmarks.{words[0]}"
    asked = [*command(module), *words[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    run = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    shown = f"OMP_NUM_THREADS={threads} python {shlex.join(asked[1:])}"
    parts = [f"## {name}", f"```\n{shown}\n```", run.stdout.strip()]
    if run.returncode:
        failed.append(name)
        parts.append(f"**failed**\n\n```\n{run.stderr.strip()[-2000:]}\n```")
    return "\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
