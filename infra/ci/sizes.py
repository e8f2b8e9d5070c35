"""Compare the size of the project with its ceilings in pyproject.toml.

A ceiling that is exceeded fails, and so does one that lies more than 1 % above its figure: it follows the code down.

    python infra/ci/sizes.py            # compare
    python infra/ci/sizes.py --lower    # set each ceiling to its figure where that is lower
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def measure(root: Path) -> dict[str, int]:
    """Count what a reader meets: code, tests, words of documentation, settings and options of commands."""

    def texts(folder: str, pattern: str) -> list[str]:
        return [path.read_text() for path in (root / folder).rglob(pattern) if "_build" not in path.parts]

    code = texts("diffusion", "*.py") + texts("flows", "*.py")
    reference = root / "docs" / "reference"
    return {
        "lines": sum(text.count("\n") for text in code),
        "bytes": sum(len(text.encode()) for text in code),
        "tests": sum(text.count("\n") for text in texts("tests", "*.py")),
        "words": sum(len(text.split()) for text in texts("docs", "*.md")),
        "settings": len(re.findall(r"^\| `\w+\.", (reference / "configuration.md").read_text(), re.M)),
        "options": len(re.findall(r"^\| `-", (reference / "command-line.md").read_text(), re.M)),
    }


def find_misfits(figures: dict[str, int], ceilings: dict[str, int]) -> list[str]:
    """Return a line for each figure without a ceiling, above it, or more than 1 % below it."""
    lines = [f"{name} is not a ceiling and a figure: mend tool.darkroom" for name in figures.keys() ^ ceilings.keys()]
    for name in figures.keys() & ceilings.keys():
        figure, ceiling = figures[name], ceilings[name]
        if figure > ceiling:
            lines.append(f"{name}: {figure:,} are above the ceiling of {ceiling:,}: take something out")
        elif figure < ceiling * 0.99:
            lines.append(f"{name}: {figure:,} are over 1 % below the ceiling of {ceiling:,}: run sizes.py --lower")
    return sorted(lines)


def main() -> None:
    """Print what does not fit, and exit with 1 if anything does not."""
    project = ROOT / "pyproject.toml"
    text = project.read_text()
    ceilings, figures = tomllib.loads(text)["tool"]["darkroom"]["ceilings"], measure(ROOT)
    if "--lower" in sys.argv:
        for name, ceiling in ceilings.items():
            ceilings[name] = min(ceiling, figures[name])
            text = re.sub(rf"^{name} = {ceiling:_}$", f"{name} = {ceilings[name]:_}", text, flags=re.M)
        project.write_text(text)
    lines = find_misfits(figures, ceilings)
    print(*lines, sep="\n", end="\n" * bool(lines))
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
