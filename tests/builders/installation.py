"""A new installation's passwords, and compose.yaml as Compose itself reads it."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.builders import ROOT
from tests.builders.command_line import output_of

INFRA = ROOT / "infra"


def new_environment(path: Path, *arguments: str) -> dict[str, str]:
    """What ``infra/credentials.py`` writes to ``path``, as it stands there."""
    command = [sys.executable, str(INFRA / "credentials.py"), "--out", str(path), *arguments]
    subprocess.run(command, check=True)
    pairs = (line.partition("=") for line in path.read_text().splitlines())
    return {name: value for name, _, value in pairs}


def composed(environment: Path, *arguments: str) -> dict[str, Any]:
    """compose.yaml with ``environment`` filled in; skips the test where there is no Compose."""
    command = [*compose(), "--file", str(INFRA / "compose.yaml"), "--env-file", str(environment), *arguments]
    configuration: dict[str, Any] = json.loads(output_of([*command, "config", "--format", "json"]))
    return configuration


@cache
def compose() -> list[str]:
    """How Compose is called here: Debian's program, or Docker's plugin."""
    if program := shutil.which("docker-compose"):
        return [program]
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    pytest.skip("there is no Docker Compose: apt-get install docker-compose")


def program(name: str, package: str) -> str:
    """A program of this Python environment or of the system; skips the test where it is missing."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return path or pytest.skip(f"there is no {name}: install {package}")
