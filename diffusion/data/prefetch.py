"""Ordered work on threads and processes, a little ahead; imports little, so that processes start early."""

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


class FutureLike(Protocol[Result_co]):
    """A future of any library."""

    def result(self) -> Result_co:
        """Wait for the result; raises the error of the work."""


def yield_in_order(futures: Iterator[FutureLike[Result]], start_count: int) -> Iterator[Result]:
    """Yield the results of ``futures`` in order; ``start_count`` of them are started before the first is requested."""
    queue = deque(islice(futures, start_count))
    while queue:
        yield queue.popleft().result()
        queue.extend(islice(futures, 1))


def prefetch(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, pool: Executor | None = None
) -> Generator[Result, None, None]:
    """Yield ``work`` of each of ``items`` in order; up to twice ``workers`` are buffered. Shuts ``pool`` down."""
    pool = pool or ThreadPoolExecutor(workers)
    try:
        yield from yield_in_order((pool.submit(work, item) for item in items), 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


class FanOut(Protocol):
    """Runs a function on items on any workers; yields the results in the order of the items."""

    def __call__(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Start a few items ahead; an item that fails after all retries raises here."""


def local_fan_out(config: IngestConfig) -> FanOut:
    """Run on threads or processes of this machine, as ``config`` says; processes start at once."""
    if config.runner == "ray":
        raise UserError(
            "ingest.runner=ray needs `darkroom ingest` with a Prefect server: here use threads or processes"
        )
    if config.runner == "processes":
        # The fork server imports the modules once for all while the caller plans.
        forkserver.set_forkserver_preload(["diffusion.data.ingest.chunks"])
        forkserver.ensure_running()

    def fan_out(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        processes = config.runner == "processes"
        pool = ProcessPoolExecutor(config.workers, get_context("forkserver"), end_with_parent) if processes else None
        return prefetch(work, items, config.workers, pool)

    return fan_out
