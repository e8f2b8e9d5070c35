"""Virtual environments that have some of this one's packages, as links: nothing is downloaded."""

import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def closure(requirements: Iterable[str]) -> set[str]:
    """Names of the distributions that ``requirements`` without extras bring, those of their own included."""
    distributions: set[str] = set()
    queue = [(Requirement(line), "") for line in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            wanted = {f"{requirement.name}[{each}]" for each in ("", *requirement.extras)}
            if not wanted <= distributions:
                distributions |= wanted
                lines = distribution(requirement.name).requires or []
                queue += [(Requirement(line), each) for line in lines for each in ("", *requirement.extras)]
    return {name.partition("[")[0] for name in distributions}


def environment(folder: Path, requirements: Iterable[str]) -> Path:
    """Make a virtual environment in ``folder`` with what ``requirements`` bring; returns the folder of its programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for name in closure(requirements):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution(name).locate_file(top))).resolve())
    return folder / "bin"
