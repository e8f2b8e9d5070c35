"""Work on threads and processes, a little ahead of whoever takes the results, which come in order.

Loads little, so that processes can begin to start before their caller loads the rest.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from multiprocessing import forkserver, get_context
from typing import Protocol, TypeVar

from diffusion.common.child_processes import end_with_parent
from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig

Item = TypeVar("Item")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Begun(Protocol[Result_co]):
    """A future, of whatever makes them."""

    def result(self) -> Result_co:
        """Wait for it; raises what went wrong."""


def in_order(futures: Iterator[Begun[Result]], begun: int) -> Iterator[Result]:
    """The results of ``futures`` in their order; ``begun`` of them are under way before the first is asked for."""
    waiting = deque(islice(futures, begun))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(islice(futures, 1))


def ahead(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """``work`` of each of ``items`` in their order, ``workers`` at a time; at most twice as many results wait."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield from in_order((pool.submit(work, item) for item in items), 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


class FanOut(Protocol):
    """Runs a function on items, wherever; yields the results in the order of the items."""

    def __call__(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Begin a few ahead; an item that fails raises here, after what retries there are."""


def local_fan_out(config: IngestConfig) -> FanOut:
    """Threads or processes of this machine, as ``config`` says; processes begin to start at once."""
    if config.runner == "ray":
        raise UserError(
            "ingest.runner=ray needs `darkroom ingest` with a Prefect server: here use threads or processes"
        )
    if config.runner == "processes":
        # What they are forked from loads what they need, once for all, while the caller plans.
        forkserver.set_forkserver_preload(["diffusion.data.ingest.chunks"])
        forkserver.ensure_running()

    def fan_out(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        pool: Executor
        if config.runner == "processes":
            pool = ProcessPoolExecutor(config.workers, get_context("forkserver"), end_with_parent)
        else:
            pool = ThreadPoolExecutor(config.workers)
        try:
            yield from in_order((pool.submit(work, item) for item in items), 2 * config.workers)
        finally:
            pool.shutdown(cancel_futures=True)

    return fan_out
