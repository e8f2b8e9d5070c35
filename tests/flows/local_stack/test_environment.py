import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from diffusion.common.errors import UserError
from flows.environment import SERVERS, Server, settings
from flows.local_stack.control import exports
from flows.local_stack.server_process import marks, members, start, stop
from flows.local_stack.stack import LocalStack, join_servers, servers_in_environment

pytestmark = pytest.mark.usefixtures("no_servers")

EXTERNAL: dict[Server, dict[str, str]] = {
    "mlflow": {"MLFLOW_TRACKING_URI": "https://mlflow.example.com"},
    "prefect": {"PREFECT_API_URL": "https://prefect.example.com/api"},
    "s3": {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
}


@pytest.fixture
def local() -> Iterator[LocalStack]:
    """A local stack as `up` leaves it, with processes that live, but serve nothing."""
    stack = LocalStack.open(settings().folder, "darkroom")
    processes = {}
    for service in ("s3", "mlflow", "prefect", "worker"):
        environment = {**os.environ, **marks(stack.folder, service)}
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        processes[service] = start(command, environment, stack.folder, stack.log(service), "")
    yield stack.update_state(
        servers=SERVERS, ports={"s3": 20001, "mlflow": 20002, "prefect": 20003}, processes=processes
    )
    stop(members(stack.folder, *processes), grace=5)


@pytest.mark.parametrize(
    ("server", "variable"),
    [("mlflow", "MLFLOW_TRACKING_URI"), ("prefect", "PREFECT_API_URL"), ("s3", "AWS_ENDPOINT_URL_S3")],
)
def test_missing_server_error_says_how_to_start_one(server: Server, variable: str) -> None:
    with pytest.raises(UserError, match=rf"{variable} is not set .*\.darkroom.*run `darkroom up`") as refusal:
        join_servers(server)
    # A stack of another folder would be a second one here.
    assert str(Path(".darkroom").resolve()) in str(refusal.value)
    assert "DARKROOM_HOME" in str(refusal.value)
    assert refusal.value.exit_code == 2
    assert not Path(".darkroom").exists()


def test_servers_that_the_environment_names_are_used_as_they_are(local: LocalStack) -> None:
    external = {name: value for server in SERVERS for name, value in EXTERNAL[server].items()}
    os.environ.update(external)
    assert set(servers_in_environment()) == set(SERVERS)
    before = dict(os.environ)
    join_servers(*SERVERS)
    new_names = os.environ.keys() - before.keys()
    assert {name: os.environ[name] for name in before} == before
    assert not {name for name in new_names if name.startswith(("AWS_", "MLFLOW_TRACKING", "PREFECT_API"))}
    assert exports() == {}


@pytest.mark.parametrize("external", SERVERS)
def test_unset_server_variables_come_from_the_local_stack(local: LocalStack, external: Server) -> None:
    os.environ.update(EXTERNAL[external])
    join_servers(*SERVERS)
    for server in SERVERS:
        expected = EXTERNAL[external] if server == external else local.variables(server)
        assert expected.items() <= os.environ.items()
    assert ("AWS_ENDPOINT_URL_S3" in os.environ) == (external != "s3")
    assert ("MLFLOW_TRACKING_PASSWORD" in os.environ) == (external != "mlflow")


@pytest.mark.parametrize(
    ("server", "variable"),
    [
        ("mlflow", "MLFLOW_TRACKING_PASSWORD"),
        ("mlflow", "MLFLOW_TRACKING_USERNAME"),
        ("prefect", "PREFECT_API_AUTH_STRING"),
        ("s3", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_wrong_login_for_a_local_server_is_an_error(local: LocalStack, server: Server, variable: str) -> None:
    os.environ[variable] = "wrong-secret"
    with pytest.raises(UserError, match=variable) as refusal:
        join_servers(server)
    assert "wrong-secret" not in str(refusal.value)
    os.environ[variable] = local.variables(server)[variable]
    join_servers(server)


def test_only_the_required_servers_are_joined(local: LocalStack) -> None:
    join_servers("s3")
    assert os.environ["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:20001"
    assert os.environ["DARKROOM_BUCKET"] == "darkroom"
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert "PREFECT_API_URL" not in os.environ


@pytest.mark.parametrize("variable", ["AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ROLE_ARN"])
def test_every_usual_s3_endpoint_variable_is_recognized(local: LocalStack, variable: str) -> None:
    os.environ[variable] = "set"
    assert servers_in_environment() == {"s3": variable}


def test_a_server_that_died_is_not_joined(local: LocalStack) -> None:
    process = psutil.Process(local.state.processes["mlflow"].pid)
    process.kill()
    process.wait()
    join_servers("prefect", "s3")
    with pytest.raises(UserError, match="no MLflow server"):
        join_servers("mlflow")


def test_a_reused_process_id_is_not_a_service(local: LocalStack) -> None:
    stranger = local.state.processes["mlflow"].model_copy(update={"pid": os.getpid()})
    local.update_state(processes={**local.state.processes, "mlflow": stranger})
    with pytest.raises(UserError, match="no MLflow server"):
        join_servers("mlflow")


def test_a_copied_folder_leaves_the_original_processes_alone(local: LocalStack) -> None:
    copy = Path("copy")
    copy.mkdir()
    for name in ("stack.json", "credentials.json"):
        (copy / name).write_bytes((local.folder / name).read_bytes())
    os.environ["DARKROOM_HOME"] = str(copy)
    with pytest.raises(UserError, match="no S3 server"):
        join_servers("s3")


def export() -> None:
    """What `eval "$(darkroom env)"` does."""
    os.environ.update(exports())


def test_exports_still_mean_the_local_stack_on_changed_ports(local: LocalStack) -> None:
    export()
    assert servers_in_environment() == {}
    moved_stack = local.update_state(ports={"s3": 20011, "mlflow": 20012, "prefect": 20013})
    assert servers_in_environment() == {}
    join_servers(*SERVERS)
    for server in SERVERS:
        assert moved_stack.variables(server).items() <= os.environ.items()


def test_another_server_named_after_the_export_is_used(local: LocalStack) -> None:
    export()
    os.environ["MLFLOW_TRACKING_URI"] = "https://mlflow.example.com"
    assert servers_in_environment() == {"mlflow": "MLFLOW_TRACKING_URI"}
    join_servers(*SERVERS)
    assert os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.example.com"


def test_exports_name_the_stack_for_commands_in_other_folders(
    local: LocalStack, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    join_servers(*SERVERS)
    assert settings().folder == local.folder


def test_pickle_and_telemetry_are_disabled_unless_configured() -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "false"
    join_servers()
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert os.environ["DVC_NO_ANALYTICS"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_http_proxy_is_bypassed_for_the_local_stack(local: LocalStack) -> None:
    os.environ.update({"http_proxy": "http://proxy.example.com:3128", "no_proxy": "intranet"})
    join_servers("mlflow")
    assert os.environ["no_proxy"] == "intranet,127.0.0.1"


@pytest.mark.parametrize("bucket", ["", "x", "Upper", "under_score", "s3://darkroom"])
def test_a_bad_bucket_name_is_rejected_with_its_variable(bucket: str) -> None:
    os.environ["DARKROOM_BUCKET"] = bucket
    with pytest.raises(UserError, match="DARKROOM_BUCKET"):
        settings()


@pytest.mark.parametrize("name", ["stack.json", "credentials.json"])
def test_a_damaged_file_of_the_stack_is_named(local: LocalStack, name: str) -> None:
    (local.folder / name).write_text("{")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        join_servers("s3")


def test_importing_the_environment_loads_no_heavy_library() -> None:
    check = "import sys, flows.environment; print(*{'mlflow', 'prefect', 'torch', 'boto3'} & sys.modules.keys())"
    output = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout
    assert output.strip() == ""
