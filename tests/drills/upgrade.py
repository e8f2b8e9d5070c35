"""An upgrade of MLflow's and Prefect's databases, made by older versions in ``OLD_BIN``, by the commands of the docs.

Run by ``make drill-upgrade``; not part of the tests, as it installs a second environment.
"""

import json
import os
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.builders.command_line import output_of

OLD = Path(os.environ.get("OLD_BIN", ""))

MAKE_MLFLOW = """
import mlflow, sys
client = mlflow.MlflowClient(sys.argv[1])
experiment = client.create_experiment("faces")
run = client.create_run(experiment, tags={"darkroom.train_key": "key"})
client.log_metric(run.info.run_id, "kid", 0.25, step=100)
client.log_param(run.info.run_id, "model.width", "32")
client.set_terminated(run.info.run_id)
client.create_registered_model("faces")
client.create_model_version("faces", "file:///nowhere", run.info.run_id, tags={"darkroom.weights_sha256": "ab"})
client.set_registered_model_alias("faces", "champion", "1")
print(mlflow.__version__)
"""
READ_MLFLOW = """
import json, mlflow, sys
client = mlflow.MlflowClient(sys.argv[1])
version = client.get_model_version_by_alias("faces", "champion")
run = client.get_run(version.run_id)
print(json.dumps([version.version, version.tags, run.data.params, run.data.metrics, run.info.status]))
"""
MAKE_PREFECT = """
from prefect import flow, __version__
from prefect.variables import Variable
@flow
def old(): return 1
old()
Variable.set("kept", "in prefect")
print(__version__)
"""
READ_PREFECT = """
import json
from prefect.client.orchestration import get_client
from prefect.variables import Variable
with get_client(sync_client=True) as client:
    runs = client.read_flow_runs()
print(json.dumps([Variable.get("kept"), [run.state.type.value for run in runs]]))
"""


def program(python: Path | str, text: str, *arguments: str, **variables: str) -> str:
    """The last line that a program prints in a Python."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    return output_of([python, "-c", text, *arguments], env=clean | quiet | variables).strip().splitlines()[-1]


def command(*words: str, **variables: str) -> None:
    """A command of the docs, with this environment's programs."""
    output_of([sys.executable, "-m", *words], env=os.environ | variables)


def schema(database: Path) -> str:
    with closing(sqlite3.connect(database)) as connection:
        return str(connection.execute("select version_num from alembic_version").fetchone()[0])


def test_a_registry_made_by_an_older_mlflow_is_whole_after_the_upgrade(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    url = f"sqlite:///{database}"
    old = program(OLD / "python", MAKE_MLFLOW, url)
    before = schema(database)
    shutil.copyfile(database, tmp_path / "before.db")
    command("mlflow", "db", "upgrade", url)
    print(f"MLflow {old}: schema {before} -> {schema(database)}")
    assert schema(database) != before
    version, tags, params, metrics, status = json.loads(program(sys.executable, READ_MLFLOW, url))
    assert (str(version), tags, params) == ("1", {"darkroom.weights_sha256": "ab"}, {"model.width": "32"})
    assert (metrics, status) == ({"kid": 0.25}, "FINISHED")
    command("mlflow", "db", "upgrade", url)
    assert schema(tmp_path / "before.db") == before, "the copy is the way back: there is no downgrade"


def test_users_of_an_older_mlflow_are_there_after_the_upgrade(tmp_path: Path) -> None:
    database = tmp_path / "auth.db"
    url = f"sqlite:///{database}"
    make = """
import sys
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
store = SqlAlchemyStore(); store.init_db(sys.argv[1]); store.create_user("ada", "a long password", is_admin=True)
"""
    program(OLD / "python", make + "print(1)", url)
    command("mlflow.server.auth", "db", "upgrade", "--url", url)
    script = """
import sys
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
store = SqlAlchemyStore(); store.init_db(sys.argv[1])
print(store.authenticate_user("ada", "a long password"), store.get_user("ada").is_admin)
"""
    assert program(sys.executable, script, url) == "True True"


def test_flow_runs_and_variables_of_an_older_prefect_are_there_after_the_upgrade(tmp_path: Path) -> None:
    home = {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    ephemeral = home | {"PREFECT_SERVER_EPHEMERAL_ENABLED": "true"}
    old = program(OLD / "python", MAKE_PREFECT, **ephemeral)
    before = schema(tmp_path / "prefect.db")
    command("prefect", "server", "database", "upgrade", "-y", **home)
    print(f"Prefect {old}: schema {before} -> {schema(tmp_path / 'prefect.db')}")
    assert json.loads(program(sys.executable, READ_PREFECT, **ephemeral)) == ["in prefect", ["COMPLETED"]]


@pytest.fixture(autouse=True)
def _old() -> None:
    assert (OLD / "python").is_file(), "OLD_BIN names no environment: run `make drill-upgrade`"
