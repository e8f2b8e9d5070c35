"""Worker threads of one core each, with torch's intra-operation parallelism off.

By default torch splits each operation over the cores. With small networks the threads then synchronize
thousands of times a second, and if another process is busy, each wait may take a time slice: measured on
two cores with one busy neighbour, training fell from 420 to under 10 images a second, and with two worker
threads from 430 to 150. As an operation on one thread always adds in the same order, results do not
depend on the number of cores.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

import torch


class _Unsplit:
    """Reentrant context manager that limits torch to one thread per operation, shared by all threads.

    The number is global to the process: the first entry saves it, the last exit restores it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._before = 1

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_num_threads(self._before)


_UNSPLIT = _Unsplit()


@contextmanager
def worker_threads(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Create a pool of ``count`` worker threads (None: one per core), with one torch thread per operation."""
    with (
        _UNSPLIT,
        # Each new thread has its own setting, which some of torch's libraries do not inherit.
        ThreadPoolExecutor(count or cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield pool


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
