"""What is checked with the servers before a flow run exists: passwords, versions, aliases, labels."""

import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.generation.config import Conditions
from flows.cli import checks, main
from flows.cli.checks import registered_models, require_label_in_source, require_model, require_version
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
    paths = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(401)

        def do_POST(self) -> None:
            self.do_GET()

    with serving(Refusing) as url:
        monkeypatch.setenv(variable, url)
        monkeypatch.setenv(secret, "someone:test-secret")
        with pytest.raises(UserError, match=f"wrong user or password.*{secret}") as raised:
            require(server)  # type: ignore[arg-type]
    assert len(paths) == 1
    assert "test-secret" not in str(raised.value)


def test_a_registry_that_fails_briefly_is_asked_again_and_a_wrong_password_is_not(
    no_servers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [503, 200, 401]

    class Recovering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.pop(0))
            self.end_headers()
            self.wfile.write(b'{"registered_models": [{"name": "faces"}]}')

    with serving(Recovering) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        assert registered_models().keys() == {"faces"}
        with pytest.raises(UserError):
            registered_models()
    assert not answers


def test_labels_are_sought_in_a_source_with_cyclic_links_until_all_are_found(
    no_servers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "1.png").touch()
        for link in ("a", "b"):
            (tmp_path / "pets" / name / link).symlink_to(tmp_path / "pets")
    params = Params.model_validate({"ingest": {"source": str(tmp_path / "pets")}})
    require_label_in_source(params, Conditions(labels=("cat", "dog")))
    with pytest.raises(UserError, match="there is cat, dog"):
        require_label_in_source(params, Conditions(labels=("bird",)))

    def files(_: Path) -> Iterator[str]:
        yield from ("cat/1.png", "dog/1.png")
        raise AssertionError("all labels were found")

    monkeypatch.setattr(checks, "visible_files", files)
    require_label_in_source(params, Conditions(labels=("cat", "dog")))


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


def test_a_tag_with_a_path_is_refused(
    mlflow_client: MlflowClient, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DARKROOM_BUCKET", bucket)
    weights = write_model(tmp_path / "m.safetensors", seed=1, images=1, classes={"cat": 5, "dog": 5})
    version = add_version(mlflow_client, tmp_path, "forged", data=weights.read_bytes())
    mlflow_client.set_model_version_tag("forged", str(version.number), "darkroom.weights_sha256", "../../m")
    Path(".darkroom/models").mkdir(parents=True)
    with pytest.raises(UserError, match=r"darkroom\.weights_sha256"):
        require_version(version.uri, Params(), Conditions(labels=("cat",)))


@pytest.mark.parametrize("words", [["--dataset", "nobodys"], ["nobodys"], ["nobodys", "--dataset", "nobodys"]])
def test_history_of_an_unknown_data_set_is_an_error(
    mlflow_client: MlflowClient,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    monkeypatch.setenv("DARKROOM_BUCKET", bucket)
    monkeypatch.setattr(sys, "argv", ["darkroom", "model", "history", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no model or data set nobodys" in capsys.readouterr().err
