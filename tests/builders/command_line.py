"""The command line and other programs, each in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.builders import ROOT


def darkroom(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DARKROOM_", "MLFLOW_", "PREFECT_", "AWS_"))
    } | {"PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def output_of(command: Sequence[str | Path], **options: Any) -> str:
    """What a program prints, which must succeed; ``options`` are those of ``subprocess.run``."""
    process = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout
