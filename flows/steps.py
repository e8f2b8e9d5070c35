"""What the tasks of all flows have in common, and how flows end."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import exponential_backoff

from diffusion.errors import DarkroomError
from diffusion.escaping import escape_controls

P = ParamSpec("P")
R = TypeVar("R")


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
