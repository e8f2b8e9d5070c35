"""What the pages on infrastructure name is there."""

import re

from tests.builders.installation import INFRA, ROOT

THREATS = ROOT / "docs" / "operations" / "threat-model.md"


def test_each_defence_names_a_test_that_exists() -> None:
    names = set(re.findall(r"`(?:tests/\w+/)?(test_\w+(?:\.py)?)`", THREATS.read_text()))
    files = list((ROOT / "tests").rglob("test_*.py"))
    functions = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert names
    assert names <= {path.name for path in files} | functions


def test_paths_in_the_infra_readme_exist() -> None:
    cells = re.findall(r"^\| (`[^|]+) \|", (INFRA / "README.md").read_text(), re.MULTILINE)
    for path in re.findall(r"`([^`]+)`", " ".join(cells)):
        assert (INFRA / path).exists(), path
