"""The command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.builders import ROOT


def darkroom(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DARKROOM_", "MLFLOW_", "PREFECT_", "AWS_"))
    } | {"PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
