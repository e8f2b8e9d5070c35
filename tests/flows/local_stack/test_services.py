"""What the servers of the local stack get from the environment of who starts them."""

import json
import sys
from pathlib import Path

import psutil
import pytest

from flows.local_stack.services import Service, services
from flows.local_stack.stack import LocalStack

PRINT = "import json, os; print(json.dumps(dict(os.environ)))"


def environment_of(name: str, stack: LocalStack) -> dict[str, str]:
    """What a program that is started as the service ``name`` is sees."""
    service = Service(name, name, [sys.executable, "-S", "-c", PRINT], {}, stack.folder, lambda _: None)  # type: ignore[arg-type]
    psutil.Process(service.start(stack).pid).wait(30)
    return dict(json.loads(stack.log(name).read_text()))  # type: ignore[arg-type]


def test_only_the_worker_gets_keys_that_are_not_its_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    stack = LocalStack.open(tmp_path / "stack", "bucket")
    for name in ("s3", "mlflow", "prefect", "worker"):
        variables = environment_of(name, stack)
        assert {"PATH", "HTTPS_PROXY"} <= variables.keys()
        assert [each for each, value in variables.items() if value == "hush"] == ["HF_TOKEN"] * (name == "worker")


def test_credentials_that_an_older_stack_lacks_are_added_once(tmp_path: Path) -> None:
    path = LocalStack.open(tmp_path / "stack", "bucket").folder / "credentials.json"
    older = json.loads(path.read_bytes())
    del older["mlflow_webhook_key"]
    path.write_text(json.dumps(older))
    keys = {LocalStack.open(tmp_path / "stack", "bucket").credentials.mlflow_webhook_key for _ in range(2)}
    assert len(keys) == 1
    assert json.loads(path.read_bytes()) == older | {"mlflow_webhook_key": keys.pop()}
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_worker_knows_what_parameters_may_make_it_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_CAPTIONERS", '[{"command": ["caption"]}]')
    monkeypatch.setenv("DARKROOM_SIGNING_KEY_PASSPHRASE", "hush")
    stack = LocalStack.open(tmp_path / "stack", "bucket")
    stack = stack.update_state(servers=("prefect",), ports={"prefect": 1})
    [worker] = [each for each in services(stack) if each.name == "worker"]
    assert worker.environment["DARKROOM_CAPTIONERS"] == '[{"command": ["caption"]}]'
    assert "hush" not in worker.environment.values()
