"""Control of the local stack: ``up``, ``status``, ``down`` and ``exports``."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import FULL_DISK, is_full_disk
from flows.environment import SERVER_TITLES, SERVERS, Server, loopback_no_proxy, settings
from flows.local_stack import seaweedfs
from flows.local_stack.server_process import are_free, choose_ports, members, stop
from flows.local_stack.services import Service, services
from flows.local_stack.stack import SERVICES, LocalStack, ServiceName, servers_in_environment

Report = Callable[[str], None]

RESTORING = "restoring.json"  # state file in the stack's folder during ``darkroom server restore``
PATIENCE = 300.0  # seconds within which the next service must answer; a first start may take minutes on a busy machine
HUNG = 60.0  # seconds after which an earlier process that does not answer is restarted, though it may be starting still
GRACE = 15.0  # seconds between SIGTERM and SIGKILL


class ServiceStatus(Config):
    """Current status of a service."""

    name: ServiceName
    title: str
    state: Literal["running", "not answering", "stopped"]
    url: str
    pid: int | None
    log: Path


class StackStatus(Config):
    """Current status of the local stack."""

    folder: Path
    credentials: Path | None
    """File with the passwords; None without a local stack."""
    services: tuple[ServiceStatus, ...]
    elsewhere: dict[Server, str]


def up(report: Report, restoring: bool = False) -> StackStatus:
    """Start the servers that the environment does not name and that do not run yet; returns when all answer.

    Raises DarkroomError with the log of a service that does not start, and UserError after an incomplete restore.
    """
    external_servers = servers_in_environment()
    if len(external_servers) < len(SERVERS):
        environment = settings()
        folder = environment.folder
        with _lock(folder, report):
            # The servers would create the missing databases, empty.
            if (folder / RESTORING).exists() and not restoring:
                raise UserError(
                    f"a restore into {folder} did not end: give `darkroom server restore` of the same backup again, or "
                    "set DARKROOM_HOME to another folder"
                )
            stack = LocalStack.open(folder, environment.bucket)
            if os.environ.get("DARKROOM_BUCKET", stack.bucket) != stack.bucket:
                raise UserError(
                    f"DARKROOM_BUCKET is {environment.bucket}, but the data of the stack in {folder} is in its bucket "
                    f"{stack.bucket}: unset it, or begin a new stack in another DARKROOM_HOME"
                )
            _start_all(_configure(stack, external_servers), report)
    for server, variable in external_servers.items():
        report(f"{SERVER_TITLES[server]}: commands here use the server in {variable}, not the local stack")
    return status()


def status() -> StackStatus:
    """Check the services of the local stack with real requests."""
    folder = settings().folder
    stack = LocalStack.read(folder)
    statuses: tuple[ServiceStatus, ...] = ()
    if stack is not None:
        with ThreadPoolExecutor(len(SERVICES)) as pool:
            statuses = tuple(pool.map(partial(_status, stack), services(stack)))
    return StackStatus(
        folder=folder,
        credentials=folder / "credentials.json" if stack else None,
        services=statuses,
        elsewhere=servers_in_environment(),
    )


def down(report: Report) -> None:
    """Stop all processes of the local stack; its data stays on disk."""
    folder = settings().folder
    if not folder.exists() and not members(folder, *SERVICES):
        report(f"no local stack in {folder}")
        return
    with _lock(folder, report):
        # The worker first, so that it can still report to Prefect; S3 last, as MLflow uses it.
        for names in (("worker",), ("mlflow", "prefect"), ("s3",)):
            if processes := members(folder, *names):
                report(f"stopping {', '.join(names)}")
                # Flow runs are children of the worker.
                execute = {"flow-run", "prefect.flow_engine"}
                flow_runs = [process for process in processes if execute & set(process.info["cmdline"] or ())]
                stop(processes, GRACE)
                if flow_runs:
                    report(
                        "a flow run was stopped: after `darkroom up`, start it again, and it goes on from the last "
                        "checkpoint"
                    )
        if (stack := LocalStack.read(folder)) is not None:
            stack.update_state(processes={})
    report("the local stack is stopped; `darkroom up` starts it again with its data")


def exports() -> dict[str, str]:
    """Variables that connect other clients to the servers of the local stack; raises UserError if one does not run."""
    external_servers = servers_in_environment()
    stack = LocalStack.read(settings().folder)
    variables: dict[str, str] = {}
    for server in (name for name in SERVERS if name not in external_servers):
        if stack is None or not stack.runs(server):
            raise UserError(f"no local {SERVER_TITLES[server]} server runs in {settings().folder}: run `darkroom up`")
        variables |= stack.variables(server) | loopback_no_proxy()
        variables |= {"DARKROOM_HOME": str(stack.folder), "DARKROOM_BUCKET": stack.bucket}
    return variables


@contextmanager
def _lock(folder: Path, report: Report) -> Iterator[None]:
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.acquire(timeout=0.5)
    except Timeout:  # which is an OSError
        report(f"waiting for another `darkroom up` or `down` in {folder}")
        lock.acquire()
    except OSError as error:
        if is_full_disk(error):
            raise
        raise UserError(
            f"{folder} is not a folder that can be written to ({error.strerror}): set DARKROOM_HOME to one"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _configure(stack: LocalStack, external_servers: dict[Server, str]) -> LocalStack:
    """Give the stack the servers that the environment does not name, on their previous ports if these are free."""
    local_servers = [server for server in SERVERS if server not in external_servers or stack.serves(server)]
    if "s3" in local_servers:
        seaweedfs.binary()
        if stack.serves("mlflow") and not stack.serves("s3"):
            raise UserError(
                f"the MLflow server in {stack.folder} keeps its artifacts on an S3 server that the environment used "
                "to name: set the AWS_* variables again, or begin a new stack in another DARKROOM_HOME"
            )
    numbers = dict(stack.state.ports)
    for server in local_servers:
        names = seaweedfs.PORTS if server == "s3" else (server,)
        if stack.process(server) is None:
            # The children of a killed server may still hold its port.
            _halt(stack, server)
            if not are_free(numbers[name] for name in names if name in numbers):
                numbers = {name: port for name, port in numbers.items() if name not in names}
        new_names = [name for name in names if name not in numbers]
        numbers |= zip(new_names, choose_ports(len(new_names), numbers.values()), strict=True)
    return stack.update_state(servers=tuple(local_servers), ports=numbers)


def _start_all(stack: LocalStack, report: Report) -> None:
    start, queue = time.monotonic(), services(stack)
    answered = start
    new_services: set[ServiceName] = set()
    for service in queue:
        if (process := stack.process(service.name)) is not None and process.spec != service.spec:
            report(f"{service.title}: restarted, because its settings changed")
            _halt(stack, service.name)
    while queue:
        for service in list(queue):
            if any(other.name == service.after for other in queue):
                continue
            if stack.process(service.name) is None:
                if service.name in new_services:
                    raise _failure(stack, service, "ended at once")
                _halt(stack, service.name)
                stack = stack.update_state(processes={**stack.state.processes, service.name: service.start(stack)})
                new_services.add(service.name)
            if _serves(stack, service):
                queue.remove(service)
                answered = time.monotonic()
                report(f"{service.title}: {stack.url(service.name)} ({time.monotonic() - start:.0f} s)")
            elif service.name not in new_services and time.monotonic() - start > HUNG:
                report(f"{service.title}: restarted, because it did not answer")
                _halt(stack, service.name, grace=2)
            elif time.monotonic() - answered > PATIENCE:
                problem = f"did not answer within {PATIENCE:.0f} s (on a busy machine run `darkroom up` again)"
                raise _failure(stack, service, problem)
        time.sleep(0.1)


def _halt(stack: LocalStack, service: ServiceName, grace: float = GRACE) -> None:
    processes = members(stack.folder, service)
    if service == "worker":
        # Flow runs that outlive their worker finish on their own, and report to Prefect themselves.
        processes = [process for process in processes if "worker" in (process.info["cmdline"] or ())]
    stop(processes, grace)


def _serves(stack: LocalStack, service: Service) -> bool:
    if (process := stack.process(service.name)) is None:
        return False
    try:
        service.check(process)
    except (DarkroomError, psutil.NoSuchProcess):
        return False
    return True


def _status(stack: LocalStack, service: Service) -> ServiceStatus:
    process = stack.process(service.name)
    return ServiceStatus(
        name=service.name,
        title=service.title,
        state="stopped" if process is None else "running" if _serves(stack, service) else "not answering",
        url=stack.url(service.name),
        pid=process and process.pid,
        log=stack.log(service.name),
    )


def _failure(stack: LocalStack, service: Service, problem: str) -> DarkroomError:
    log = stack.log(service.name)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # What a full disk leads to says less than what reports it.
    line = next(filter(FULL_DISK.search, reversed(lines[-100:])), (lines or ["nothing"])[-1])
    return DarkroomError(f"{service.title} {problem}; the last line of {log} is: {line[:300]}")
