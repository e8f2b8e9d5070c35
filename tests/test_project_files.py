"""Files about the project that name its version and licence agree with each other."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml

import diffusion
from tests.builders import ROOT


def test_the_version_is_one() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == diffusion.__version__
    newest = re.findall(r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == diffusion.__version__


def test_the_licence_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.y*ml")), ids=lambda path: path.name)
def test_github_files_are_yaml_with_the_keys_that_github_needs(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    if path.parent.name == "ISSUE_TEMPLATE" and "blank_issues_enabled" not in document:
        assert {"name", "description", "body"} <= document.keys()
        assert all({"type", "attributes"} <= field.keys() for field in document["body"])


def test_hooks_run_programs_of_the_development_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = " ".join(project["optional-dependencies"]["dev"])
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]:
        program = hook["entry"].split()[0]
        assert program.startswith(".venv/bin/")
        assert {"lint-imports": "import-linter"}.get(program[10:], program[10:]) in extra


def test_links_to_files_of_the_checkout_lead_somewhere() -> None:
    for path in (*ROOT.glob("[A-Z]*.md"), *ROOT.glob(".github/*.md")):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_a_ceiling_exceeded_or_far_above_its_figure_is_named() -> None:
    sizes = runpy.run_path(str(ROOT / "infra" / "ci" / "sizes.py"))
    figures = sizes["measure"](ROOT)
    assert all(figures.values())
    assert sizes["find_misfits"](figures, figures) == []
    for name, figure in figures.items():
        for ceiling in (figure - 1, figure * 102 // 100 + 1):
            [line] = sizes["find_misfits"](figures, figures | {name: ceiling})
            assert line.startswith(f"{name}: ")
    assert sizes["find_misfits"](figures, {})
