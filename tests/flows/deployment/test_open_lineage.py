"""OpenLineage's events of flow runs, as a receiver gets them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Crashed, Failed, Running

from diffusion.training.train import TrainResult
from flows.config import Params
from flows.deployment.open_lineage import emit_lineage, lineage_hooks
from flows.sample import SamplingBatchResult
from flows.train import TrainingRun
from tests.builders.http_server import QuietHandler, serving

PARAMS = Params.model_validate({"training": {"dataset": "faces"}, "ingest": {"source": "images"}})


@pytest.fixture
def events(no_servers: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What was sent to the receiver that the environment names."""
    received: list[dict[str, Any]] = []

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            assert self.headers["Authorization"] == "Bearer test-secret"
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(status=201)

    for name in ("OPENLINEAGE_DISABLED", "OPENLINEAGE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    with serving(Handler) as address:
        login = '{"type": "api_key", "apiKey": "test-secret"}'
        for field, value in (("TYPE", "http"), ("URL", address), ("AUTH", login)):
            monkeypatch.setenv(f"OPENLINEAGE__TRANSPORT__{field}", value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:test-secret@mlflow:5000")
        yield received


def send(name: str, state: State[Any], **parameters: Any) -> FlowRun:
    @flow(name=name)
    def body() -> None:
        """Nothing."""

    fields = {"params": PARAMS.model_dump(mode="json")} | parameters
    run = FlowRun(id=uuid4(), flow_id=uuid4(), name=f"{name}-faces", parameters=fields)
    emit_lineage(body, run, state)
    return run


def test_a_training_leads_from_a_version_of_data_to_a_run(events: list[dict[str, Any]]) -> None:
    digest = "c" * 64
    result = TrainResult(output=Path("runs"), final=Path("x"), images=9, content_digest=digest, train_key="k" * 64)
    send("train", Running())
    run = send("train", Completed(data=TrainingRun(run_id="r" * 32, result=result)))
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"]
    assert events[1]["run"]["runId"] == str(run.id)
    assert (events[1]["job"]["namespace"], events[1]["job"]["name"]) == ("darkroom", "train/faces")
    [data], [output] = events[1]["inputs"], events[1]["outputs"]
    assert (data["namespace"], data["name"]) == ("s3://darkroom", "datasets/faces")
    assert (output["namespace"], output["name"]) == ("http://mlflow:5000", f"runs/{'r' * 32}")
    assert "secret" not in json.dumps(events)


def test_samples_lead_from_a_model_version_to_a_batch(events: list[dict[str, Any]]) -> None:
    fields = {"uri": "s3://darkroom/samples/faces/3/x/", "model": "models:/faces/3"}
    result = SamplingBatchResult.model_construct(**fields)
    send("sample", Completed(data=result), model="models:/faces@champion")
    [model], [batch] = events[0]["inputs"], events[0]["outputs"]
    assert (model["name"], model["facets"]["version"]["datasetVersion"]) == ("models/faces", "3")
    assert (batch["namespace"], batch["name"]) == ("s3://darkroom", "samples/faces/3/x")


def test_failed_and_crashed_runs_say_why(events: list[dict[str, Any]]) -> None:
    send("ingest", Failed(message="no such folder"))
    send("ingest", Crashed(message="terminated"))
    assert [event["eventType"] for event in events] == ["FAIL", "ABORT"]
    messages = [event["run"]["facets"]["errorMessage"]["message"] for event in events]
    assert messages == ["no such folder", "terminated"]
    assert events[0]["inputs"][0]["name"] == str(Path("images").absolute())


def test_a_receiver_that_is_away_is_one_warning(
    no_servers: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "http")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__URL", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__RETRY", '{"total": 0}')
    send("train", Running())
    [record] = [record for record in caplog.records if record.name == "flows.deployment.open_lineage"]
    assert "\n" not in record.getMessage()


def test_flows_have_hooks_only_with_a_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert lineage_hooks() == {}
    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:9")
    assert len(lineage_hooks()) == 4
