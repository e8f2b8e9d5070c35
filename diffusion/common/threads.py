"""Computing side by side: each lane is one thread on one core, whatever it computes.

Torch would rather split each operation over the cores. Networks as small as ours then spend their time
waiting for each other thousands of times a second, and if anything else runs on the machine, each wait
may take a time slice: measured on two cores with one busy neighbour, training fell from 420 to under
10 images a second, and with two lanes from 430 to 150. And because an operation on one thread always
adds in the same order, the number of cores changes no bits.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

import torch


class _Unsplit:
    """Torch splits no operation as long as anybody is inside, in whatever thread; the last one puts back what was.

    How many threads torch uses is one number for the whole process, which several at a time cannot each put back.
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
def lanes(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A pool of ``count`` lanes (None: one for each core), inside which torch splits no operation."""
    with (
        _UNSPLIT,
        # Each new thread has a count of its own, which not all of torch's libraries take over from the first.
        ThreadPoolExecutor(count or cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        yield pool


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
