"""What a wheel and an sdist hold, and what they say of themselves; both sizes.

    python tests/package/contents.py DIST

DIST is a folder with one of each. Ends in an error where something is missing in them, or does not belong there.
"""

from __future__ import annotations

import email
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

PACKAGE = "lightning_subspace"
# What is read at run time, by suffix; each must be there.
DATA = {".js", ".css"}
ALSO = {".py", ".typed", ".md", ".json"}  # READMEs of the rooms travel with them
METADATA = ("Summary", "License-Expression", "Requires-Python", "Classifier", "Keywords", "Description-Content-Type")
MOST_BYTES = 1_500_000  # an upload has no pictures, no results and no data


def main(folder: Path) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        found = faults_of_wheel(names) + faults_of_metadata(email.message_from_bytes(archive.read(metadata)))
    with tarfile.open(sdist) as archive:
        found += faults_of_sdist([name.partition("/")[2] for name in archive.getnames()])
    for path in (wheel, sdist):
        size = path.stat().st_size
        print(f"{path.name}: {size:,} bytes")
        found += [f"{path.name} has more than {MOST_BYTES:,} bytes"] if size > MOST_BYTES else []
    assert not found, "\n".join(found)


def faults_of_wheel(names: list[str]) -> list[str]:
    """Files that are not of the package, and those of it that are missing."""
    own = [name for name in names if name.startswith(f"{PACKAGE}/")]
    suffixes = {Path(name).suffix for name in own}
    found = [f"{name}: not of the package" for name in names if name not in own and ".dist-info/" not in name]
    found += [f"{suffix}: no file of that kind" for suffix in sorted(DATA - suffixes)]
    found += [f"{suffix}: no file of that kind belongs there" for suffix in sorted(suffixes - DATA - ALSO)]
    found += [f"{name}: a test" for name in own if Path(name).name.startswith(("test_", "conftest"))]
    needed = (f"{PACKAGE}/py.typed", f"{PACKAGE}/__init__.py")
    found += [f"{name}: missing" for name in needed if name not in own]
    for file in ("licenses/LICENSE", "entry_points.txt"):
        found += [] if any(name.endswith(f".dist-info/{file}") for name in names) else [f"{file}: missing"]
    return found


def faults_of_sdist(names: list[str]) -> list[str]:
    """What a wheel needs to be built from it, and what nobody needs."""
    found = [
        f"{name}: missing in the sdist" for name in ("pyproject.toml", "README.md", "LICENSE") if name not in names
    ]
    unwanted = ("tests/", "examples/", ".github/", ".ci/")
    return found + [f"{name}: in the sdist" for name in names if name.startswith(unwanted)]


def faults_of_metadata(metadata: Message) -> list[str]:
    """Fields that a registry shows, and their agreement with each other."""
    found = [f"{field}: not in the metadata" for field in METADATA if not metadata.get(field)]
    oldest = str(metadata.get("Requires-Python")).removeprefix(">=")
    versions = [
        line for line in metadata.get_all("Classifier", []) if line.startswith("Programming Language :: Python :: 3.")
    ]
    if not any(line.endswith(f":: {oldest}") for line in versions):
        found.append(f"Classifier: {oldest}, the oldest Python, is not among {versions}")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
