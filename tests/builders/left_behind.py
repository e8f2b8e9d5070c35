"""Processes that a killed command leaves behind, found by a variable that all its descendants inherit."""

import time
from uuid import uuid4

import psutil

MARK = "DARKROOM_DRILL"
PATIENCE = 30.0
"""Seconds within which children of a killed process are to end, on a busy machine."""


def new_process_tag() -> dict[str, str]:
    """A variable for the environment of a command, with a value that no other command has."""
    return {MARK: uuid4().hex}


def descendants(mark: dict[str, str]) -> list[psutil.Process]:
    """All live processes that were started with ``mark`` in their environment, the command itself included."""
    return [process for process in psutil.process_iter() if _has(process, mark[MARK])]


def left_behind(mark: dict[str, str]) -> list[str]:
    """Command lines of the descendants that still live after PATIENCE; kills them."""
    deadline = time.monotonic() + PATIENCE
    while (living := descendants(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    processes = []
    for process in living:
        try:
            processes.append(" ".join(process.cmdline())[:200])
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return processes


def _has(process: psutil.Process, value: str) -> bool:
    try:
        return process.environ().get(MARK) == value
    except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
        return False  # Of another user, or gone, or a zombie.
