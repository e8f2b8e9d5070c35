"""What other systems hear, on a real stack: MLflow's signed webhooks and messages by Prefect."""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from mlflow.client import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.deployment.tasks import emit
from flows.monitor import make_drift_event
from flows.registry.alarms import Alarms, NumberedAlarm
from tests.builders.champion_settings import QUICK
from tests.builders.http_server import QuietHandler, serving
from tests.builders.waiting import wait_for
from tests.builders.workspace import PARAMS, Workspace, running

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

SHARED = "a text that the receiver shares with MLflow"
NEVER = "0 0 1 1 *"
"""A schedule that starts nothing while tests run."""


@dataclass
class Receiver:
    """A system that is told: of each request its headers and its body."""

    url: str = ""
    messages: list[str] = field(default_factory=list)
    events: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def aliases(self) -> list[tuple[str, str]]:
        """Aliases that were set, with their versions, of requests whose signature is right."""
        found = list[tuple[str, str]]()
        for headers, body in self.events:
            # As docs/how-to/notify.md says.
            signed = f"{headers['x-mlflow-delivery-id']}.{headers['x-mlflow-timestamp']}.".encode() + body
            digest = base64.b64encode(hmac.digest(SHARED.encode(), signed, hashlib.sha256)).decode()
            assert hmac.compare_digest(headers["x-mlflow-signature"], f"v1,{digest}")
            event = json.loads(body)
            if (event["entity"], event["action"]) == ("model_version_alias", "created"):
                found.append((event["data"]["alias"], event["data"]["version"]))
        return found


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/mlflow":
                receiver.events.append(({name.lower(): value for name, value in self.headers.items()}, body))
            else:
                receiver.messages.append(json.loads(body)["text"])
            self.answer(status=204)

    with serving(Handler) as receiver.url:
        yield receiver


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Workspace]:
    """A running stack with two versions, whose webhooks may lead to this machine."""
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | QUICK, 120) as space:
        space.variables |= {
            "MAILBOX": f"{receiver.url}/T0/B0/secret-token",
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        }
        space.run("up")
        space.fork()
        with pytest.MonkeyPatch.context() as patch:
            space.join(patch)
            events: Any = ["model_version.created", "model_version_alias.created"]
            MlflowClient().create_webhook("deployer", f"{receiver.url}/mlflow", events, secret=SHARED)
        schedules = ("--cron", NEVER, "--monitor-cron", NEVER)
        space.json("deploy", "--webhook-env", "MAILBOX", "--set", "ingest.source=images", *schedules)
        space.two_versions()
        yield space


def told(receiver: Receiver, *words: str) -> list[str]:
    """Messages with all these words, once there are any."""
    return wait_for(lambda: [text for text in receiver.messages if all(word in text for word in words)])


def test_mlflow_signs_the_events_of_promotion_and_rollback(workspace: Workspace, receiver: Receiver) -> None:
    wait_for(lambda: ("champion", "1") in receiver.aliases())
    created = [json.loads(body)["data"]["version"] for _, body in receiver.events if b'"model_version"' in body]
    assert sorted(created) == ["1", "2"]
    workspace.json("promote", "--to", "2")
    wait_for(lambda: ("champion", "2") in receiver.aliases())
    receiver.events.clear()
    workspace.json("model", "rollback", "--reason", "three eyes")
    wait_for(lambda: ("champion", "1") in receiver.aliases())


def test_secrets_of_webhooks_are_encrypted_and_survive_a_restart(
    workspace: Workspace, receiver: Receiver, server: MlflowClient
) -> None:
    home = workspace.folder / ".darkroom"
    assert not [path for path in Path(home, "mlflow").iterdir() if SHARED.encode() in path.read_bytes()]
    key = json.loads((home / "credentials.json").read_bytes())["mlflow_webhook_key"]
    Fernet(key)
    workspace.variables["MLFLOW_WEBHOOK_CACHE_TTL"] = "1"
    workspace.run("up")
    receiver.events.clear()
    [webhook] = server.list_webhooks()
    assert server.test_webhook(webhook.webhook_id).success
    wait_for(lambda: receiver.aliases() or receiver.events)
    receiver.aliases()


def test_each_promotion_and_rollback_is_one_message(workspace: Workspace, receiver: Receiver) -> None:
    [first] = told(receiver, "models:/blobs/1 is champion: ")
    assert "/models/blobs/versions/1" in first
    assert "comparison.html" in first
    assert told(receiver, "models:/blobs/2 is ")
    # Given again, nothing is new.
    workspace.run("promote", "--set", "training.seed=1", "--set", "training.output=runs/second", code=(0, 3))
    workspace.json("promote", "--to", "2", "--reason", "rounder")
    [by_hand] = told(receiver, "by hand, rounder")
    assert by_hand.startswith("models:/blobs/2 is champion instead of version 1: ")
    workspace.json("model", "rollback", "--reason", "four eyes")
    assert len(told(receiver, "models:/blobs/1 is champion again", "four eyes")) == 1
    assert len(receiver.messages) == len(set(receiver.messages))


def test_drift_is_one_message(
    workspace: Workspace, receiver: Receiver, server: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in workspace.variables.items():
        if name.startswith("DARKROOM_"):
            monkeypatch.setenv(name, value)
    alarm = NumberedAlarm.model_validate(
        {"number": 1, "model": "other", "key": "a" * 64, "when": "2026-12-01T00:00:00Z", "who": "me@here"}
        | {"version": "models:/other/3", "dataset": "other", "content_digest": "b" * 64, "causes": ["images"]}
        | {"reason": "new images differ"}
    )
    names = (PREFECT_API_URL, PREFECT_API_AUTH_STRING)
    with temporary_settings({setting: workspace.variables[setting.name] for setting in names}):
        with get_client(sync_client=True) as client:
            assert client.api_healthcheck() is None
        for _ in range(2):
            emit(make_drift_event(alarm, Alarms.of("other")))
    [text] = told(receiver, "models:/other/3 drifted", "new images differ")
    assert "/models/other/versions/3" in text


def test_a_receiver_that_is_away_fails_no_command(workspace: Workspace, tmp_path: Path) -> None:
    variables = dict(workspace.variables)
    try:
        # Of another Prefect, which does not answer.
        workspace.variables |= {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_API_AUTH_STRING": "a:b"}
        process = workspace.start("promote", "--to", "2", "--reason", "quiet", "--json")
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert json.loads(out)["version"]["number"] == 2
        assert len([line for line in err.splitlines() if "no message says that" in line]) == 1
        assert "Traceback" not in err
    finally:
        workspace.variables = variables
