"""The table of drills is that of the drills that exist, and what passed is not run again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.table import BEGIN, END, NO_RUN, PAGE, ROOT, drills, read, render, write


def test_the_page_lists_exactly_the_drills_that_exist() -> None:
    text = PAGE.read_text()
    table = text[text.index(BEGIN) : text.index(END) + len(END)]
    run, results = read(text)
    assert table == render(drills(), results, run), "run python -m tests.chaos.table"


def test_each_test_of_chaos_or_with_kills_is_a_drill() -> None:
    tests = {drill.test for drill in drills()}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name, parameters in re.findall(r"^def (test_\w+)\((.*?)\) -> ", path.read_text(), re.MULTILINE | re.DOTALL):
            if path.parent.name == "chaos" or "kills: int" in parameters:
                assert f"{path.relative_to(ROOT).as_posix()}::{name}" in tests


def test_results_stay_in_the_table_when_a_drill_is_added(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    first = drills()[0].test
    write("Last whole run: commit x", {first: ("20", "12", "passed")}, page)
    run, results = read(page.read_text())
    assert (run, results[first]) == ("Last whole run: commit x", ("20", "12", "passed"))
    write(run, results, page)
    assert read(page.read_text()) == (run, results)
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    page.write_text("no place")
    with pytest.raises(ValueError, match="no place for the table"):
        write(NO_RUN, {}, page)


DRILLS = """
from pathlib import Path
import pytest

@pytest.mark.drill("passes", "nothing", "well")
@pytest.mark.parametrize("number", [1, 2])
def test_passes(number, record_property):
    record_property("kills", 2)
    with Path("ran").open("a") as file:
        file.write(f"{number}\\n")

@pytest.mark.drill("fails", "nothing", "badly, unless it is mended")
def test_fails():
    print("what it wrote")
    assert Path("mended").exists(), "as it should"

def test_that_is_no_drill():
    raise AssertionError
"""
PARTS = (
    *("tests/__init__.py", "tests/builders/__init__.py"),
    *(f"tests/chaos/{name}.py" for name in ("__init__", "record", "table")),
)


@pytest.mark.long
@pytest.mark.slow
def test_only_drills_that_did_not_pass_run_again(tmp_path: Path) -> None:
    for name in PARTS:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_some.py").write_text(DRILLS)
    page = tmp_path / PAGE.relative_to(ROOT)
    page.parent.mkdir(parents=True)
    page.write_text(f"{BEGIN}\n{END}\n")
    for folder in ("diffusion", "flows"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"KILLS": "2", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugins = [word for name in ("xdist", "pytest_timeout", "tests.chaos.record") for word in ("-p", name)]

    def chaos(*arguments: str, code: int, workers: int = 0) -> str:
        command = [sys.executable, "-m", "pytest", *plugins, "-n", str(workers), "--dist", "loadfile", *arguments]
        process = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert process.returncode == code, process.stdout + process.stderr
        return process.stdout

    def ran() -> int:
        return len((tmp_path / "ran").read_text().split())

    output = chaos(code=1, workers=2)
    assert "1 passed, 1 failed of 2" in output
    [log] = (tmp_path / ".chaos").glob("*/logs/*.log")
    assert str(log.relative_to(tmp_path)) in output
    assert "what it wrote" in log.read_text()
    assert "as it should" in log.read_text()
    _, results = read(page.read_text())
    assert [(kills, result) for kills, _, result in results.values()] == [("4", "passed"), ("", "failed")]

    (tmp_path / "mended").touch()
    assert "2 passed of 2" in chaos(code=0)
    assert "2 passed of 2" in chaos(code=0)
    assert ran() == 2
    run, results = read(page.read_text())
    assert {result for _, _, result in results.values()} == {"passed"}
    assert "KILLS=2" in run
    chaos("--restart", code=0)
    assert ran() == 4
    (tmp_path / "tests" / "other.py").touch()
    chaos(code=0)
    assert ran() == 6, "other code was not tried yet"
