"""Real servers for the tests of what speaks to them."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow.client import MlflowClient

from diffusion.common.errors import DarkroomError
from flows.local_stack import seaweedfs
from flows.local_stack.server_process import choose_ports
from flows.local_stack.stack import new_identity
from flows.storage.s3 import Store, client
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
    folder = tmp_path_factory.mktemp("s3")
    for name, text in seaweedfs.files(seaweedfs.config("test-access", "test-secret"), new_identity()).items():
        (folder / name).write_text(text)
    numbers = choose_ports(len(seaweedfs.PORTS))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            seaweedfs.command(numbers),
            cwd=folder,
            env={**os.environ, **seaweedfs.ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    variables = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{numbers[0]}",
        "AWS_ACCESS_KEY_ID": "test-access",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        _wait(Store(client(attempts=1, variables=variables)), server, folder / "log")
        yield variables
    finally:
        server.kill()
        server.wait()


def _wait(store: Store, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            return store.ensure_bucket("ready")
        except DarkroomError:
            if time.monotonic() > deadline or server.poll() is not None:
                raise AssertionError(log.read_text()) from None
            time.sleep(0.1)


@pytest.fixture
def no_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An environment that names no server, restored afterwards, and an empty working folder."""
    saved = dict(os.environ)
    for name in saved:
        if name.startswith(("AWS_", "MLFLOW_", "PREFECT_", "DARKROOM_")):
            del os.environ[name]
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(saved)


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
def bucket(store: Store) -> str:
    """A new bucket on ``s3_server``."""
    name = f"test-{uuid4().hex}"
    store.ensure_bucket(name)
    return name


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
def server(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The MLflow server of the test's workspace, whose artifacts this process can read as well."""
    workspace.join(monkeypatch)
    return MlflowClient(workspace.variables["MLFLOW_TRACKING_URI"])


@pytest.fixture(scope="session")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """A signer whose key and root the tests trust."""
    return identity(tmp_path_factory.mktemp("keys") / "alice")


@pytest.fixture
def darkroom(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line, which returns its exit code."""
    from flows.cli import main

    def run(*words: object) -> int:
        monkeypatch.setattr("sys.argv", ["darkroom", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        return int(str(exit_info.value.code))

    return run
