"""Computing side by side: each lane is one thread on one core, whatever it computes.

Torch would rather split each operation over the cores. Networks as small as ours then spend their time
waiting for each other thousands of times a second, and if anything else runs on the machine, each wait
may take a time slice: measured on two cores with one busy neighbour, training fell from 420 to under
10 pictures a second, and with two lanes from 430 to 150. And because an operation on one thread always
adds in the same order, the number of cores changes no bits.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def lanes(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A pool of ``count`` lanes (None: one for each core), inside which torch splits no operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Each new thread has a count of its own, which not all of torch's libraries take over from the first.
        with ThreadPoolExecutor(count or cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
