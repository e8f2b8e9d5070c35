"""What is checked with the servers before a flow run exists: passwords, versions, aliases, labels."""

import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.generation.config import Conditions
from flows.cli import main
from flows.cli.checks import require_model, require_version
from flows.config import Params
from flows.local_stack.http_api import require
from tests.builders.http_server import serving
from tests.builders.model_versions import add_version
from tests.builders.small_models import write_model


@pytest.mark.parametrize(
    ("server", "variable", "secret"),
    [
        ("mlflow", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"),
        ("prefect", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"),
    ],
)
def test_a_wrong_password_is_an_error_at_once(
    no_servers: None, monkeypatch: pytest.MonkeyPatch, server: str, variable: str, secret: str
) -> None:
    asked = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(401)

        def do_POST(self) -> None:
            self.do_GET()

    with serving(Refusing) as url:
        monkeypatch.setenv(variable, url)
        monkeypatch.setenv(secret, "someone:test-secret")
        with pytest.raises(UserError, match=f"wrong user or password.*{secret}") as raised:
            require(server)  # type: ignore[arg-type]
    assert len(asked) == 1
    assert "test-secret" not in str(raised.value)


def test_wrong_s3_keys_are_an_error_before_a_flow_run(
    s3_environment: dict[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_BUCKET", bucket)
    require("s3")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY"):
        require("s3")


def test_an_unknown_version_alias_or_model_lists_those_there_are(
    mlflow_client: MlflowClient, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DARKROOM_BUCKET", bucket)
    for _ in range(2):
        add_version(mlflow_client, tmp_path, "checked")
    mlflow_client.set_registered_model_alias("checked", "best", "2")
    for uri in ("models:/checked/1", "models:/checked@best"):
        require_version(uri)
    for uri in ("models:/checked/7", "models:/checked@worst", "models:/checked@champion"):
        with pytest.raises(UserError, match=r"versions 1, 2 and aliases @best \(2\)"):
            require_version(uri)
    with pytest.raises(UserError, match=r"no model chekced .*there is .*checked"):
        require_version("models:/chekced@champion")
    with pytest.raises(UserError, match=r"no model or data set nope.*checked"):
        require_model(Params.model_validate({"training": {"dataset": "nope"}}))
    require_model(Params.model_validate({"training": {"dataset": "checked"}}))


def test_a_label_that_the_model_does_not_know_is_found_without_loading_it(
    mlflow_client: MlflowClient, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DARKROOM_BUCKET", bucket)
    weights = write_model(tmp_path / "m.safetensors", seed=1, images=1, classes={"cat": 5, "dog": 5})
    version = add_version(mlflow_client, tmp_path, "labelled", data=weights.read_bytes())
    params = Params()
    cached = Path(".darkroom/models", f"{sha256_file(weights)}.safetensors")
    cached.parent.mkdir(parents=True)
    weights.rename(cached)
    require_version(version.uri, params, Conditions(labels=("cat",)))
    with pytest.raises(UserError, match="no class 'bird': use one of cat, dog"):
        require_version(version.uri, params, Conditions(labels=("bird",)))


def test_history_of_an_unknown_data_set_is_an_error(
    mlflow_client: MlflowClient, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_BUCKET", bucket)
    monkeypatch.setattr(sys, "argv", ["darkroom", "model", "history", "--dataset", "nobodys"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
