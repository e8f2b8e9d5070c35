"""Work as Prefect tasks, one per shard or chunk, on threads, processes or Ray, each retried alone."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from prefect import Task
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from diffusion.data.ahead import Begun, in_order
from diffusion.data.chunks import Chunk, PreparedChunk
from diffusion.data.config import IngestConfig
from diffusion.data.fan_out import FanOut
from diffusion.errors import UserError
from diffusion.parent import end_with_parent
from flows.steps import step

P = ParamSpec("P")
R = TypeVar("R")


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

    def fan_out(prepare: Callable[[Chunk], PreparedChunk], chunks: Iterable[Chunk]) -> Iterator[PreparedChunk]:
        prepare_shard = step(prepare).with_options(name="prepare shard")
        yield from in_order((prepare_shard.submit(chunk) for chunk in chunks), 2 * config.workers)

    return fan_out
