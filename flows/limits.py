"""Turns: what only so many runs may do at once, by Prefect's global concurrency limits."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from diffusion.errors import UserError

MISSED = 4
"""Heartbeats without which a run counts as dead: 240 s at ours, more than the 180 s of runs that have Prefect's own."""
SHORTEST_LEASE = 60
"""Seconds; the server grants none for less."""

logger = logging.getLogger(__name__)


@contextmanager
def turn(name: str) -> Iterator[None]:
    """Inside, the run at hand holds a slot of the limit ``name``, for which it waits.

    ``darkroom deploy`` makes the limits. A run of a deployment needs them: UserError if one is missing. A run by hand
    goes by those that there are. One that was killed gives its slot back after ``silence()`` seconds.
    """
    _say_if_taken(name)
    try:
        # A server that is away for a moment is no reason to throw away hours of work.
        with concurrency(
            name,
            lease_duration=max(silence(), SHORTEST_LEASE),
            strict=_deployed(),
            raise_on_lease_renewal_failure=False,
        ):
            yield
    except ConcurrencySlotAcquisitionError as error:
        if "must be created" not in str(error):
            raise
        raise UserError(
            f"Prefect has no concurrency limit {name}, without which runs of deployments would get in each other's "
            "way: run `darkroom deploy`"
        ) from error


def silence() -> int:
    """Seconds without a heartbeat after which a run counts as dead."""
    return MISSED * (get_current_settings().flows.heartbeat_frequency or SHORTEST_LEASE)


def _deployed() -> bool:
    """Whether the run at hand is one of a deployment, or part of one."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run.root_flow_run_id).deployment_id is not None


def _say_if_taken(name: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return
    if limit.active and limit.active_slots >= limit.limit:
        logger.info("waiting for its turn: %s is taken", name)
