"""Many waits at once, results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(futures: Iterator[Future[Result]], begun: int) -> Iterator[Result]:
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
