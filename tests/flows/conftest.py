"""Real servers for the tests of what speaks to them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from uuid import uuid4

import mlflow
import pytest
from dvc.repo import Repo
from mlflow.client import MlflowClient

from flows.local_stack import seaweedfs
from flows.storage.s3 import Store, client
from tests.builders.catalogs import Place
from tests.builders.command_line import servers_forgotten
from tests.builders.s3_clients import seaweed
from tests.builders.signing_keys import Identity, identity
from tests.builders.workspace import Workspace


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A SeaweedFS of the session's own; gives the variables by which clients find it.

    With ``TEST_AWS_ENDPOINT_URL_S3`` and its like set, it is the server that they name.
    """
    server_variables = {
        name.removeprefix("TEST_"): value for name, value in os.environ.items() if name.startswith("TEST_AWS_")
    }
    if server_variables:
        yield server_variables
        return
    keys = {
        "AWS_ACCESS_KEY_ID": "test-access",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }

    def ready(address: str) -> None:
        Store(client(attempts=1, variables=keys | {"AWS_ENDPOINT_URL_S3": address})).ensure_bucket("ready")

    with seaweed(tmp_path_factory.mktemp("s3"), seaweedfs.config("test-access", "test-secret"), ready) as address:
        yield keys | {"AWS_ENDPOINT_URL_S3": address}


@pytest.fixture
def no_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An environment that names no server, restored afterwards, and an empty working folder."""
    monkeypatch.chdir(tmp_path)
    with servers_forgotten():
        yield


@pytest.fixture
def s3_environment(no_servers: None, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process finds ``s3_server`` by its environment."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def store(s3_environment: dict[str, str]) -> Store:
    """A store on ``s3_server``."""
    return Store()


@pytest.fixture
def bucket(store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket on ``s3_server``, which this process uses."""
    name = f"test-{uuid4().hex}"
    store.ensure_bucket(name)
    monkeypatch.setenv("DARKROOM_BUCKET", name)
    return name


@pytest.fixture
def place(bucket: str, images: Path) -> Place:
    """A data set in a catalog."""
    Repo.init(no_scm=True).close()
    return Place(bucket, images)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of an MLflow without anything in it, to be copied: to make one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow-template")
    with chdir(folder):  # beside which it keeps artifacts
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_registered_models()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def mlflow_store(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of an MLflow of the session's own, without a server."""
    return copied_store(mlflow_template, tmp_path_factory.mktemp("mlflow"))


def copied_store(template: Path, folder: Path) -> str:
    """The address of a new MLflow in ``folder``."""
    shutil.copyfile(template, folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def mlflow_client(s3_environment: dict[str, str], mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """This process finds the session's MLflow; each test names its models otherwise."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    return MlflowClient()


@pytest.fixture
def name(mlflow_client: MlflowClient, bucket: str) -> Iterator[str]:
    """Of a model that no other test has; MLflow's own functions find the session's MLflow, too."""
    mlflow.set_tracking_uri(mlflow_client.tracking_uri)
    yield f"m{uuid4().hex}"
    mlflow.set_tracking_uri(None)


@pytest.fixture
def server(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The MLflow server of the test's workspace, whose artifacts this process can read as well."""
    workspace.join(monkeypatch)
    return MlflowClient(workspace.variables["MLFLOW_TRACKING_URI"])


@pytest.fixture(scope="session")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """A signer whose key and root the tests trust."""
    return identity(tmp_path_factory.mktemp("keys") / "alice")
