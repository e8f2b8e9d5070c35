"""compose.yaml: what it lets in, what it holds back, and that nothing of it is secret."""

import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.builders.installation import INFRA, compose, composed, new_environment

Services = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("installation") / ".env"
    new_environment(path)
    return path


@pytest.fixture(scope="module")
def services(environment: Path) -> Services:
    all_services: Services = composed(environment, "--profile", "gpu")["services"]
    return all_services


def test_passwords_are_new_each_time_private_and_never_overwritten(tmp_path: Path) -> None:
    first, second = (new_environment(tmp_path / name) for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert not {first[name] for name in first.keys() - {"DARKROOM_BUCKET"}} & set(second.values())
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    content = (tmp_path / "a").read_bytes()
    again = [sys.executable, str(INFRA / "credentials.py"), "--out", str(tmp_path / "a")]
    assert subprocess.run(again, stderr=subprocess.PIPE, check=False).returncode != 0
    assert (tmp_path / "a").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_without_passwords_nothing_is_started(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(AssertionError, match=r"run python infra/credentials\.py"):
        composed(tmp_path / "empty")


def test_compose_file_has_no_secret_and_requires_each_generated_one(environment: Path) -> None:
    text = (INFRA / "compose.yaml").read_text()
    generated_names = {line.partition("=")[0] for line in environment.read_text().splitlines()}
    names = set(re.findall(r"\$\{([A-Z0-9_]+):\?", text)) | set(re.findall(r"environment: (S3_CONFIG)\b", text))
    assert names <= generated_names
    # The others are for people and their machines: keys to look, to sample elsewhere, to take images down, and for Ray
    # on Kubernetes.
    assert generated_names - names == {"DARKROOM_BUCKET", "RAY_AUTH_TOKEN"} | {
        f"{role}_{key}" for role in ("SAMPLER", "KEEPER") for key in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
    }
    for name, value in re.findall(r"(\w*(?:PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY\w*)): (.*)", text):
        assert value.startswith("${"), name


def test_compose_reads_every_password_as_it_was_written(environment: Path, tmp_path: Path) -> None:
    variables = dict(line.split("=", 1) for line in environment.read_text().splitlines())
    labels = {name.lower(): f"${{{name}}}" for name in variables}
    (tmp_path / "compose.yaml").write_text(json.dumps({"services": {"any": {"image": "any", "labels": labels}}}))
    command = [*compose(), "--project-directory", str(tmp_path), "--file", str(tmp_path / "compose.yaml")]
    command += ["--env-file", str(environment), "config", "--format", "json"]
    services_of_compose = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["services"][
        "any"
    ]["labels"]
    assert services_of_compose == {name.lower(): value for name, value in variables.items()}


def test_ports_are_published_on_the_loopback_address_alone(services: Services) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


def test_every_service_has_limits_a_check_and_restarts(services: Services) -> None:
    for name, service in services.items():
        assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory"}, name
        assert service["healthcheck"]["test"], name
        assert service["restart"] == "unless-stopped", name
        assert "no-new-privileges:true" in service["security_opt"], name
        if name != "postgres":
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name


def test_only_their_clients_reach_databases_and_storage(services: Services) -> None:
    def on(network: str) -> set[str]:
        return {name for name, service in services.items() if network in service["networks"]}

    assert on("databases") == {"postgres", "mlflow", "prefect"}
    assert on("objects") == {"store", "s3"}


def test_each_server_has_only_the_keys_of_its_role(services: Services, environment: Path) -> None:
    secret = dict(line.split("=", 1) for line in environment.read_text().splitlines())
    roles = {"mlflow": "MLFLOW", "worker-cpu": "WORKER", "worker-gpu": "WORKER", "s3": "READER"}
    for name, service in services.items():
        keys = service["environment"].get("AWS_ACCESS_KEY_ID")
        assert keys == (secret[f"{roles[name]}_ACCESS_KEY_ID"] if name in roles else None), name


def test_health_checks_use_the_client_credentials(services: Services) -> None:
    worker = services["worker-cpu"]["environment"]
    for name, variable in (("mlflow", "MLFLOW_TRACKING_URI"), ("prefect", "PREFECT_API_URL")):
        assert services[name]["healthcheck"]["test"] == ["CMD", "darkroom", "server", "health", name]
        assert services[name]["environment"][variable] == worker[variable]
    host = worker["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert host in services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
