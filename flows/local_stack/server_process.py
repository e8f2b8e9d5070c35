"""Processes that outlive the command that started them, and are known again by the next one."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from diffusion.common.config import Config

FOLDER_MARK = "DARKROOM_STACK"
SERVICE_MARK = "DARKROOM_SERVICE"
"""In the environment of all that the stack started, down to the last descendant."""
NICENESS = 5
"""How far the servers stand back for other work on this machine."""
LOG_BYTES = 16 * 2**20
"""A longer log is set aside when its service starts again."""


class Process(Config):
    """A process that was started."""

    pid: int
    spec: str
    """Digest of how it was started."""

    def began(self) -> float:
        """When it began, in seconds of Unix time; raises psutil.NoSuchProcess."""
        return psutil.Process(self.pid).create_time()


def start(command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path, spec: str) -> Process:
    """Start ``command`` in a session of its own, writing to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".old.log"))
    with log.open("ab") as file:
        child = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process = psutil.Process(child.pid)
    # Servers that poll beside a training make its threads wait for each other; they can wait instead.
    process.nice(NICENESS)
    # Linux shows no environment while a program is being loaded, and by it the process is known as ours.
    while child.poll() is None and not process.environ():
        time.sleep(0.001)
    # It is meant to live on: without this, Popen complains when the object goes.
    child.returncode = 0
    return Process(pid=child.pid, spec=spec)


def marks(folder: Path, service: str) -> dict[str, str]:
    """The variables by which ``members`` finds a process."""
    return {FOLDER_MARK: str(folder), SERVICE_MARK: service}


def is_member(pid: int, folder: Path, *services: str) -> bool:
    """Whether process ``pid`` lives and was started for one of ``services`` by the stack in ``folder``.

    What is asked is the process itself: numbers are used again, and start times shift with the clock.
    """
    try:
        environment = psutil.Process(pid).environ()
    except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
        return False  # Another user's, or gone, or a zombie: none of ours.
    return environment.get(FOLDER_MARK) == str(folder) and environment.get(SERVICE_MARK) in services


def members(folder: Path, *services: str) -> list[psutil.Process]:
    """All live processes that the stack in ``folder`` started for ``services``, and their descendants.

    Each has its command line in ``info["cmdline"]``.
    """
    others = (process for process in psutil.process_iter(["cmdline"]) if process.pid != os.getpid())
    return [process for process in others if is_member(process.pid, folder, *services)]


def stop(processes: Sequence[psutil.Process], grace: float) -> None:
    """Ask ``processes`` to end, and end those that still live after ``grace`` seconds."""
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            try:
                ask(process)
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(processes, timeout=grace)
        if not alive:
            return
        processes = alive
