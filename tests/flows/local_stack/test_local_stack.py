"""The local stack with its real servers: started, killed, started again, joined, stopped."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import pytest

from diffusion.common.errors import DarkroomError, UserError
from flows.environment import SERVERS
from flows.local_stack import control as local_stack
from flows.local_stack import seaweedfs
from flows.local_stack.http_api import NotServingError
from flows.local_stack.server_process import GRPC, Process, are_free, choose_ports, members
from flows.local_stack.services import Service
from flows.local_stack.stack import SERVICES, LocalStack, ServiceName, join_servers, new_identity
from flows.storage.s3 import Store, client
from tests.builders import ROOT, intruder
from tests.builders.browser import chromium
from tests.builders.command_line import output_of
from tests.builders.http_server import QuietHandler, serving

COMMAND = (
    "import sys; from flows.local_stack import control; print(control.{}(lambda line: print(line, file=sys.stderr)))"
)


def command(verb: str) -> subprocess.Popen[bytes]:
    """A verb of the stack in a process of its own, which ends before the stack does."""
    return subprocess.Popen([sys.executable, "-c", COMMAND.format(verb)], stderr=subprocess.PIPE)


def pids() -> dict[str, int | None]:
    return {service.name: service.pid for service in local_stack.status().services}


def states() -> dict[str, str]:
    return {service.name: service.state for service in local_stack.status().services}


RUNNING = dict.fromkeys(SERVICES, "running")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the stack that the slow tests share; its name is a trap for those who do not quote."""
    folder = (tmp_path_factory.mktemp("a project, with % and ü") / ".darkroom").resolve()
    yield folder
    for process in members(folder, *SERVICES):
        process.kill()


@pytest.fixture
def up(no_servers: None, home: Path) -> LocalStack:
    """The shared stack, up."""
    os.environ["DARKROOM_HOME"] = str(home)
    local_stack.up(lambda _: None)
    local = LocalStack.read(home)
    assert local is not None
    written = home.with_name("written")
    if not written.exists():
        joined(local, WRITE)
        written.touch()
    return local


def joined(local: LocalStack, program: str) -> str:
    """What a program of somebody else prints that knows nothing but the exports."""
    environment = os.environ | local_stack.exports()
    command = [sys.executable, "-c", program]
    return output_of(command, cwd="/", env=environment).splitlines()[-1]


WRITE = """
import os, boto3, mlflow
boto3.client("s3").put_object(Bucket=os.environ["DARKROOM_BUCKET"], Key="kept", Body=b"on s3")
mlflow.set_experiment("kept")
with mlflow.start_run() as run:
    mlflow.log_text("in mlflow", "a.txt")
from prefect.client.orchestration import get_client
from prefect.variables import Variable
Variable.set("kept", "in prefect", overwrite=True)
with get_client(sync_client=True) as client:
    print(client.read_work_pool("darkroom").type)
"""
READ = """
import json, os, boto3, mlflow
s3, bucket = boto3.client("s3"), os.environ["DARKROOM_BUCKET"]
run = mlflow.search_runs(experiment_names=["kept"], output_format="list")[0]
key = f"mlflow/{run.info.experiment_id}/{run.info.run_id}/artifacts/a.txt"
from prefect.variables import Variable
print(json.dumps([
    s3.get_object(Bucket=bucket, Key="kept")["Body"].read().decode(),
    mlflow.artifacts.load_text(run.info.artifact_uri + "/a.txt"),
    s3.get_object(Bucket=bucket, Key=key)["Body"].read().decode(),
    Variable.get("kept"),
]))
"""


def assert_data_is_intact(local: LocalStack) -> None:
    """Ask each server for what WRITE left, without the seconds in which stock clients are imported."""
    own, store = local.credentials, Store(client(variables=local.variables("s3")))
    assert store.get(local.bucket, "kept") == b"on s3"
    [key] = [key for key in store.list_keys(local.bucket, "mlflow/") if key.endswith("/artifacts/a.txt")]
    assert store.get(local.bucket, key) == b"in mlflow"
    artifact = {"run_uuid": key.split("/")[2], "path": "a.txt"}
    login = own.mlflow_username, own.mlflow_password
    assert httpx.get(f"{local.url('mlflow')}/get-artifact", params=artifact, auth=login, timeout=60).text == "in mlflow"
    user, password = own.prefect_auth_string.split(":")
    variable = httpx.get(f"{local.url('prefect')}/api/variables/name/kept", auth=(user, password), timeout=60)
    assert variable.json()["value"] == "in prefect"


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)


@pytest.mark.slow
def test_the_stack_outlives_its_command_and_stock_clients_join(no_servers: None, home: Path) -> None:
    os.environ["DARKROOM_HOME"] = str(home)
    assert command("up").wait(120) == 0
    assert states() == RUNNING
    assert all(service.url.startswith("http://127.0.0.1:") for service in local_stack.status().services)
    local = LocalStack.read(home)
    assert local is not None
    assert joined(local, WRITE) == "process"
    home.with_name("written").touch()
    assert json.loads(joined(local, READ)) == ["on s3", "in mlflow", "in mlflow", "in prefect"]
    assert_data_is_intact(local)


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
def test_killed_service_restarts_with_all_its_data(up: LocalStack, service: str) -> None:
    before = pids()
    kill(before[service])
    assert states() == {**RUNNING, service: "stopped"} | (
        # Its reports to the dead server are lost, so nobody can say that it works.
        {"worker": "not answering"} if service == "prefect" else {}
    )
    local_stack.up(lambda _: None)
    assert states() == RUNNING
    assert {name for name, pid in pids().items() if pid != before[name]} == {service}
    assert_data_is_intact(up)


@pytest.mark.long
@pytest.mark.drill
@pytest.mark.slow
def test_two_ups_after_a_crash_make_one_stack(up: LocalStack) -> None:
    for process in members(up.folder, *SERVICES):
        process.kill()
    commands = [command("up") for _ in range(2)]
    assert [process.wait(180) for process in commands] == [0, 0]
    assert states() == RUNNING
    leaders = [process for process in members(up.folder, *SERVICES) if os.getsid(process.pid) == process.pid]
    assert {process.pid for process in leaders} == set(pids().values())
    assert_data_is_intact(up)


@pytest.mark.long
@pytest.mark.drill
@pytest.mark.slow
def test_a_service_that_hangs_is_restarted(up: LocalStack) -> None:
    for process in members(up.folder, "mlflow"):
        process.suspend()
    assert states() == {**RUNNING, "mlflow": "not answering"}
    local_stack.up(lambda _: None)
    assert states() == RUNNING
    assert_data_is_intact(up)


@pytest.mark.long
@pytest.mark.drill
@pytest.mark.slow
def test_a_service_moves_from_a_taken_port(up: LocalStack) -> None:
    kill(pids()["s3"])
    old_ports = up.state.ports
    with ExitStack() as open_sockets:
        for name in seaweedfs.PORTS:
            open_sockets.enter_context(socket.create_server(("127.0.0.1", old_ports[name])))
        local_stack.up(lambda _: None)
    assert states() == RUNNING
    moved_stack = LocalStack.read(up.folder)
    assert not {moved_stack.state.ports[name] for name in seaweedfs.PORTS} & set(old_ports.values())
    assert_data_is_intact(moved_stack)


@pytest.mark.long
@pytest.mark.drill
@pytest.mark.slow
def test_killed_startup_can_be_stopped_and_started(up: LocalStack) -> None:
    local_stack.down(lambda _: None)
    half = command("up")
    while len(members(up.folder, *SERVICES)) < 3:
        time.sleep(0.05)
    half.kill()
    half.wait()
    local_stack.down(lambda _: None)
    assert members(up.folder, *SERVICES) == []
    assert set(states().values()) == {"stopped"}
    with pytest.raises(UserError, match="run `darkroom up`"):
        join_servers("s3")
    with pytest.raises(UserError, match="run `darkroom up`"):
        local_stack.exports()
    local_stack.up(lambda _: None)
    assert_data_is_intact(up)


@pytest.mark.long
@pytest.mark.slow
def test_down_finds_what_runs_even_if_the_folder_was_removed(up: LocalStack, tmp_path: Path) -> None:
    moved_folder = tmp_path / "moved"
    up.folder.rename(moved_folder)
    try:
        local_stack.down(lambda _: None)
        assert members(up.folder, *SERVICES) == []
    finally:
        shutil.rmtree(up.folder, ignore_errors=True)
        moved_folder.rename(up.folder)
    local_stack.up(lambda _: None)
    assert_data_is_intact(up)


def answer(url: str, login: tuple[str, str] | None) -> int:
    """HTTP status of a GET."""
    return httpx.get(url, auth=login, timeout=60).status_code


@pytest.mark.slow
def test_missing_or_wrong_passwords_are_rejected(up: LocalStack) -> None:
    own = up.credentials
    user, password = own.prefect_auth_string.split(":")
    doors: list[tuple[str, tuple[str, str]]] = [
        (f"{up.url('prefect')}/api/admin/version", (user, password)),
        (
            f"{up.url('mlflow')}/api/2.0/mlflow/experiments/search?max_results=1",
            (own.mlflow_username, own.mlflow_password),
        ),
    ]
    for url, login in doors:
        assert answer(url, login) == 200
        assert answer(url, None) == 401
        assert answer(url, (login[0], "wrong")) == 401
    assert answer(f"{up.url('s3')}/{up.bucket}/kept", None) == 403


@pytest.mark.slow
def test_only_the_owner_reads_secrets(up: LocalStack) -> None:
    own = up.credentials.model_dump()
    secrets = {value.split(":")[-1] for name, value in own.items() if name not in {"mlflow_username"}}
    secrets -= {up.credentials.s3_access_key}
    assert len(secrets) == 6
    logs = "".join(path.read_text(errors="replace") for path in (up.folder / "logs").iterdir())
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    commands = "\n".join(" ".join(line) for line in lines)
    assert str(up.state.ports["mlflow"]) in commands
    assert not [secret for secret in secrets if secret in logs or secret in commands]
    assert stat.S_IMODE(up.folder.stat().st_mode) == 0o700
    files = [
        path
        for path in up.folder.rglob("*")
        if path.is_file() and path.stat().st_size < 2**20 and any(s.encode() in path.read_bytes() for s in secrets)
    ]
    assert up.folder / "credentials.json" in files
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


@pytest.mark.slow
def test_prefect_keeps_a_connection_that_rests_for_as_long_as_its_clients_do(up: LocalStack) -> None:
    with httpx.Client(limits=httpx.Limits(keepalive_expiry=25)) as client:
        ends = set()
        for pause in (0, 6):  # longer than Prefect's default
            time.sleep(pause)
            with client.stream("GET", f"{up.url('prefect')}/api/health") as answer:
                ends.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
                answer.read()
    assert len(ends) == 1


@pytest.mark.long
@pytest.mark.slow
def test_idle_s3_server_uses_little_cpu(up: LocalStack) -> None:
    [server] = members(up.folder, "s3")
    shares = []
    for _ in range(6):
        before, seconds = sum(server.cpu_times()[:2]), 10.0
        time.sleep(seconds)
        shares.append((sum(server.cpu_times()[:2]) - before) / seconds)
        # Right after its start it has some work of its own.
        if shares[-1] < 0.05:
            return
    # Half a percent is what it takes; with its memory limit too low, the garbage collector alone took 11, always.
    raise AssertionError(f"shares of a core, ten seconds each: {shares}")


MARK = "seen by its owner alone"


@pytest.fixture
def private(up: LocalStack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, bytes]]]:
    """An object in the stack's bucket; gives a look at all that is in the bucket."""
    for name, value in up.variables("s3").items():
        monkeypatch.setenv(name, value)
    store = Store()
    store.put_once(up.bucket, "private", MARK.encode())

    def look() -> dict[str, bytes]:
        return {key: store.get(up.bucket, key) for key in store.list_keys(up.bucket)}

    yield look
    store.delete_many(up.bucket, ["private"])


def listening(local: LocalStack) -> tuple[set[int], set[str]]:
    """Ports and sockets in the file system on which anything of the stack listens."""
    listeners, sockets = set(), set()
    for process in members(local.folder, *SERVICES):
        listeners |= {each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
        here = {str(each.laddr) for each in process.net_connections("unix") if each.laddr}
        sockets |= {str(Path(process.cwd(), path)) for path in here if not path.startswith("@")}
    return listeners, sockets


def assert_nothing_was_served(local: LocalStack, answers: list[dict[str, Any]]) -> None:
    """Of SeaweedFS nothing answers but the S3 port, and nobody is told more than that he has no password."""
    own = local.state.ports
    open_to_all = {"/health", "/healthz", "/status"}
    for each in answers:
        path = each["asked"].partition(" ")[2].partition("?")[0]
        assert MARK not in each["said"], each
        if each["place"] == own["s3"]:
            assert each["status"] in (400, 403, 404, 405) or path in open_to_all, each
        elif each["place"] in (own["mlflow"], own["prefect"]):
            pages = each["asked"].startswith("GET") and "<html" in each["said"].lower()  # those that ask for it
            assert each["status"] in (400, 401, 403, 404, 405) or pages or path in open_to_all, each
        else:
            assert each["status"] == 400, each  # "Client sent an HTTP request to an HTTPS server."


@pytest.mark.slow
def test_another_user_of_the_machine_reads_changes_and_deletes_nothing(
    up: LocalStack, private: Callable[[], dict[str, bytes]]
) -> None:
    before = private()
    listeners, sockets = listening(up)
    # What is known of SeaweedFS's ports is that gRPC is above them; any other would be new_outcomes.
    of_seaweedfs = {up.state.ports[name] + above for name in seaweedfs.PORTS for above in (0, GRPC)}
    assert listeners == of_seaweedfs | {up.state.ports["mlflow"], up.state.ports["prefect"]}
    with TemporaryDirectory(prefix="darkroom-intruder-") as name:
        folder = Path(name)
        shutil.copy(seaweedfs.binary(), folder / "weed")
        # One comes without anything, one with a certificate of his own making.
        (folder / "bare").mkdir()
        (folder / "forged").mkdir()
        for file, text in seaweedfs.files("{}", new_identity()).items():
            (folder / "forged" / file).write_text(text)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        targets = {
            "places": [*sorted(listeners), *sorted(sockets)],
            "ports": up.state.ports,
            "bucket": up.bucket,
            "key": "private",
            "weed": str(folder / "weed"),
            "folders": [str(folder / "bare"), str(folder / "forged")],
            "paths": [str(path) for path in up.folder.rglob("*")],
        }
        report = run_intruder(targets)
    assert report["answers"]  # He did reach them.
    assert_nothing_was_served(up, report["answers"])
    for output in report["programs"]:
        assert MARK not in output
        assert "private" not in output
    if report["user"] != os.geteuid():
        assert report["readable"] == []
    assert private() == before
    # The same programs do as their owner says.
    assert MARK in owner_reads(up)


def run_intruder(targets: dict[str, Any]) -> dict[str, Any]:
    """What he found, who gives his rights away only when Python has loaded all that it needs."""
    program = [sys.executable, ROOT / "tests" / "builders" / "intruder.py"]
    report: dict[str, Any] = json.loads(output_of(program, input=json.dumps(targets)))
    return report


def owner_reads(local: LocalStack) -> str:
    """The private object, as SeaweedFS's shell prints it to whoever may read the stack's folder."""
    master, filer = (f"127.0.0.1:{local.state.ports[name]}" for name in ("master", "filer"))
    command = [seaweedfs.binary(), "shell", f"-master={master}", f"-filer={filer}"]
    words = f"fs.cat /buckets/{local.bucket}/private\nexit\n"
    return subprocess.run(
        command, cwd=local.folder / "s3", input=words, capture_output=True, text=True, check=False, timeout=60
    ).stdout


FETCH = """
async requests => {
    const answers = [];
    for (const [url, method, body, mode] of requests) {
        try {
            const options = {method, mode, credentials: "include", signal: AbortSignal.timeout(8000)};
            const answer = await fetch(url, body ? {...options, body} : options);
            answers.push({status: answer.status, said: await answer.text(), type: answer.type});
        } catch (error) { answers.push(null); }
    }
    return answers;
}
"""


class Blank(QuietHandler):
    """A page without anything, of an origin that is not the stack's."""

    def do_GET(self) -> None:
        self.answer(b"<!doctype html><title>x</title>")


@pytest.mark.slow
def test_a_page_in_a_browser_reads_changes_and_deletes_nothing(
    up: LocalStack, private: Callable[[], dict[str, bytes]]
) -> None:
    before = private()
    listeners, _ = listening(up)
    own = up.state.ports
    with chromium() as browser, serving(Blank) as address:
        page = browser.new_page()
        page.goto(address.replace("127.0.0.1", "localhost"))
        answers = []
        for port in sorted(listeners):
            requests = [
                (f"http://127.0.0.1:{port}{path}", method, body, mode)
                for method, path, body in intruder.requests(up.bucket, "private")
                # What may be sent without asking the server first, and what may not.
                for mode in (("no-cors", "cors") if method in ("GET", "POST") else ("cors",))
            ]
            for (url, method, _, _), answer in zip(requests, page.evaluate(FETCH, requests), strict=True):
                # One of type "opaque" was sent, but the page is told nothing of it.
                if answer is not None and answer["type"] != "opaque":
                    path = url.removeprefix(f"http://127.0.0.1:{port}")
                    answers.append(answer | {"place": port, "asked": f"{method} {path}"})
    assert_nothing_was_served(up, answers)
    # Of S3 alone may a page see what it is answered; without the keys, that is a refusal.
    assert {each["place"] for each in answers} <= {own["s3"], own["mlflow"]}
    assert private() == before


@pytest.mark.slow
def test_both_uis_open_in_a_browser_with_their_passwords(up: LocalStack) -> None:
    own = up.credentials
    with chromium() as browser:
        page = browser.new_page()
        page.goto(up.url("prefect"))
        page.locator("input[type=password]").fill(own.prefect_auth_string)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="Work Pools").click()
        page.get_by_role("link", name="darkroom").wait_for()
        context = browser.new_context(
            http_credentials={"username": own.mlflow_username, "password": own.mlflow_password}
        )
        page = context.new_page()
        page.goto(f"{up.url('mlflow')}/#/experiments")
        page.get_by_role("link", name="kept").first.wait_for()


FLOW = """
import mlflow
from prefect import flow

@flow
def probe():
    import os
    from flows.local_stack.stack import join_servers
    from flows.storage.s3 import Store
    join_servers("mlflow", "prefect", "s3")
    mlflow.set_experiment("from the worker")
    with mlflow.start_run():
        mlflow.log_metric("seen", 1)
    Store().put_once(os.environ["DARKROOM_BUCKET"], "from-the-worker", b"seen")
"""


@pytest.mark.slow
def test_flows_in_the_worker_find_the_servers(up: LocalStack, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(FLOW)
    run = f"""
from prefect import flow
from prefect.deployments import run_deployment
probe = flow.from_source(source={str(tmp_path)!r}, entrypoint="probe.py:probe")
run = run_deployment(probe.deploy("probe", work_pool_name="darkroom", print_next_steps=False), timeout=120)
print(run.state.name)
"""
    assert joined(up, run) == "Completed"
    seen = """
import mlflow, os, boto3
run = mlflow.search_runs(experiment_names=["from the worker"], output_format="list")[0]
body = boto3.client("s3").get_object(Bucket=os.environ["DARKROOM_BUCKET"], Key="from-the-worker")["Body"]
print(run.data.metrics["seen"], body.read().decode())
"""
    assert joined(up, seen) == "1.0 seen"


@pytest.mark.slow
def test_down_stops_everything_and_up_finds_everything(up: LocalStack) -> None:
    local_stack.down(lambda _: None)
    assert members(up.folder, *SERVICES) == []
    assert are_free(up.state.ports[name] for name in ("s3", "mlflow", "prefect"))
    again = local_stack.up(lambda _: None)
    assert {service.state for service in again.services} == {"running"}
    assert_data_is_intact(up)
    local_stack.down(lambda _: None)
    local_stack.down(lambda _: None)


@pytest.mark.slow
@pytest.mark.long
def test_only_servers_missing_from_the_environment_are_started(no_servers: None, s3_server: dict[str, str]) -> None:
    os.environ.update(s3_server)
    os.environ.update({"PREFECT_API_URL": "http://127.0.0.1:9/api", "DARKROOM_BUCKET": "team-bucket"})
    subprocess.run(
        [sys.executable, "-c", "from flows.storage.s3 import Store; Store().ensure_bucket('team-bucket')"], check=True
    )
    try:
        started = local_stack.up(lambda _: None)
        assert states() == {"mlflow": "running"}
        assert set(started.elsewhere) == {"prefect", "s3"}
        local = LocalStack.read(started.folder)
        assert local is not None
        log = "import mlflow; mlflow.start_run(); mlflow.log_text('x', 'a.txt'); print(mlflow.end_run())"
        joined(local, log)
        keys = "from flows.storage.s3 import Store; print(len(list(Store().list_keys('team-bucket', 'mlflow/'))))"
        assert joined(local, keys) == "1"
        for name in s3_server:
            del os.environ[name]
        with pytest.raises(UserError, match="set the AWS_\\* variables again"):
            local_stack.up(lambda _: None)
    finally:
        local_stack.down(lambda _: None)


@pytest.mark.usefixtures("no_servers")
def test_with_servers_of_a_team_nothing_is_started_here() -> None:
    servers = {
        "MLFLOW_TRACKING_URI": "https://mlflow.example.com",
        "PREFECT_API_URL": "https://prefect.example.com/api",
        "AWS_ENDPOINT_URL_S3": "https://s3.example.com",
    }
    os.environ.update(servers)
    messages: list[str] = []
    stack = local_stack.up(messages.append)
    assert stack.services == ()
    assert set(stack.elsewhere) == set(SERVERS)
    assert len([line for line in messages if "commands here use the server in" in line]) == 3
    assert not Path(".darkroom").exists()
    assert local_stack.exports() == {}


@pytest.mark.usefixtures("no_servers")
def test_without_a_stack_status_is_empty_and_down_does_nothing() -> None:
    assert local_stack.status().services == ()
    assert local_stack.status().credentials is None
    local_stack.down(lambda _: None)
    assert not Path(".darkroom").exists()


@pytest.mark.usefixtures("no_servers")
def test_another_bucket_than_the_stacks_is_rejected() -> None:
    LocalStack.open(Path(".darkroom").resolve(), "first")
    os.environ["DARKROOM_BUCKET"] = "second"
    with pytest.raises(UserError, match=r"DARKROOM_BUCKET is second, .* bucket first"):
        local_stack.up(lambda _: None)


@pytest.mark.slow
@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="this Python environment has no other below it")
@pytest.mark.usefixtures("no_servers")
def test_missing_seaweedfs_error_names_the_variables_to_set() -> None:
    # The interpreter below this environment, with its libraries but without its programs.
    folders = [str(ROOT), sysconfig.get_path("purelib")]
    os.environ.update({"PYTHONPATH": os.pathsep.join(folders), "PATH": "/usr/bin:/bin"})
    program = "from flows.local_stack import control as local_stack; local_stack.up(print)"
    result = subprocess.run(
        [os.path.realpath(sys.executable), "-c", program], capture_output=True, text=True, check=False
    )
    assert "UserError: SeaweedFS is not installed" in result.stderr
    assert "AWS_ENDPOINT_URL_S3" in result.stderr


@pytest.mark.usefixtures("no_servers")
def test_a_home_that_cannot_be_written_to_is_named() -> None:
    Path("file").write_text("")
    os.environ["DARKROOM_HOME"] = "file"
    with pytest.raises(UserError, match="DARKROOM_HOME"):
        local_stack.up(lambda _: None)


@pytest.mark.usefixtures("no_servers")
def test_a_service_that_fails_to_start_is_named() -> None:
    os.environ.update({"MLFLOW_TRACKING_URI": "http://x", "PREFECT_API_URL": "http://x/api"})
    data = Path(".darkroom/s3")
    data.mkdir(parents=True)
    # SeaweedFS cannot open its metadata.
    (data / "filerldb2").write_text("not a folder")
    try:
        with pytest.raises(DarkroomError, match=r"S3 \(SeaweedFS\) ended at once.*logs/s3\.log is: \S+"):
            local_stack.up(lambda _: None)
    finally:
        local_stack.down(lambda _: None)


@pytest.mark.usefixtures("no_servers")
@pytest.mark.parametrize("is_last_slow", [False, True])
def test_each_service_has_its_own_time_to_answer(is_last_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers_after(seconds: float) -> Callable[[Process], None]:
        def check(process: Process) -> None:
            if time.time() < psutil.Process(process.pid).create_time() + seconds:
                raise NotServingError("starting")

        return check

    def make(name: ServiceName, seconds: float, after: ServiceName | None) -> Service:
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        return Service(name, name, command, {}, Path.cwd(), answers_after(seconds), after=after)

    slow = [make("s3", 2, None), make("prefect", 60 if is_last_slow else 2, "s3")]
    monkeypatch.setattr(local_stack, "services", lambda _: slow)
    monkeypatch.setattr(local_stack, "PATIENCE", 3.5)
    try:
        if is_last_slow:
            with pytest.raises(DarkroomError, match=r"prefect did not answer .*run `darkroom up` again"):
                local_stack.up(lambda _: None)
        else:
            local_stack.up(lambda _: None)
    finally:
        local_stack.down(lambda _: None)


@pytest.mark.parametrize("which", [lambda port: port, lambda port: port + GRPC])
def test_a_port_counts_as_free_only_with_its_grpc_port(which: Callable[[int], int]) -> None:
    [port] = choose_ports(1)
    assert are_free([port])
    with socket.create_server(("127.0.0.1", which(port))):
        assert not are_free([port])
    assert are_free([port])


def test_reserved_ports_are_not_chosen() -> None:
    ports = choose_ports(5)
    assert len(set(ports)) == 5
    assert not set(ports) & set(choose_ports(20, taken=ports))
