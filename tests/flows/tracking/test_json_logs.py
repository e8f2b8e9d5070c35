"""Log lines as JSON: every line an object, each thing said once, with the names of what it is about."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flows.tracking.json_logs import VARIABLES
from tests.builders import ROOT


def lines(folder: Path, program: str, variables: dict[str, str]) -> list[dict[str, Any]]:
    """What ``program`` wrote to standard error, every line of which has to be an object."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DARKROOM_", "PREFECT_"))}
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment | variables | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stderr.splitlines()]


def test_a_command_without_servers_writes_json_too(tmp_path: Path) -> None:
    program = (
        "from flows.tracking import console\nconsole.EVERY = 0\nwith console.console() as show: show('images', 1, 10)"
    )
    (line,) = lines(tmp_path, program, {"DARKROOM_LOG": "json"})
    assert (line["level"], line["message"]) == ("info", "images: 1 of 10")


def test_no_other_format_is_taken_for_one(tmp_path: Path) -> None:
    program = """
from diffusion.common.errors import UserError
from flows.environment import settings
try:
    settings()
except UserError as error:
    assert "DARKROOM_LOG" in str(error)
else:
    raise AssertionError
"""
    assert lines(tmp_path, program, {"DARKROOM_LOG": "yaml"}) == []


def test_compose_sets_the_environment_variables_of_a_command() -> None:
    text = (ROOT / "infra" / "compose.yaml").read_text()
    for name, value in VARIABLES.items():
        assert f"{name}: {value}" in text or f'{name}: "{value}"' in text
