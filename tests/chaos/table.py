"""The drills there are, read from their markers, and their table in docs/operations/failure-drills.md.

A drill is a test with ``@pytest.mark.drill(title, what is done, how it ends)``: three plain strings, which are read
without importing anything. ``python -m tests.chaos.table`` writes the table with the results it has already; a whole
``make chaos`` writes its own.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.builders import ROOT

PAGE = ROOT / "docs" / "operations" / "failure-drills.md"
BEGIN, END = "<!-- drills: `make chaos` writes this table -->", "<!-- end of the drills -->"
NO_RUN = "No whole run is recorded yet."
HEAD = "| drill | what is done | how it ends | test | kills | seconds | result |\n|---|---|---|---|---|---|---|"
UNKNOWN = ("", "", "not run")


@dataclass(frozen=True)
class Drill:
    """A test with the marker ``drill``."""

    file: str
    """Relative to the repository."""
    function: str
    title: str
    done: str
    ends: str

    @property
    def test(self) -> str:
        """Its name for pytest, without parameters."""
        return f"{self.file}::{self.function}"


def drills(root: Path = ROOT) -> list[Drill]:
    """All drills, by file; raises ValueError if a marker is not three plain strings."""
    return [drill for path in sorted((root / "tests").rglob("test_*.py")) for drill in _drills_in(path, root)]


def _drills_in(path: Path, root: Path) -> Iterator[Drill]:
    text = path.read_text()
    if "mark.drill(" not in text:
        return
    for function in ast.parse(text).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.drill":
                title, what_happens, ends = (ast.literal_eval(each) for each in decorator.args)
                yield Drill(path.relative_to(root).as_posix(), function.name, title, what_happens, ends)


def render(results_by_test: Iterable[Drill], results: Mapping[str, tuple[str, str, str]], run: str) -> str:
    """The table, with kills, seconds and result of each drill by its test, below a line about the run."""
    lines = [BEGIN, run, "", HEAD]
    for drill in results_by_test:
        cells = (drill.title, drill.done, drill.ends, f"`{drill.test}`", *results.get(drill.test, UNKNOWN))
        lines.append(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |")
    return "\n".join([*lines, END])


def read(page: str) -> tuple[str, dict[str, tuple[str, str, str]]]:
    """The line about the last whole run and its results by test, as ``page`` has them."""
    run, results = NO_RUN, {}
    table = page.partition(BEGIN)[2].partition(END)[0]
    for line in table.strip().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[3].startswith("`"):
            results[cells[3].strip("`")] = (cells[4], cells[5], cells[6])
        elif line and not line.startswith("|"):
            run = line
    return run, results


def write(run: str, results: Mapping[str, tuple[str, str, str]], page: Path = PAGE) -> None:
    """Put the table of all drills in place of the one on ``page``."""
    text = page.read_text()
    before, begins, rest = text.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not begins or not ends:
        raise ValueError(f"{page} has no place for the table: put the lines {BEGIN} and {END} into it")
    page.write_text(before + render(drills(), results, run) + after)


if __name__ == "__main__":
    write(*read(PAGE.read_text()))
