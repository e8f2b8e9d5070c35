"""Shared parts of the Prefect flows: task retries, concurrency slots, final states and hooks."""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.events import Event
from prefect.events.clients import get_events_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed
from prefect.tasks import exponential_backoff

from diffusion.common.errors import DarkroomError, TransientError, UserError
from diffusion.common.escaping import escape_controls
from diffusion.data.ingest.config import CaptionProgram
from flows.config import Params
from flows.environment import settings

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
MIN_LEASE_SECONDS = 60  # shortest lease of a concurrency slot that the server grants, in seconds


def retryable_task(function: Callable[P, R]) -> Task[P, R]:
    """Prefect task, retried except after a DarkroomError that is not transient.

    It is uncached, as each recognises finished work by digests: one that fans out continues with what is missing.
    """

    def is_transient(_: object, __: object, state: Any) -> bool:
        error = state.result(raise_on_failure=False)
        return isinstance(error, TransientError) or not isinstance(error, DarkroomError)

    return task(
        task_run_name=getattr(function, "__name__", "task").replace("_", " "),
        retries=2,
        retry_delay_seconds=exponential_backoff(2),
        retry_jitter_factor=0.5,
        retry_condition_fn=is_transient,
        cache_policy=NO_CACHE,
    )(function)


def completed_state(result: R, message: str, name: str = "Completed") -> R:
    """Return value of a flow that sets the message of its final state, shown in Prefect's UI.

    Prefect unwraps the state: the caller of the flow gets ``result``.
    """
    return cast(R, Completed(name=name, message=escape_controls(message), data=result))


def emit(event: Event) -> None:
    """Emit ``event``, and wait until the server has it: Prefect's own emitter sends in the background."""

    async def emit_confirmed() -> None:
        async with get_events_client(checkpoint_every=1) as client:
            await client.emit(event)

    asyncio.run(emit_confirmed())


def artifact_key(kind: str, name: str) -> str:
    """Key of an artifact, one for each data set or model ``name``, so that each has a history of its own."""
    return re.sub("[^a-z0-9]+", "-", f"{kind}-{name}".lower()).strip("-")


@contextmanager
def concurrency_slot(name: str) -> Iterator[None]:
    """Context in which the current run holds a slot of the concurrency limit ``name``; waits for a free one.

    A run of a deployment requires the limit, which ``darkroom deploy`` creates (else UserError); a manual run does not.
    The slot of a killed run is released after ``heartbeat_timeout()`` seconds.
    """
    with get_client(sync_client=True) as client:
        is_deployed = client.read_flow_run(flow_run.root_flow_run_id).deployment_id is not None
        limit = None
        with suppress(ObjectNotFound):
            limit = client.read_global_concurrency_limit_by_name(name)
            if limit.active and limit.active_slots >= limit.limit:
                logger.info("waiting for a slot of the concurrency limit %s%s", name, _describe_holders(client, name))
    if limit is None and not is_deployed:
        # Prefect would warn that there is none, on each run of who never deploys.
        yield
        return
    lease = max(heartbeat_timeout(), MIN_LEASE_SECONDS)
    try:
        # A short outage of the server must not discard hours of work.
        with concurrency(name, lease_duration=lease, strict=is_deployed, raise_on_lease_renewal_failure=False):
            yield
    except ConcurrencySlotAcquisitionError as error:
        if "must be created" not in str(error):
            raise
        raise UserError(
            f"Prefect has no concurrency limit {name}, without which runs of deployments would get in each other's "
            "way: run `darkroom deploy`"
        ) from error


def _describe_holders(client: SyncPrefectClient, name: str) -> str:
    """Flow runs that may hold a slot of the concurrency limit ``name``, with their pages; some may wait as well."""
    running = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
    runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=running), limit=200)
    # A limit is named after one data set, or for trainings after the kind of device.
    holders = [
        f"{run.name} ({flow_run.ui_url.replace(flow_run.id, str(run.id))})"
        for run in runs
        if (run.name.startswith("train-") if name.startswith("training-") else run.name == name)
        and str(run.id) != flow_run.id
    ]
    return f": running is {', '.join(holders[:5])}" if holders else ""


def require_permitted(params: Params) -> None:
    """Raise UserError if a deployment's parameters make its worker run, ask or overwrite what it does not permit.

    Whoever may start a run sets its parameters. A run that was started on this machine may do whatever its user may.
    """
    if deployment.id is None:
        return
    captioner, permitted = params.ingest.captioner, settings()
    if captioner is not None:
        program = CaptionProgram(**{name: getattr(captioner, name) for name in CaptionProgram.model_fields})
        if program not in permitted.captioners:
            text = escape_controls(json.dumps(program.model_dump(exclude_none=True), ensure_ascii=False))
            raise UserError(
                f"ingest.captioner is not one that this worker permits: if it may be used, add {text} to the list "
                "DARKROOM_CAPTIONERS in the worker's environment"
            )
    runs = Path("runs").resolve()
    if runs not in params.run_folder.resolve().parents:
        raise UserError(
            f"training.output is {params.run_folder}, and not in the worker's folder {runs}: give one there"
        )


def heartbeat_timeout() -> int:
    """Seconds after which a run counts as dead, four heartbeats: 240 s at our interval, more than Prefect's 180 s."""
    return 4 * (get_current_settings().flows.heartbeat_frequency or MIN_LEASE_SECONDS)
