"""A team's servers by the very commands of compose.yaml, on PostgreSQL and S3 with least privilege, put to work."""

import http.client
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.builders.command_line import darkroom_command
from tests.builders.servers import Servers, installed, query
from tests.builders.shapes import disc
from tests.builders.workspace import PARAMS

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

BRIEF = PARAMS | {"training": PARAMS["training"] | {"images": 640, "checkpoints": 2, "keep": 1}}

CHAMPION = ("--model", "models:/blobs@champion")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """All of them but workers, healthy."""
    with (
        installed(tmp_path_factory.mktemp("installation")) as installation,
        installation.running("store"),
        installation.running("s3"),
        installation.running("mlflow", "prefect"),
    ):
        yield installation


@pytest.fixture(scope="module")
def retrain_result(servers: Servers) -> dict[str, Any]:
    """What a first retraining with these servers leaves, by a worker's own environment."""
    folder = servers.folder / "person"
    for number in range(60):
        path = folder / "images" / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        disc(number).save(path)
    (folder / "params.yaml").write_text(yaml.safe_dump(BRIEF))
    outcome = run(servers, "retrain", "images", "--count", "4", "--json")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    (folder / "log").write_text(outcome.stderr)
    result: dict[str, Any] = json.loads(outcome.stdout)
    return result


def run(servers: Servers, *arguments: str, role: str = "worker") -> subprocess.CompletedProcess[str]:
    """A verb in a folder that has no servers of its own, with the S3 keys of ``role``."""
    folder = servers.folder / "person"
    return call(*arguments, env=servers.client(role) | {"DARKROOM_HOME": str(folder / ".darkroom")}, cwd=folder)


def call(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = darkroom_command(*arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, **options)


@pytest.mark.long
def test_retraining_works_with_worker_permissions_only(servers: Servers, retrain_result: dict[str, Any]) -> None:
    assert retrain_result["verdict"]["promoted"]
    assert retrain_result["samples"]["uri"].startswith(f"s3://{servers.secrets['DARKROOM_BUCKET']}/samples/blobs/1/")
    traced = run(servers, "trace", f"{retrain_result['samples']['uri']}00000003.png", "--json", role="reader")
    assert traced.returncode == 0, traced.stderr
    assert json.loads(traced.stdout)["run"]["run_id"] == retrain_result["run_id"]


def test_everything_is_in_postgresql_and_neither_server_sees_the_others(
    servers: Servers, retrain_result: dict[str, Any]
) -> None:
    assert (
        query(servers, "mlflow", "mlflow", f"select count(*) from runs where run_uuid='{retrain_result['run_id']}'")
        == "1"
    )
    assert query(servers, "mlflow", "mlflow_auth", "select username from users") == "darkroom"
    assert query(servers, "prefect", "prefect", "select count(*) from flow_run where name='retrain-blobs'") == "1"
    assert "permission denied" in query(servers, "prefect", "mlflow", "select 1")
    assert "permission denied" in query(servers, "mlflow", "prefect", "select 1")


def test_worker_log_is_json_with_ids_and_no_duplicates(servers: Servers, retrain_result: dict[str, Any]) -> None:
    log = (servers.folder / "person" / "log").read_text().splitlines()
    # Libraries that warn by other ways than logging stay out of it.
    lines = [json.loads(line) for line in log if line.startswith("{")]
    assert all(line.keys() >= {"time", "level", "logger", "message"} for line in lines)
    (training,) = [line for line in lines if line["message"].startswith("training on 43 of 8×8×1")]
    assert training["dataset"] == "blobs"
    assert {"flow_run_id", "flow_name"} <= training.keys()
    assert any({"dataset", "flow_run_id", "task_run_id", "flow_name"} <= line.keys() for line in lines)
    assert any(
        line.get("run_id") == retrain_result["run_id"] and line["logger"] == "prefect.task_runs" for line in lines
    )
    ends = [line for line in lines if line["logger"] == "prefect.flow_runs" and "Finished in state" in line["message"]]
    assert [line["flow_name"] for line in ends].count("retrain") == 1


def test_sampler_role_can_sample_and_reader_role_cannot(servers: Servers, retrain_result: dict[str, Any]) -> None:
    output = run(servers, "sample", *CHAMPION, "--count", "2", "--seed", "5", "--json", role="sampler")
    assert output.returncode == 0, output.stderr[-3000:]
    assert json.loads(output.stdout)["model"] == retrain_result["samples"]["model"]
    process = run(servers, "sample", *CHAMPION, "--count", "2", "--seed", "6", role="reader")
    assert process.returncode in (1, 2)
    assert process.stderr.splitlines()[-1].startswith("darkroom: ")


def test_servers_require_a_password_and_their_host_name(servers: Servers) -> None:
    mlflow, prefect, s3, filer = (servers.numbers[port] for port in ("5000", "4200", "8333", "8888"))
    assert status(mlflow, "/api/2.0/mlflow/experiments/search?max_results=1") == 401
    assert status(prefect, "/api/admin/version") == 401
    assert status(s3, f"/{servers.secrets['DARKROOM_BUCKET']}") == 403
    assert status(filer, f"/buckets/{servers.secrets['DARKROOM_BUCKET']}/") == 401
    # Alive, and of no use to who calls it by a name that it does not know: the check has to tell them apart.
    variables = servers.environment("mlflow") | {"MLFLOW_TRACKING_URI": f"http://0:{mlflow}"}
    checked = call("server", "health", "mlflow", env=variables)
    assert status(mlflow, "/health", host=f"0:{mlflow}") == 200
    assert checked.returncode == 1
    assert "403" in checked.stderr


@pytest.mark.parametrize(
    ("service", "variable"),
    [("mlflow", "MLFLOW_TRACKING_PASSWORD"), ("prefect", "PREFECT_API_AUTH_STRING"), ("s3", "AWS_SECRET_ACCESS_KEY")],
)
def test_health_fails_where_a_client_with_that_password_would(servers: Servers, service: str, variable: str) -> None:
    variables = servers.environment(service) | {variable: "darkroom:revoked"}
    checked = call("server", "health", service, env=variables)
    assert checked.returncode in (1, 2)
    assert checked.stderr.count("\n") == 1


def test_worker_reports_health(servers: Servers) -> None:
    with servers.running("worker-cpu"):
        pass


def status(port: str, path: str, host: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
    connection.request("GET", path, headers={"Host": host} if host else {})
    return connection.getresponse().status
