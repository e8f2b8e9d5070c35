"""What a team's CI does: the scan for secrets, and that its files call what exists."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders.installation import INFRA, ROOT

CI = INFRA / "ci"


def load_workflow(name: str, calls: set[str]) -> dict[str, Any]:
    """A workflow that may only read, and that calls these steps of steps.sh, which exist."""
    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {name for run in steps for name in re.findall(r"infra/ci/steps\.sh (\w+)", run)} == calls
    assert calls <= set(re.findall(r"^(\w+)\) ", (CI / "steps.sh").read_text(), re.MULTILINE))
    assert workflow["permissions"] == {"contents": "read"}
    return workflow


def test_ci_workflow_calls_existing_steps_and_has_no_password() -> None:
    workflow = load_workflow("darkroom.yaml", {"check", "test", "compare"})
    for name, value in workflow["jobs"]["compare"]["env"].items():
        assert value.startswith("${{ "), name
    # A change from elsewhere must not run with the team's keys.
    assert "head.repo.full_name == github.repository" in workflow["jobs"]["compare"]["if"]


def test_weekly_workflow_tests_the_newest_and_the_lowest_versions() -> None:
    workflow = load_workflow("weekly.yaml", {"versions"})
    assert workflow[True]["schedule"]  # YAML reads `on` as a boolean
    matrix = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert {each["resolution"] for each in matrix} == {"highest", "lowest-direct"}
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert [each["python"] for each in matrix if each["resolution"] == "lowest-direct"] == [oldest.removeprefix(">=")]


def test_actions_are_named_by_commit_with_their_version_beside() -> None:
    lines = [
        line.strip().removeprefix("- ")
        for folder in (ROOT / ".github", CI)
        for path in [*folder.rglob("*.yaml"), *folder.rglob("*.yml")]
        for line in path.read_text().splitlines()
        if re.match(r"\s*(- )?uses:", line)
    ]
    assert lines
    for line in lines:
        assert re.fullmatch(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40}  # v\d+(\.\d+)+", line), line


def test_steps_call_targets_and_verbs_that_exist() -> None:
    text = (CI / "steps.sh").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^ +make ([a-z-]+)", text, re.MULTILINE)) <= targets
    unknown = subprocess.run([str(CI / "steps.sh"), "deploy"], capture_output=True, text=True, check=False)
    assert (unknown.returncode, unknown.stderr.startswith("usage:")) == (2, True)


@pytest.mark.parametrize(
    "line",
    [
        f'aws_secret_access_key = "{"wJalrXUtnFEMI" + "K7MDENGbPxRfiCYEXAMPLEKEY12"}"',
        "-----BEGIN " + "RSA PRIVATE KEY-----",
        f"https://mlflow:{'hunter2' + 'hunter2'}@mlflow.internal",
        "token = '" + "ghp_" + "a1B2" * 9 + "'",
    ],
)
def test_a_secret_in_a_file_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "settings.py").write_text(f"{line}\n")
    assert scan(tmp_path / "settings.py").returncode == 1
    (tmp_path / "settings.py").write_text(f'digest = "{"0123456789abcdef" * 4}"\n')
    assert scan(tmp_path / "settings.py").returncode == 0


def scan(path: Path) -> subprocess.CompletedProcess[bytes]:
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run([str(CI / "secrets.sh"), str(path)], env=variables, capture_output=True, check=False)
