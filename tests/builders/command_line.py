"""The command line, in this process or, as other programs, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows.cli import main
from tests.builders import ROOT


def darkroom(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, in which no server is known but for ``more`` variables."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DARKROOM_", "MLFLOW_", "PREFECT_", "AWS_"))
    } | {"PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


class Answer(NamedTuple):
    """Exit code of a command and what it printed."""

    code: int
    out: str
    err: str


class CommandLine:
    """The command line in this process, which has loaded its libraries already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def answer(self, *words: object) -> Answer:
        """Run a command, however it ends."""
        self.monkeypatch.setattr(sys, "argv", ["darkroom", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return Answer(int(end.value.code or 0), *self.capsys.readouterr())

    def __call__(self, *words: object, code: int = 0) -> str:
        """Standard output of a command that ends with ``code``."""
        answer = self.answer(*words)
        assert answer.code == code, answer.err
        return answer.out

    def json(self, *words: object) -> Any:
        """The object that a command prints."""
        return json.loads(self(*words, "--json"))

    def mistake(self, *words: object) -> str:
        """The one line with which a command ends, besides the exit code of a user's mistake."""
        answer = self.answer(*words)
        assert answer.code == 2, answer.err
        [line] = answer.err.splitlines()
        return line


def output_of(command: Sequence[str | Path], **options: Any) -> str:
    """What a program prints, which must succeed; ``options`` are those of ``subprocess.run``."""
    process = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout
