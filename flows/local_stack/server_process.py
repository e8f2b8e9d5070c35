"""Server processes that outlive the command that started them, identified by their environment; free ports."""

import os
import random
import socket
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import psutil

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError

LOOPBACK = "127.0.0.1"
GRPC = 10_000  # offset of SeaweedFS's gRPC port from each of its ports
PORT_RANGE = range(10_000, 22_000)  # candidate ports; even with ``GRPC`` added they are below the ephemeral ports
FOLDER_MARK = "DARKROOM_STACK"
SERVICE_MARK = "DARKROOM_SERVICE"
"""Environment variables that mark all processes of the stack, including descendants."""
LOG_BYTES = 16 * 2**20  # size above which a log is rotated when its service starts


class Process(Config):
    """A started process."""

    pid: int
    spec: str


def start(command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path, spec: str) -> Process:
    """Start ``command`` in a new session, with its output in ``log``."""
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
    # Polling servers must not slow down the threads of a training.
    process.nice(5)
    # Linux shows no environment while a program is being loaded, and the environment identifies the process.
    while child.poll() is None and not process.environ():
        time.sleep(0.001)
    # Popen would warn about a running child when the object is collected.
    child.returncode = 0
    return Process(pid=child.pid, spec=spec)


def marks(folder: Path, service: str) -> dict[str, str]:
    """Environment variables that identify a process for ``members``."""
    return {FOLDER_MARK: str(folder), SERVICE_MARK: service}


def is_member(pid: int, folder: Path, *services: str) -> bool:
    """Whether process ``pid`` lives and was started for one of ``services`` by the stack in ``folder``."""
    # The environment tells: PIDs are reused, and start times shift with the clock.
    try:
        environment = psutil.Process(pid).environ()
    except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
        return False  # Another user's process, a finished one, or a zombie.
    return environment.get(FOLDER_MARK) == str(folder) and environment.get(SERVICE_MARK) in services


def members(folder: Path, *services: str) -> list[psutil.Process]:
    """All live processes of ``services`` of the stack in ``folder``, with descendants and ``info["cmdline"]``."""
    processes = (process for process in psutil.process_iter(["cmdline"]) if process.pid != os.getpid())
    return [process for process in processes if is_member(process.pid, folder, *services)]


def stop(processes: Sequence[psutil.Process], grace: float) -> None:
    """Terminate ``processes``, and kill those that still live after ``grace`` seconds."""
    for send_signal in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            try:
                send_signal(process)
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(processes, timeout=grace)
        if not alive:
            return
        processes = alive


def are_free(ports: Iterable[int]) -> bool:
    """Whether all of ``ports`` and their gRPC ports are free to listen on."""
    for port in (number + offset for number in ports for offset in (0, GRPC)):
        with socket.socket() as probe:
            # As servers do: ports in TIME_WAIT count as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                return False
    return True


def choose_ports(count: int, taken: Collection[int] = ()) -> list[int]:
    """Choose ``count`` different free ports, none of them in ``taken``."""
    candidates = (port for port in random.SystemRandom().sample(PORT_RANGE, 1000) if port not in taken)
    ports = list(islice((port for port in candidates if are_free([port])), count))
    if len(ports) < count:
        raise DarkroomError(f"no {count} free ports between {PORT_RANGE.start} and {PORT_RANGE.stop}")
    return ports
