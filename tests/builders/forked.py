"""A process that has imported what commands need, and forks one command after the other: ``Forks``.

Most of a command's time is the import of torch, MLflow and Prefect, and most of what is killed at random moments would
be killed in it. A fork begins where these are done; all after it is the command line itself: it reads its arguments,
joins the servers, and ends as any program does. Whatever is in a fork belongs to a session of its own.
"""

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

PATIENCE = 120
"""Seconds within which a command that was terminated has ended, on any machine."""
ROUND = 5
"""Strikes at one piece of work before it is ended: more of them would find it done."""

PROGRAM = """#!{python}
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
socket.send_fds(connection, [json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]).encode()], [1, 2])
pid, code = connection.makefile().read().split()
sys.exit(int(code))
"""


def rounds(strikes: int) -> Iterator[int]:
    """How often to strike at each of several pieces of work."""
    while strikes > 0:
        yield min(ROUND, strikes)
        strikes -= ROUND


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


class Fork:
    """A command in a fork, as ``subprocess.Popen`` shows one."""

    def __init__(self, connection: socket.socket, outputs: tuple[Path, Path]) -> None:
        self.connection, self.outputs = connection, outputs
        self.returncode: int | None = None
        self.pid = int(self._line())

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or the negative signal that ended it; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self._line())
            except TimeoutError as error:
                raise subprocess.TimeoutExpired("darkroom", timeout or 0) from error
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        try:
            return self.wait(0.001)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, once it has ended."""
        self.wait(timeout)
        out, errors = (path.read_text() for path in self.outputs)
        return out, errors

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            piece = self.connection.recv(1)
            assert piece, "the process that forks is gone"
            line += piece
        return line.decode()


class Forks:
    """The process that forks, in the environment that commands get."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = dict(variables)
        self.temporary = TemporaryDirectory(prefix="forks-")
        self.folder = Path(self.temporary.name)
        self.address = str(self.folder / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen()
        with listener, (self.folder / "forks.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.builders.forked", str(listener.fileno())],
                cwd=self.folder,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
            )
        self.count = 0

    def start(self, folder: Path, *arguments: str, **variables: str | None) -> Fork:
        """The command line with ``arguments`` in ``folder``; other ``variables`` than usual, None for those unset."""
        self.count += 1
        outputs = self.folder / f"fork-{self.count}.out", self.folder / f"fork-{self.count}.err"
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(600)  # on a busy machine the imports take minutes
        connection.connect(self.address)
        with ExitStack() as files:
            numbers = [files.enter_context(path.open("wb")).fileno() for path in outputs]
            socket.send_fds(connection, [json.dumps([str(folder), variables, arguments]).encode()], numbers)
        return Fork(connection, outputs)

    def finish(self, folder: Path, *arguments: str, codes: Collection[int] = (0,), **variables: str | None) -> str:
        """What the command prints, which ends with one of ``codes``."""
        process = self.start(folder, *arguments, **variables)
        out, errors = process.communicate(timeout=600)
        assert process.returncode in codes, errors[-3000:]
        return out

    def strike(
        self,
        number: signal.Signals,
        moment: float,
        folder: Path,
        *arguments: str,
        codes: Collection[int] = (0,),
        **variables: str | None,
    ) -> None:
        """Send a signal to the command after ``moment`` seconds, and require that it ends as programs do.

        SIGKILL goes to all its processes, as when a machine goes down; any other to the first one alone, as from
        Kubernetes and systemd: it has to end its children itself, and says no more than lines.
        """
        process = self.start(folder, *arguments, **variables)
        time.sleep(moment)
        with suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=PATIENCE)
        # One of ``codes`` where it was done before.
        assert process.returncode in (*codes, -number, 128 + number), errors[-3000:]
        assert "Traceback" not in errors, errors[-6000:]
        deadline = time.monotonic() + PATIENCE
        while survivors := [each for each in psutil.process_iter() if _session(each.pid) == process.pid]:
            assert time.monotonic() < deadline, survivors
            time.sleep(0.1)

    def write_program(self, path: Path) -> None:
        """Write a program for shells that has its arguments done in a fork, in the folder and environment of the call.

        Servers are those of this process, whatever the environment names.
        """
        path.write_text(PROGRAM.format(python=sys.executable, address=self.address))
        path.chmod(0o755)

    def close(self) -> None:
        """Fork no more."""
        self.process.kill()
        self.process.wait()
        self.temporary.cleanup()


def await_command(listener: socket.socket) -> list[str]:
    """Fork for each request of a command; returns in the forks alone, with the arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, outputs, _, _ = socket.recv_fds(connection, 2**17, 2)
        folder, variables, arguments = json.loads(request)
        if pid := os.fork():
            connection.sendall(f"{pid}\n".encode())
            _, status = os.waitpid(pid, 0)
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        connection.close()
        os.setsid()
        for number, output in enumerate(outputs, 1):
            os.dup2(output, number)
            os.close(output)
        os.chdir(folder)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        return list(arguments)


def main() -> None:
    """Import, and fork."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.setblocking(True)
    from flows.cli import main as command_line
    from flows.cli.command import connect

    start = time.monotonic()
    with connect("prefect", "mlflow", "s3"):
        import torch._dynamo  # noqa: F401 (as the first optimizer does)

        import flows.evaluate
        import flows.gc
        import flows.promote
        import flows.registry.import_model
        import flows.retrain
        import flows.sample
        import flows.sweep
        import flows.takedown
        import flows.train  # noqa: F401
    # What is here stays, and to look at it again in each fork would copy its pages.
    gc.freeze()
    print(f"ready after {time.monotonic() - start:.1f} s", flush=True)
    sys.argv = ["darkroom", *await_command(listener)]
    try:
        command_line()
        code: object = 0
    except SystemExit as end:
        code = end.code
    # As any program ends, but for taking apart what was imported, which takes seconds.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else bool(code))


if __name__ == "__main__":
    main()
