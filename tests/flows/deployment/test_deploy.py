"""What Prefect is to do by itself: one declaration, filled in, that Prefect's own models take."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.events import DeploymentEventTrigger
from prefect.events.schemas.automations import AutomationCore
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.utilities.user_templates import render_user_template_sync
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import is_valid_schema, validate

from diffusion.common.errors import UserError
from diffusion.process.samplers import SAMPLERS
from flows.config import Params
from flows.datasets.sync import CREATED
from flows.deployment.deploy import PACKAGED, deploy, fill_placeholders, read_definitions
from flows.monitor import DRIFTED, MonitorResult, make_drift_event, monitor
from flows.promote import waiting_event
from flows.retrain import retrain
from flows.sample_on_demand import sample_on_demand
from tests.builders import ROOT
from tests.builders.hostile_texts import YAML
from tests.docs.pages import blocks

PARAMS = Params.model_validate({"training": {"dataset": "faces"}, "ingest": {"source": "images"}})
VALUES: dict[str, Any] = {
    "DATASET": "faces",
    "MODEL": "faces",
    "PARAMS": PARAMS.model_dump(mode="json"),
    "SAMPLING": PARAMS.sampling.model_dump(mode="json"),
    "SAMPLING_BATCH": PARAMS.sampling_batch.model_dump(mode="json"),
    "WORKSPACE": "/srv/faces",
    "POOL": "cpu",
    "TRAINING_POOL": "gpu",
    "CRON": "0 2 * * *",
    "MONITOR_CRON": "0 5 * * *",
    "HEARTBEAT": "60",
    "SILENCE": 240,
}
FLOWS = {
    "flows.retrain.retrain": retrain,
    "flows.sample_on_demand.sample_on_demand": sample_on_demand,
    "flows.monitor.monitor": monitor,
}


def declared(**more: object) -> dict[str, Any]:
    return read_definitions(PACKAGED, VALUES | more)


def test_the_package_ships_the_prefect_file_at_the_top() -> None:
    assert ROOT.joinpath("prefect.yaml").resolve() == PACKAGED.resolve()


def test_prefect_takes_every_deployment_and_its_parameters_fit_the_flows() -> None:
    deployments = declared()["deployments"]
    assert [each.entrypoint for each in PrefectYamlModel.model_validate(declared()).deployments] == list(FLOWS)
    for each in deployments:
        schema = parameter_schema(FLOWS[each["entrypoint"]]).model_dump(exclude_unset=True)
        is_valid_schema(schema)
        assert validate(each["parameters"], schema, raise_on_error=False, ignore_required=False) == []
    assert Params.model_validate(deployments[0]["parameters"]["params"]) == PARAMS
    assert [each["work_pool"]["name"] for each in deployments] == ["gpu", "cpu", "cpu"]


def test_retraining_runs_on_schedule_and_own_data_set_events() -> None:
    deployment = declared()["deployments"][0]
    [schedule], [trigger, drift] = deployment["schedules"], deployment["triggers"]
    assert (schedule["cron"], schedule["timezone"]) == ("0 2 * * *", "UTC")
    assert DeploymentEventTrigger.model_validate(trigger).expect == {CREATED}
    assert trigger["match"] == {"prefect.resource.id": "darkroom.dataset.faces"}
    assert trigger["parameters"] == {"version": "{{ event.payload.digest }}"}
    assert DeploymentEventTrigger.model_validate(drift).expect == {DRIFTED}
    assert drift["match"] == {"prefect.resource.id": "darkroom.model.faces"}
    assert "parameters" not in drift
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_every_form_field_has_a_description() -> None:
    schema = parameter_schema(sample_on_demand).model_dump()
    for name, field in schema["properties"].items():
        assert field.get("description"), name
    samplers = [each for name, each in schema["definitions"].items() if name.endswith("Sampling")]
    assert len(samplers) == len(SAMPLERS)
    for name, field in [item for each in samplers for item in each["properties"].items()]:
        assert field.get("description") or "const" in field, name
    assert schema["properties"]["count"]["default"] == 64
    assert schema["required"] == ["model"]


def test_prefect_takes_every_automation() -> None:
    for each in declared()["automations"]:
        AutomationCore.model_validate(each)


def test_a_run_waiting_for_approval_outlives_the_day() -> None:
    deployment, run = uuid4(), uuid4()
    event = waiting_event(run, deployment, "models:/faces/2 waits")
    received = ReceivedEvent.model_validate(event.model_dump(mode="json") | {"received": event.occurred})
    automations = {each["name"]: each for each in declared()["automations"]}
    ends_after_a_day = EventTrigger.model_validate(
        automations["darkroom: what runs for more than a day is cancelled"]["trigger"]
    )
    assert ends_after_a_day.covers(received)
    assert ends_after_a_day.expects(received.event)
    # As docs/how-to/notify.md says.
    [told] = yaml.safe_load(blocks(ROOT / "docs" / "how-to" / "notify.md", "yaml")[0])
    told["actions"][0]["block_document_id"] = str(uuid4())
    AutomationCore.model_validate(told)
    trigger = EventTrigger.model_validate(told["trigger"])
    assert trigger.covers(received)
    assert trigger.expects(received.event)
    body = told["actions"][0]["body"]
    assert render_user_template_sync(body, {"event": received}) == "models:/faces/2 waits"
    failed = {"name": "retrain-faces", "state": {"name": "Failed", "message": "it broke"}}
    text = render_user_template_sync(body, {"event": received.model_copy(update={"payload": {}}), "flow_run": failed})
    assert text == "retrain-faces: Failed. it broke"


def test_a_champion_and_its_images_have_one_event() -> None:
    result = MonitorResult(model="models:/faces/3", content_digest="a", figures={}, summary="", skipped=False)
    other = result.model_copy(update={"content_digest": "b"})
    events = [
        make_drift_event(*each) for each in ((result, "faces", "w"), (other, "faces", "w"), (result, "faces", "v"))
    ]
    assert make_drift_event(result, "faces", "w").id == events[0].id
    assert len({event.id for event in events}) == 3
    trigger = DeploymentEventTrigger.model_validate(declared()["deployments"][0]["triggers"][1])
    assert (trigger.expect, trigger.match.root["prefect.resource.id"]) == ({events[0].event}, events[0].resource.id)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("deployments: [", "is not plain YAML"),
        ("name: x", "pull: Field required"),
        (PACKAGED.read_text().replace("$DATASET", "$DATASETS"), r"nothing is called \$DATASETS; there is CRON"),
    ],
)
def test_a_declaration_that_cannot_be_is_one_line(tmp_path: Path, change: str, words: str) -> None:
    path = tmp_path / "prefect.yaml"
    path.write_text(change)
    with pytest.raises(UserError, match=words):
        read_definitions(path, VALUES)


@pytest.mark.parametrize("what", YAML)
def test_a_hostile_declaration_is_an_error_of_the_user(tmp_path: Path, what: str) -> None:
    path = tmp_path / "prefect.yaml"
    path.write_bytes(YAML[what])
    with pytest.raises(UserError):
        read_definitions(path, VALUES)


@pytest.mark.parametrize("value", [3, [3], [{}], {}, None])
def test_a_declaration_of_another_shape_is_an_error(tmp_path: Path, value: object) -> None:
    for section in ("work_pools", "concurrency_limits", "deployments", "automations"):
        # Prefect itself checks what a deployment or an automation holds.
        if value != [{}] or section in ("work_pools", "concurrency_limits"):
            path = tmp_path / "prefect.yaml"
            path.write_text(yaml.safe_dump(yaml.safe_load(PACKAGED.read_text()) | {section: value}))
            with pytest.raises(UserError, match=section):
                read_definitions(path, VALUES)


def test_a_placeholder_alone_keeps_its_type() -> None:
    node = {"alone": "{{ $N }}", "within": "n={{ $N }}", "event": "{{ event.id }}", "other": [1, "{{ $N }}"]}
    assert fill_placeholders(node, {"N": 7}, Path("x")) == {
        "alone": 7,
        "within": "n=7",
        "event": "{{ event.id }}",
        "other": [1, 7],
    }


def test_invalid_schedule_is_an_error() -> None:
    with pytest.raises(UserError, match=r"'at two' is not a cron schedule: write it like '0 2 \* \* \*'"):
        deploy(PARAMS, Path("/srv"), "cpu", "gpu", "at two", "0 5 * * *")


@pytest.mark.slow
def test_scheduled_flows_import_no_torch_or_mlflow_when_idle() -> None:
    script = (
        "import sys, flows.retrain, flows.sample_on_demand, flows.monitor, flows.deployment.deploy\n"
        "print(*sorted({'torch', 'mlflow', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
