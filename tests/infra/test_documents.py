"""What the pages on infrastructure name is there."""

import re
from pathlib import Path

import pytest

from tests.builders.installation import INFRA, ROOT

PAGES = (ROOT / "docs" / "threat-model.md", INFRA / "README.md", *(ROOT / "docs" / "runbook").glob("*.md"))


def test_each_defence_names_a_test_that_exists() -> None:
    named = set(re.findall(r"`(?:tests/\w+/)?(test_\w+(?:\.py)?)`", PAGES[0].read_text()))
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    functions = {name for text in files.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    assert named
    assert named <= files.keys() | functions


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documentation_links_are_valid(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_paths_in_the_infra_readme_exist() -> None:
    named = re.findall(r"^\| (`[^|]+) \|", (INFRA / "README.md").read_text(), re.MULTILINE)
    for path in re.findall(r"`([^`]+)`", " ".join(named)):
        assert (INFRA / path).exists(), path
