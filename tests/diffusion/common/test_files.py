"""Files are seen whole or not at all, whoever else writes them, and whenever somebody is killed."""

import errno
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch

from diffusion.checkpoints import save_tensors
from diffusion.common.errors import DarkroomError
from diffusion.common.files import PARTIAL, is_full_disk, remove_partials, write_atomically, write_bytes
from tests.builders import ROOT

WRITER = """
import sys
from pathlib import Path
from diffusion.common.files import write_bytes
for _ in range(200):
    write_bytes(Path(sys.argv[1]), sys.argv[2].encode() * 100_000)
"""


@contextmanager
def writer(path: Path, letter: str) -> Iterator[Popen[str]]:
    """Another process that writes ``path`` again and again."""
    command = [sys.executable, "-c", WRITER, str(path), letter]
    with Popen(command, stderr=PIPE, text=True, cwd=ROOT) as process:
        yield process


def test_concurrent_writers_never_expose_a_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    looks = set()
    with writer(path, "a") as first, writer(path, "b") as second:
        while first.poll() is None or second.poll() is None:
            if path.exists():
                data = path.read_bytes()
                looks.add((data[:1], len(data), len(set(data))))
        assert (first.returncode, second.returncode) == (0, 0), f"{first.stderr}{second.stderr}"
    assert {(length, letters) for _, length, letters in looks} == {(100_000, 1)}
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_failed_writer_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(partial: Path) -> None:
        partial.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"old")]


def test_tensors_have_the_permissions_of_other_files(tmp_path: Path) -> None:
    write_bytes(tmp_path / "other", b"")
    save_tensors(tmp_path / "some.safetensors", {"x": torch.zeros(1)}, {})
    assert (tmp_path / "some.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_partial_files_of_killed_writers_are_recognized_and_removed(tmp_path: Path) -> None:
    def looking(partial: Path) -> None:
        partial.write_bytes(b"begun")
        assert PARTIAL.fullmatch(partial.name)
        os.link(partial, tmp_path / f".left.{'0' * 32}.partial")  # as a kill would

    write_atomically(tmp_path / "folder" / "file", looking)
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]


def chained(cause: BaseException) -> DarkroomError:
    error = DarkroomError("it cannot be written")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "", "file"), True),
        (OSError(errno.EDQUOT, ""), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (sqlite3.OperationalError("database or disk is full"), True),
        (chained(OSError(errno.ENOSPC, "")), True),
        (chained(chained(OSError(errno.ENOSPC, ""))), True),
        (ExceptionGroup("two", [ValueError(), chained(OSError(errno.ENOSPC, ""))]), True),
        (OSError(errno.EACCES, "denied"), False),
        (chained(ValueError()), False),
    ],
)
def test_a_full_disk_is_recognised_behind_other_errors(error: Exception, expected: bool) -> None:
    assert is_full_disk(error) is expected
