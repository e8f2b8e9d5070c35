"""Several who compute at once in one process: torch splits no operation while any of them is at it."""

import mmap
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from diffusion.common.threads import worker_threads


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_torch_splits_nothing_until_the_last_is_done(three_threads: None) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(worker_threads(1))
    pool = second.enter_context(worker_threads(2))
    first.close()
    assert torch.get_num_threads() == 1
    assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    second.close()
    assert torch.get_num_threads() == 3


def test_after_an_error_torch_is_as_it_was(three_threads: None) -> None:
    with pytest.raises(ZeroDivisionError), worker_threads(1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no mallopt")
def test_memory_is_kept_for_the_next_step() -> None:
    def faults(step: Callable[[], object]) -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        step()
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    def step(_: int) -> int:
        return faults(lambda: [torch.ones(2**20) for _ in range(30)])

    with mmap.mmap(-1, 30 * 2**22) as fresh:
        once = faults(lambda: fresh.write(b"1" * len(fresh)))
    if not once:
        pytest.skip("this system counts no page faults")
    with worker_threads(1) as pool:
        for run in (map, pool.map):
            # The first steps may take memory that the process has kept, or not.
            _, _, *others = run(step, range(4))
            assert max(others) < once / 2
