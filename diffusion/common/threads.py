"""Worker threads of one core each, with torch's intra-operation parallelism off.

Otherwise the threads of a small network synchronize thousands of times a second, and if another process is busy, each
wait may take a time slice: on two cores with one busy neighbour, training fell from 420 to under 10 images a second,
with two worker threads from 430 to 150. Nor do results depend on the number of cores, as one thread adds in one order.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock

import torch


class SharedSettings:
    """Reentrant context manager that applies ``settings`` to all threads at the first entry, until the last exit."""

    def __init__(self, settings: Callable[[], AbstractContextManager[None]]) -> None:
        self._settings = settings
        self._lock = Lock()
        self._inside = 0
        self._applied = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._applied.enter_context(self._settings())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._applied.close()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    thread_count, libc = torch.get_num_threads(), ctypes.CDLL(None)
    if glibc := hasattr(libc, "mallopt"):
        # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD: otherwise each training step returns the memory of activations
        # to the system and gets it again page by page, which takes 4 to 8 % of the time.
        for option, value in ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**25)):
            libc.mallopt(option, value)
    yield
    torch.set_num_threads(thread_count)
    if glibc:
        libc.malloc_trim(0)


_ONE_TORCH_THREAD = SharedSettings(_one_torch_thread)


@contextmanager
def worker_threads(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Create a pool of ``count`` worker threads (None: one per core), with one torch thread per operation."""
    with _ONE_TORCH_THREAD:
        # Each thread has its own setting, which some of torch's libraries do not inherit.
        torch.set_num_threads(1)
        with ThreadPoolExecutor(count or cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
