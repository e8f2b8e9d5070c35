"""The services of compose.yaml as plain processes on this machine: its very commands, environments and checks."""

import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from flows.local_stack.server_process import choose_ports
from tests.builders.command_line import darkroom_command, without_servers
from tests.builders.installation import INFRA, composed, new_environment

PORTS = ("5432", "9333", "9340", "8888", "23646", "8333", "5000", "4200", "8080")
"""Those of compose.yaml; here each becomes one that is free."""
PATIENCE = 300.0
"""Seconds that a service has to become healthy: databases are made at the first start."""


@dataclass
class Servers:
    """What runs, and how it is found."""

    folder: Path
    services: dict[str, dict[str, Any]]
    secrets: dict[str, str]
    numbers: dict[str, str] = field(default_factory=dict)

    def here(self, text: str, service: str = "") -> str:
        """``text`` of compose.yaml with this machine's addresses and places in it."""
        text = re.sub(r"\b(mlflow|prefect|s3|store)(?=:\d)", "127.0.0.1", text)
        text = re.sub(r"(?<=[:=])\d{4,5}\b", lambda match: self.numbers.get(match[0], match[0]), text)
        text = self.numbers.get(text, text).replace("0.0.0.0", "127.0.0.1").replace("-ip=store", "-ip=127.0.0.1")
        places = {
            "/run/secrets/s3.json": self.folder / "s3.json",
            "/etc/darkroom": INFRA / "docker",
            "/tmp/prefect": self.folder / f"prefect-{service}",
            "-dir=/data": f"-dir={self.folder / 'objects'}",
            "/work": self.folder / "work",
        }
        # In one pass: this checkout may itself lie in a folder of one of these names.
        return re.sub("|".join(map(re.escape, places)), lambda match: str(places[match[0]]), text)

    def environment(self, service: str) -> dict[str, str]:
        """That of a service, on top of what any process here has."""
        variables = {name: self.here(value, service) for name, value in self.services[service]["environment"].items()}
        for host in ("PGHOST", "PREFECT_SERVER_DATABASE_HOST"):
            if host in variables:
                variables[host] = "127.0.0.1"
        return plain() | variables

    def client(self, role: str = "worker") -> dict[str, str]:
        """The environment of somebody who works with these servers, with the S3 keys of ``role``."""
        keys = {
            f"AWS_{name}": self.secrets[f"{role.upper()}_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
        }
        return self.environment("worker-cpu") | keys | {"PREFECT_HOME": str(self.folder / "prefect-client")}

    def healthy(self, service: str) -> subprocess.CompletedProcess[str]:
        """The service's own health check, once."""
        _, *test = self.services[service]["healthcheck"]["test"]
        command = [self.here(word, service) for word in test]
        if command[0] == "darkroom":
            command = darkroom_command(*command[1:])
        return subprocess.run(
            command, env=self.environment(service), cwd=self.folder, capture_output=True, text=True, check=False
        )

    @contextmanager
    def running(self, *names: str) -> Iterator[None]:
        """These services, started together; inside, all of them are healthy."""
        with ExitStack() as stack:
            processes = {name: stack.enter_context(self._process(name)) for name in names}
            deadline = time.monotonic() + PATIENCE
            for name, process in processes.items():
                while (checked := self.healthy(name)).returncode:
                    late = time.monotonic() > deadline or process.poll() is not None
                    assert not late, f"{name}: {checked.stderr}\n{(self.folder / f'{name}.log').read_text()[-3000:]}"
                    time.sleep(1)
            yield

    @contextmanager
    def _process(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [self.here(word, name) for word in self.services[name]["command"]]
        if command[0] == "darkroom":
            command = darkroom_command(*command[1:])
        with (
            (self.folder / f"{name}.log").open("wb") as log,
            terminate_afterwards(
                subprocess.Popen(
                    command, env=self.environment(name), cwd=self.folder / "work", stdout=log, stderr=subprocess.STDOUT
                )
            ) as process,
        ):
            yield process


@contextmanager
def terminate_afterwards(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Inside, ``process`` runs; afterwards it does not."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def plain() -> dict[str, str]:
    """This process's environment without what names servers, and with the programs of this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = without_servers(PATH=path, OMP_NUM_THREADS="1", DO_NOT_TRACK="true")
    return {name: value for name, value in variables.items() if not name.startswith("PG")}


@contextmanager
def installed(folder: Path) -> Iterator[Servers]:
    """A new installation in ``folder``, of which PostgreSQL runs."""
    secrets = new_environment(folder / ".env")
    (folder / "s3.json").write_text(secrets["S3_CONFIG"])
    for name in ("work", "objects"):
        (folder / name).mkdir()
    numbers = dict(zip(PORTS, map(str, choose_ports(len(PORTS))), strict=True))
    servers = Servers(folder, composed(folder / ".env")["services"], secrets, numbers)
    with _postgres(servers):
        yield servers


@contextmanager
def _postgres(servers: Servers) -> Iterator[None]:
    """A PostgreSQL as the image would make it: by the same arguments and the same file at its first start."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not programs:
        pytest.skip("there is no PostgreSQL: apt-get install postgresql")
    environment, number = servers.environment("postgres"), servers.numbers["5432"]
    # It refuses to run as root; the tests' own folders are nobody else's to enter.
    user = "postgres" if os.geteuid() == 0 else None
    with TemporaryDirectory(prefix="darkroom-postgres-") as name:
        folder = Path(name)
        (folder / "password").write_text(environment["POSTGRES_PASSWORD"])
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, user, pwd.getpwnam(user).pw_gid)
        make = [programs[-1] / "initdb", "--pgdata", folder / "data", "--username=postgres", "--auth-local=trust"]
        make += [*environment["POSTGRES_INITDB_ARGS"].split(), f"--pwfile={folder / 'password'}", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, user=user, cwd=folder)
        serve = [programs[-1] / "postgres", "-D", folder / "data", "-p", number, "-k", folder]
        serve += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (
            (servers.folder / "postgres.log").open("wb") as log,
            terminate_afterwards(subprocess.Popen(serve, stdout=log, stderr=subprocess.STDOUT, user=user, cwd=folder)),
        ):
            deadline = time.monotonic() + 30
            ready = [programs[-1] / "pg_isready", "--quiet", "--host", folder, "--port", number]
            while subprocess.run(ready, check=False).returncode:
                assert time.monotonic() < deadline, (servers.folder / "postgres.log").read_text()
                time.sleep(0.1)
            first = ["psql", "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--host", folder, "--port", number]
            first += ["--username=postgres", f"--file={INFRA / 'docker' / 'databases.sql'}"]
            subprocess.run(first, check=True, capture_output=True, env=environment)
            yield


def query(servers: Servers, user: str, database: str, sql: str) -> str:
    """What PostgreSQL answers to ``user``, who comes with the password that compose.yaml gives; or its refusal."""
    address = ["--host=127.0.0.1", f"--port={servers.numbers['5432']}", f"--username={user}", f"--dbname={database}"]
    password = {"PGPASSWORD": servers.secrets[f"{user.upper()}_DB_PASSWORD"]}
    command = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", *address, f"--command={sql}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=plain() | password)
    return (process.stdout + process.stderr).strip()
