"""Prefect tasks as all flows have them: retries, task runners, fan-out, concurrency limits, and how flows end."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from diffusion.common.child_processes import end_with_parent
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import escape_controls
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.prefetch import Begun, FanOut, in_order

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
MISSED = 4
"""Heartbeats without which a run counts as dead: 240 s at ours, more than the 180 s of runs that have Prefect's own."""
SHORTEST_LEASE = 60
"""Seconds; the server grants none for less."""


def step(function: Callable[P, R]) -> Task[P, R]:
    """A task that is tried again, later and later, unless it failed with a message meant for a person.

    Prefect caches nothing: each step finds out itself, by digests, what is done already, so that it does
    so in a new run and on another machine as well.
    """
    return task(
        retries=2,
        retry_delay_seconds=exponential_backoff(2),
        retry_jitter_factor=0.5,
        retry_condition_fn=_may_pass,
        cache_policy=NO_CACHE,
    )(function)


def ended(result: R, message: str, name: str = "Completed") -> R:
    """What a flow returns whose state is to say ``message``, in Prefect's UI and in notifications.

    Whoever called the flow gets ``result``: Prefect takes it out of the state.
    """
    return cast(R, Completed(name=name, message=escape_controls(message), data=result))


def _may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    failure = state.result(raise_on_failure=False)
    return not isinstance(failure, DarkroomError)


class Spread(Protocol):
    """Settings that say how work is spread."""

    @property
    def runner(self) -> Literal["threads", "processes", "ray"]:
        """What runs it."""

    @property
    def workers(self) -> int:
        """How much of it runs at the same time."""


def task_runner(config: Spread) -> TaskRunner[Any]:
    """What runs the tasks of a flow, as ``config`` says; Ray's cluster is found by its own RAY_ADDRESS."""
    if config.runner == "ray":
        try:
            from prefect_ray import RayTaskRunner
        except ImportError as error:
            raise UserError(
                "runner=ray needs Ray: run `pip install -e '.[ray]'` in Darkroom's checkout, or use processes"
            ) from error
        ray: TaskRunner[Any] = RayTaskRunner()
        return ray
    if config.runner == "processes":
        return ProcessPoolTaskRunner(max_workers=config.workers, initializer=end_with_parent)
    return ThreadPoolTaskRunner(max_workers=config.workers)


def submitter(task: Task[P, R], config: Spread, gpu: bool) -> Callable[P, Begun[R]]:
    """What submits ``task`` to the task runner of ``config``; on Ray each has a core, and with ``gpu`` a GPU."""
    if config.runner != "ray":
        return task.submit
    from prefect_ray.context import remote_options

    def submit(*args: P.args, **kwargs: P.kwargs) -> Begun[R]:
        with remote_options(num_cpus=1, num_gpus=int(gpu)):
            return task.submit(*args, **kwargs)

    return submit


def prefect_fan_out(config: IngestConfig) -> FanOut:
    """One task for each chunk, on the task runner of the flow at hand."""

    def fan_out(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        prepare_shard = step(work).with_options(name="prepare shard")
        yield from in_order((prepare_shard.submit(item) for item in items), 2 * config.workers)

    return fan_out


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
