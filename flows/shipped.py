"""The code that a model version ships, run in a process of its own with this machine's libraries."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow

import diffusion
from diffusion.errors import UserError
from diffusion.files import write_json
from flows.registry import Version
from flows.staging import SERVERS

REDRAW = Path(__file__).with_name("redraw.py")
INSTALLED = Path(diffusion.__file__).parent.parent
"""Where the code of this installation lies."""


def fetch_code(version: Version, folder: Path) -> Path:
    """Where below ``folder`` the package ``diffusion`` of ``version`` lies now; raises UserError if it ships none."""
    if "code" not in {item.path for item in mlflow.artifacts.list_artifacts(artifact_uri=version.uri)}:
        raise UserError(f"{version.uri} ships no code: --installed draws with what is installed here")
    return Path(mlflow.artifacts.download_artifacts(f"{version.uri}/code", dst_path=str(folder)))


def fetch_requirements(version: Version) -> list[str]:
    """The libraries that ``version`` was registered with, as NAME==VERSION."""
    return str(mlflow.artifacts.load_text(f"{version.uri}/requirements.txt")).splitlines()


def moved(requirements: list[str]) -> list[str]:
    """Those of ``requirements`` that this machine has in another version, as ``NAME: theirs → ours``."""
    pinned = (line.strip().partition("==") for line in requirements)
    return [
        f"{name}: {wanted} → {here or 'not installed'}"
        for name, equal, wanted in pinned
        if equal and (here := _installed(name)) != wanted
    ]


def run(request: dict[str, Any], code: Path) -> Iterator[dict[str, Any]]:
    """The answers of ``flows.redraw`` to ``request``, drawn with the package ``diffusion`` in ``code``.

    The process has this machine's libraries, and no way to our servers. Raises UserError, with its last words, if it
    fails.
    """
    folder = Path(request["folder"])
    asked, said = folder / "request.json", folder / "stderr"
    write_json(asked, request | {"code": str(code)})
    variables = {name: value for name, value in os.environ.items() if not name.startswith(SERVERS)}
    with asked.open() as words, said.open("w") as errors:
        process = subprocess.Popen(
            # Not with the script's own folder on its path, where modules are named like many others.
            [sys.executable, "-P", str(REDRAW)],
            cwd=folder,
            env=variables | {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"},
            text=True,
            stdin=words,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    try:
        yield from map(json.loads, process.stdout)
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if process.returncode:
        last = said.read_text().strip().splitlines()[-1:]
        raise UserError("".join(last) if process.returncode > 0 else f"killed by signal {-process.returncode}")


def _installed(name: str) -> str | None:
    try:
        # As they were when it was registered: without what builds for one device add.
        return installed(name).split("+")[0]
    except PackageNotFoundError:
        return None
