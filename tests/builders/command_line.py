"""The command line, in this process or, as other programs, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from flows.cli import main
from tests.builders import ROOT


def without_servers(**more: str) -> dict[str, str]:
    """This process's environment, in which no server is known but for ``more`` variables."""
    servers = ("AWS_", "DARKROOM_", "MLFLOW_", "PREFECT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(servers)}
    return kept | {"PYTHONPATH": str(ROOT), **more}


@contextmanager
def servers_forgotten(**more: str) -> Iterator[None]:
    """The same in this process, restored afterwards."""
    with mock.patch.dict(os.environ, without_servers(**more), clear=True):
        yield


def darkroom_command(*arguments: str) -> list[str]:
    """The command line of this working tree."""
    return [sys.executable, "-c", "from flows.cli import main; main()", *arguments]


def start(folder: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """Begin a command in a process of its own, in which no server is known but for ``more`` variables."""
    return subprocess.Popen(
        darkroom_command(*arguments),
        cwd=folder,
        env=without_servers(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def darkroom(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command so to its end."""
    process = start(folder, *arguments, **more)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def one_after_the_other(
    folder: Path, commands: Sequence[str], libraries: Sequence[str], begin: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run commands in one process that does ``begin`` first: a line each with the exit code and what it has loaded."""
    script = f"""
import sys
from flows.cli import main
{begin}
for words in {tuple(commands)}:
    sys.argv = ["darkroom", *words.split()]
    try:
        main()
    except SystemExit as ended:
        print(ended.code, *sorted(set({tuple(libraries)}) & set(sys.modules)))
"""
    command, variables = [sys.executable, "-c", script], without_servers(**more)
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


class Answer(NamedTuple):
    """Exit code of a command and what it printed."""

    code: int
    out: str
    err: str


class CommandLine:
    """The command line in this process, which has loaded its libraries already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *verb: str) -> None:
        self.monkeypatch, self.capsys, self.verb = monkeypatch, capsys, verb

    def answer(self, *words: object) -> Answer:
        """Run a command, however it ends."""
        self.monkeypatch.setattr(sys, "argv", ["darkroom", *self.verb, *map(str, words)])
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
