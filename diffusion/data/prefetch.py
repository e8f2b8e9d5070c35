"""Ordered work of pools, a little ahead."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar

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
