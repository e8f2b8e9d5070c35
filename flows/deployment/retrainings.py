"""Retrainings in this folder, deployed or by hand: start one, list them, and see how far one is."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import DeploymentFilter, FlowFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort, LogSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.utilities.urls import url_for
from pydantic import ValidationError

from diffusion.common.errors import UserError
from flows.config import Params

logger = logging.getLogger(__name__)

RETRAIN = FlowFilter.model_validate({"name": {"any_": ["retrain"]}})
MAX_LISTED = 20
"""Maximum number of retrainings in a list, the newest."""
STARTED_HERE = "studio"
"""Tag of the flow runs that ``start`` creates."""


@dataclass(frozen=True)
class RetrainingStep:
    """A step of a retraining, which is a flow run of its own."""

    name: str
    state: str
    seconds: float
    page: str
    """Address in Prefect's UI."""


@dataclass(frozen=True)
class Retraining:
    """Flow run of ``retrain``, as Prefect has it now."""

    id: UUID
    params: Params
    state: str
    """Name of its state, such as Running or Completed."""
    message: str
    is_final: bool
    begun: datetime | None
    ended: datetime | None
    page: str
    """Address in Prefect's UI."""

    @classmethod
    def of(cls, run: FlowRun) -> "Retraining":
        """Take over a flow run; raises UserError for parameters of another version of Darkroom."""
        try:
            params = Params.model_validate(run.parameters["params"])
        except (KeyError, ValidationError) as error:
            raise UserError(f"flow run {run.id} has parameters of another version: start a new one") from error
        state, name = run.state, run.state_name or "Pending"
        is_final = state is not None and state.is_final()
        message = (state and state.message) or ""
        return cls(run.id, params, name, message, is_final, run.start_time, run.end_time, _page(run.id))


@contextmanager
def prefect_client() -> Iterator[SyncPrefectClient]:
    """Client of the Prefect server; raises UserError if there is none or it does not answer."""
    if not get_current_settings().api.url:
        raise UserError("no Prefect server was there at the start: run `darkroom up`, and then this command again")
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.HTTPError as error:
        raise UserError(f"Prefect does not answer ({type(error).__name__}): run `darkroom up`") from error


def workspace_tag() -> str:
    """Tag of the flow runs that are started by hand in this process's folder."""
    return f"in {Path.cwd()}"


def workspace_of(deployment: DeploymentResponse) -> Path | None:
    """Folder that runs of the deployment work in, by its pull steps; None if they do not say."""
    steps = [options for step in deployment.pull_steps or () for name, options in step.items() if "directory" in name]
    return Path(steps[0]["directory"]).resolve() if steps else None


def _deployments_here(client: SyncPrefectClient) -> list[DeploymentResponse]:
    here = Path.cwd()
    return [each for each in client.read_deployments(flow_filter=RETRAIN) if workspace_of(each) == here]


def _require_deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    if deployments := _deployments_here(client):
        return deployments
    raise UserError(f"no deployment retrains in {Path.cwd()}: run `darkroom deploy` there")


def _runs_here(client: SyncPrefectClient, selection: dict[str, Any]) -> list[FlowRun]:
    """Retrainings of deployments that work in this process's folder, and by hand in it, the newest first."""
    ids = [deployment.id for deployment in _deployments_here(client)]
    deployed = DeploymentFilter.model_validate({"id": {"any_": ids}})
    runs = [
        run
        for deployment_filter, more in ((deployed, {}), (None, {"tags": {"all_": [workspace_tag()]}}))
        for run in client.read_flow_runs(
            flow_filter=RETRAIN,
            flow_run_filter=FlowRunFilter.model_validate(selection | more),
            deployment_filter=deployment_filter,
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=MAX_LISTED,
        )
    ]
    return sorted(runs, key=lambda run: run.expected_start_time or datetime.now(UTC), reverse=True)[:MAX_LISTED]


def choose_deployment(client: SyncPrefectClient, dataset: str) -> DeploymentResponse:
    """Deployment for the data set, or else any that works here; raises UserError if nothing would run it."""
    deployments = _require_deployments(client)
    deployment = next((each for each in deployments if each.name == dataset), deployments[0])
    pool = deployment.work_pool_name
    if pool is None or not any(
        worker.status is not None and worker.status.value == "ONLINE"
        for worker in client.read_workers_for_work_pool(pool)
    ):
        raise UserError(
            f"no worker serves the work pool {pool}: run `darkroom up`, or `prefect worker start --pool {pool}`"
        )
    return deployment


def base_of(sections: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Sections that a retraining of the data set takes over from the configuration of a deployment.

    All of them for its own data set; for another one, those that say how models are judged and approved.
    """
    if sections["training"]["dataset"] == dataset:
        return sections
    kept = {name: sections[name] for name in ("preset", "evaluation", "gate", "curation") if name in sections}
    return kept | {"registry": {"approval": sections.get("registry", {}).get("approval", False)}}


def start(client: SyncPrefectClient, deployment: DeploymentResponse, params: Params) -> UUID:
    """Start a retraining as a run of the deployment; returns the ID of the flow run."""
    slot = f"retrain-{params.training.dataset}"
    try:
        client.read_global_concurrency_limit_by_name(slot)
    except ObjectNotFound:  # of a data set for which nothing was deployed
        client.upsert_global_concurrency_limit_by_name(slot, 1)
    parameters = {"params": params.model_dump(mode="json")}
    tags = [*deployment.tags, STARTED_HERE]
    run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters, name=slot, tags=tags)
    return run.id


def list_retrainings() -> list[Retraining]:
    """List the retrainings in this process's folder, the newest first, without those that are scheduled.

    Raises UserError if there is none, and nothing that could start one.
    """
    soon = datetime.now(UTC) + timedelta(minutes=1)
    with prefect_client() as client:
        if not (runs := _runs_here(client, {"expected_start_time": {"before_": soon}})):
            _require_deployments(client)
    retrainings = []
    for run in runs:
        try:
            retrainings.append(Retraining.of(run))
        except UserError as error:  # it does not hide the others
            logger.warning("%s", error)
    return retrainings


def read_retraining(run_id: UUID) -> tuple[Retraining, list[RetrainingStep], str]:
    """Read a retraining with its steps so far, and its newest line of progress, which may be empty."""
    with prefect_client() as client:
        # By a list, which is limited to those that work here.
        runs = _runs_here(client, {"id": {"any_": [run_id]}})
        if not runs:
            raise UserError(f"there is no retraining {run_id} here: choose one of the list")
        children = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [run_id]}}),
            sort=FlowRunSort.START_TIME_ASC,
        )
        line = _progress_line(client, [each.id for each in children if each.state and not each.state.is_final()])
    steps = [
        RetrainingStep(
            each.name.partition("-")[0], each.state_name or "", each.estimated_run_time.total_seconds(), _page(each.id)
        )
        for each in children
    ]
    return Retraining.of(runs[0]), steps, line


def _progress_line(client: SyncPrefectClient, run_ids: Sequence[UUID]) -> str:
    """Newest line of the form "images: 3 of 10, …" in the logs of these runs."""
    if not run_ids:
        return ""
    selection = LogFilter.model_validate({"flow_run_id": {"any_": run_ids}})
    messages = [log.message for log in client.read_logs(selection, limit=20, sort=LogSort.TIMESTAMP_DESC)]
    return next((message for message in messages if re.search(r": [\d,]+ of [\d,]+", message)), "")


def _page(run_id: UUID) -> str:
    return url_for("flow-run", run_id) or ""
