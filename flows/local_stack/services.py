"""Services of the local stack: commands, environments and health checks."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path

import psutil

from diffusion.common.child_processes import child_environment
from diffusion.common.files import digest_of
from flows.environment import DEFAULTS, SERVER_PREFIXES, SERVERS, WORKER_VARIABLES, Server, loopback_no_proxy
from flows.local_stack import seaweedfs
from flows.local_stack.http_api import NotServingError, request_json
from flows.local_stack.server_process import LOOPBACK, Process, marks, start
from flows.local_stack.stack import LocalStack, ServiceName, write_private
from flows.storage.s3 import Store, client

PROXIES = tuple(form(f"{kind}_proxy") for kind in ("http", "https", "all") for form in (str.lower, str.upper))
POOL = "darkroom"  # process work pool of the stack's worker
MAX_WAIT = 10.0  # seconds in which a running server answers, also on a busy machine


@dataclass(frozen=True)
class Service:
    """One long-lived process of the stack."""

    name: ServiceName
    title: str
    command: list[str]
    environment: dict[str, str]
    cwd: Path
    check: Callable[[Process], None]
    """Health check of the running process; raises DarkroomError if it fails."""
    files: dict[str, str] = field(default_factory=dict)
    """Contents of files that are written to ``cwd`` at the start, by name; readable by the owner alone."""
    after: ServiceName | None = None
    """Service that must answer before this one is started."""

    @property
    def spec(self) -> str:
        """Digest of the start settings; a live process with another one is out of date."""
        return digest_of([self.command, self.environment, str(self.cwd), self.files])

    def start(self, stack: LocalStack) -> Process:
        """Start the service as a detached process."""
        variables = child_environment(PROXIES)
        if self.name == "worker":  # whose flows need the keys of sources and captioners
            variables = {name: value for name, value in os.environ.items() if not name.startswith(SERVER_PREFIXES)}
        environment = variables | loopback_no_proxy() | self.environment | marks(stack.folder, self.name)
        self.cwd.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            write_private(self.cwd / name, text)
        return start(self.command, environment, self.cwd, stack.log(self.name), self.spec)


def services(stack: LocalStack) -> list[Service]:
    """Services of ``stack`` with its current ports."""
    order: list[tuple[Server, Callable[[LocalStack], Service]]]
    order = [("s3", _s3), ("mlflow", _mlflow), ("prefect", _prefect), ("prefect", _worker)]
    return [build(stack) for server, build in order if stack.serves(server)]


def _s3(stack: LocalStack) -> Service:
    credentials = stack.credentials

    @cache  # boto3 takes half a second to make one.
    def store() -> Store:
        return Store(client(attempts=1, read_timeout=5, variables=stack.variables("s3")))

    def check(_: Process) -> None:
        store().ensure_bucket(stack.bucket)

    command = seaweedfs.command([stack.state.ports[name] for name in seaweedfs.PORTS])
    files = seaweedfs.files(
        seaweedfs.config(credentials.s3_access_key, credentials.s3_secret_key), credentials.s3_tls_identity
    )
    return Service("s3", "S3 (SeaweedFS)", command, seaweedfs.ENVIRONMENT, stack.folder / "s3", check, files)


def _mlflow(stack: LocalStack) -> Service:
    credentials = stack.credentials

    def check(_: Process) -> None:
        url = f"{stack.url('mlflow')}/api/2.0/mlflow/experiments/search?max_results=1"
        request_json(url, f"{credentials.mlflow_username}:{credentials.mlflow_password}", timeout=MAX_WAIT)

    command = [
        *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"),
        *("--host", LOOPBACK, "--port", str(stack.state.ports["mlflow"]), "--workers", "1"),
        *("--backend-store-uri", "sqlite:///mlflow.db"),
        *("--artifacts-destination", f"s3://{stack.bucket}/mlflow"),
    ]
    environment = (
        DEFAULTS
        | _client_environment(stack, "s3")
        | {
            "MLFLOW_AUTH_CONFIG_PATH": "auth.ini",
            "MLFLOW_AUTH_ADMIN_PASSWORD": credentials.mlflow_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": credentials.mlflow_secret_key,
            # Without it, no process could read the secrets of webhooks that an earlier one wrote.
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": credentials.mlflow_webhook_key,
            # Jobs evaluate language models; each of their queues would be another process.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            # The default has 10.*, which matches names like 10.example.com: a DNS rebinding risk.
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"localhost,localhost:*,{LOOPBACK},{LOOPBACK}:*",
        }
        # To where webhooks may lead, how often and how long they are tried.
        | {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_WEBHOOK_")}
    )
    if {"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"} & environment.keys():
        environment["MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"] = "path"
    files = {"auth.ini": MLFLOW_AUTH.format(user=credentials.mlflow_username)}
    return Service("mlflow", "MLflow", command, environment, stack.folder / "mlflow", check, files)


MLFLOW_AUTH = """\
[mlflow]
default_permission = READ
database_uri = sqlite:///auth.db
admin_username = {user}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# Password hashes are slow on purpose; caching is safe with one server process.
auth_cache_ttl_seconds = 3600
"""


def _prefect(stack: LocalStack) -> Service:
    port = str(stack.state.ports["prefect"])

    def check(_: Process) -> None:
        request_json(f"{stack.url('prefect')}/api/health", timeout=MAX_WAIT)
        # Unlike health, this needs the password.
        version = f"{stack.url('prefect')}/api/admin/version"
        request_json(version, stack.credentials.prefect_auth_string, timeout=MAX_WAIT)

    command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", port]
    environment = (
        DEFAULTS
        | {
            "PREFECT_HOME": str(stack.folder / "prefect"),
            "PREFECT_SERVER_API_AUTH_STRING": stack.credentials.prefect_auth_string,
            # The default allows any origin.
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": stack.url("prefect"),
            "PREFECT_SERVER_UI_API_URL": f"{stack.url('prefect')}/api",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            # Clients keep a connection for 25 s: one that the server closes earlier costs their next call 2 s.
            "PREFECT_SERVER_API_KEEPALIVE_TIMEOUT": "60",
        }
        | {f"PREFECT_SERVER_SERVICES_{name}_LOOP_SECONDS": str(seconds) for name, seconds in PREFECT_LOOPS.items()}
    )
    return Service("prefect", "Prefect", command, environment, stack.folder / "prefect", check)


PREFECT_LOOPS = dict.fromkeys(("PAUSE_EXPIRATIONS", "CLEANUP_RECONCILER", "CANCELLATION_CLEANUP"), 60)
PREFECT_LOOPS |= {"LATE_RUNS": 15, "SCHEDULER_RECENT_DEPLOYMENTS": 15, "FOREMAN": 30}
"""Seconds between polls of the database, which seldom changes on one machine; they delay only what can wait, such as a
new schedule's first run and the cleanup of cancelled runs."""


def _worker(stack: LocalStack) -> Service:
    def check(process: Process) -> None:
        url = f"{stack.url('prefect')}/api/work_pools/{POOL}/workers/filter"
        workers = request_json(url, stack.credentials.prefect_auth_string, {}, MAX_WAIT)
        start_time = psutil.Process(process.pid).create_time()
        # A dead worker stays online on the server for a while.
        online = [worker["last_heartbeat_time"] for worker in workers if worker["status"] == "ONLINE"]
        if not any(datetime.fromisoformat(beat).timestamp() > start_time for beat in online):
            raise NotServingError(f"the worker has not reported to the work pool {POOL}")

    command = [
        *(sys.executable, "-m", "prefect", "worker", "start"),
        *("--pool", POOL, "--type", "process", "--name", "local"),
    ]
    environment = DEFAULTS | {"DARKROOM_HOME": str(stack.folder), "DARKROOM_BUCKET": stack.bucket}
    environment |= {name: os.environ[name] for name in WORKER_VARIABLES if name in os.environ}
    for server in SERVERS:
        environment |= _client_environment(stack, server)
    return Service("worker", "Prefect worker", command, environment, stack.folder.parent, check, after="prefect")


def _client_environment(stack: LocalStack, server: Server) -> dict[str, str]:
    if stack.serves(server):
        return stack.variables(server)
    prefix = {"mlflow": "MLFLOW_", "prefect": "PREFECT_", "s3": "AWS_"}[server]
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}
