"""Figures on halves without threads, for simulations."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


class Alone(Executor):
    """Does what it is given at once."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        result: Future[T] = Future()
        result.set_result(fn(*args, **kwargs))
        return result


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, what would be shared among threads is done by whoever asks for it, to the same bits.

    Thousands of figures on a hundred points are handed from thread to thread for longer than they take, and on a busy
    machine for a hundred times as long.
    """

    @contextmanager
    def alone(count: int = 1) -> Iterator[Executor]:
        yield Alone()

    with pytest.MonkeyPatch.context() as patch:
        for module in ("kid", "frechet", "precision_recall", "neighbours"):
            patch.setattr(f"diffusion.evaluation.metrics.{module}.worker_threads", alone)
        yield
