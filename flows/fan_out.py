"""Shards prepared as Prefect tasks: one per shard, on threads, processes or Ray, retried alone."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from diffusion.data.ahead import in_order
from diffusion.data.chunks import Chunk, PreparedChunk
from diffusion.data.config import IngestConfig
from diffusion.data.fan_out import FanOut
from diffusion.errors import UserError
from flows.steps import step


def task_runner(config: IngestConfig) -> TaskRunner[Any]:
    """What runs the tasks of an ingest, as ``config`` says; Ray's cluster is found by its own RAY_ADDRESS."""
    if config.runner == "ray":
        try:
            from prefect_ray import RayTaskRunner
        except ImportError as error:
            raise UserError("ingest.runner=ray needs Ray: pip install 'darkroom[ray]', or use processes") from error
        ray: TaskRunner[Any] = RayTaskRunner()
        return ray
    if config.runner == "processes":
        return ProcessPoolTaskRunner(max_workers=config.workers)
    return ThreadPoolTaskRunner(max_workers=config.workers)


def prefect_fan_out(config: IngestConfig) -> FanOut:
    """One task for each chunk, on the task runner of the flow at hand."""

    def fan_out(prepare: Callable[[Chunk], PreparedChunk], chunks: Iterable[Chunk]) -> Iterator[PreparedChunk]:
        prepare_shard = step(prepare).with_options(name="prepare shard")
        yield from in_order((prepare_shard.submit(chunk) for chunk in chunks), 2 * config.workers)

    return fan_out
