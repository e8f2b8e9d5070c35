"""The Prefect server of a workspace, as its UI speaks to it."""

import base64
import subprocess
from typing import Any

import httpx

from tests.builders.forked import Fork
from tests.builders.waiting import wait_for
from tests.builders.workspace import Workspace

ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Prefect:
    """The workspace's Prefect server, as its UI speaks to it."""

    def __init__(self, workspace: Workspace) -> None:
        secret = base64.b64encode(workspace.variables["PREFECT_API_AUTH_STRING"].encode()).decode()
        self.client = httpx.Client(
            base_url=workspace.variables["PREFECT_API_URL"], headers={"Authorization": f"Basic {secret}"}, timeout=60
        )

    def filter(self, kind: str, **conditions: object) -> list[dict[str, Any]]:
        answer = self.client.post(f"/{kind}/filter", json=conditions)
        assert answer.is_success, answer.text
        items = answer.json()
        return list(items["events"] if kind == "events" else items)

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """The runs of a flow that no schedule made, newest first."""
        flow_runs = self.filter("flow_runs", flows={"name": {"any_": [flow]}}, sort="START_TIME_DESC")
        return [run for run in flow_runs if not run["auto_scheduled"]]

    def deployment(self, name: str) -> dict[str, Any]:
        return dict(self.client.get(f"/deployments/name/{name}").json())

    def start(self, name: str, **parameters: object) -> str:
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        url = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        answer = wait_for(lambda: self._unless_busy(self.client.post(url, json=body)))
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/flow_runs/{run_id}").json())

    def ended(self, run_id: str) -> dict[str, Any]:
        return wait_for(lambda: run if (run := self.run(run_id))["state_type"] in ENDED else None)

    def limit(self, name: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v2/concurrency_limits/{name}").json())

    def paused(self, process: Fork | subprocess.Popen[str]) -> dict[str, Any]:
        """The flow run that waits for input, once there is one."""

        def ask() -> list[dict[str, Any]]:
            assert process.poll() is None, process.communicate()
            return self.filter("flow_runs", flow_runs={"state": {"type": {"any_": ["PAUSED"]}}})

        [run] = wait_for(ask)
        return run

    def resume(self, run: dict[str, Any], **fields: object) -> httpx.Response:
        """Answer a run that waits for input."""
        url = f"/flow_runs/{run['id']}/resume"
        return wait_for(lambda: self._unless_busy(self.client.post(url, json={"run_input": fields})))

    @staticmethod
    def _unless_busy(answer: httpx.Response) -> httpx.Response | None:
        """None while its database is busy: it asks to come again, as Prefect's own client does."""
        return answer if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE else None
