"""Many waits at once, results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar

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
