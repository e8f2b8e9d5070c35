"""What other systems hear, on a real stack: MLflow's signed webhooks."""

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

from tests.builders.champion_settings import QUICK
from tests.builders.http_server import QuietHandler, serving
from tests.builders.waiting import wait_for
from tests.builders.workspace import PARAMS, Workspace, running

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

SHARED = "a text that the receiver shares with MLflow"


@dataclass
class Receiver:
    """A system that is told: of each request its headers and its body."""

    url: str = ""
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
            receiver.events.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.answer(status=204)

    with serving(Handler) as receiver.url:
        yield receiver


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Workspace]:
    """A running stack with two versions, whose webhooks may lead to this machine."""
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | QUICK, 120) as space:
        space.variables |= {
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        }
        space.run("up")
        space.fork()
        with pytest.MonkeyPatch.context() as patch:
            space.join(patch)
            events: Any = ["model_version.created", "model_version_alias.created"]
            MlflowClient().create_webhook("deployer", f"{receiver.url}/mlflow", events, secret=SHARED)
        space.two_versions()
        yield space


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
