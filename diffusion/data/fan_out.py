"""One way to fan out: a function on many items, on threads or processes of this machine or on a Ray cluster."""

import ctypes
import logging
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import lru_cache, partial
from importlib.util import find_spec
from logging.handlers import QueueHandler
from multiprocessing import forkserver, get_context
from queue import SimpleQueue
from typing import Any, Literal, Protocol, TypeVar

from tenacity import Retrying, retry_if_exception, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_random_exponential

from diffusion.common.child_processes import end_with_parent
from diffusion.common.errors import DarkroomError, TransientError, UserError, install_hint
from diffusion.data.prefetch import FutureLike, prefetch, yield_in_order

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors of the system that another attempt meets again."""
MAX_ATTEMPTS, MAX_WAIT = 3, 10.0
"""Attempts at an item, and the longest wait before the next one, in seconds."""
_WORK: ContextVar[Callable[[Any], Any]] = ContextVar("work")
"""What this process of a pool does with each item."""


class Workers(Protocol):
    """A configuration that says where items run."""

    @property
    def runner(self) -> Literal["threads", "processes", "ray"]:
        """Return what runs items: threads or processes of this machine, or Ray."""

    @property
    def workers(self) -> int:
        """Return how many items run at once."""


class FanOut(Protocol):
    """Runs a function on items on any workers; yields the results in the order of the items.

    At most twice as many items as workers are started before their results are taken. An item that fails with a
    TransientError, or an OSError that may pass, is tried again where it runs; any other error, or the last one, is
    raised here.
    """

    def __call__(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Run ``work`` on ``items``; on processes and on Ray both are pickled, ``work`` once per process."""


def make_fan_out(config: Workers, *, gpus: int = 0) -> FanOut:
    """Fan out as ``config`` says; processes start at once, and Ray with the first item.

    On Ray, RAY_ADDRESS names the cluster (default: one on this machine, for as long as the items take). Each item has a
    core there, and ``gpus`` GPUs, which its process keeps for the next item. Raises UserError if Ray is not installed.
    """
    if config.runner == "processes":
        # The fork server imports the modules once for all while the caller plans.
        forkserver.set_forkserver_preload(["diffusion.data.ingest.chunks"])
        forkserver.ensure_running()
    if config.runner == "ray" and find_spec("ray") is None:
        raise UserError(f"runner=ray needs Ray, or use processes: {install_hint('ray')}")

    def fan_out(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        run = partial(_attempt, work)
        if config.runner == "threads":
            # By their context, records of the log find the Prefect run that they are part of.
            context = copy_context()
            yield from prefetch(lambda item: context.copy().run(run, item), items, config.workers)
            return
        if config.runner == "processes":
            # Pickled here: torch would share each tensor by a file descriptor, and /dev/shm may be too small for them.
            shared = (pickle.dumps(run),)
            pool = ProcessPoolExecutor(config.workers, get_context("forkserver"), _start_process, shared)
            outcomes: Iterator[tuple[Result, list[logging.LogRecord]]] = map(
                pickle.loads, prefetch(_run_in_process, items, config.workers, pool)
            )
        else:
            outcomes = _run_on_ray(run, items, config.workers, gpus)
        for result, records in outcomes:
            for record in records:
                logging.getLogger(record.name).handle(record)
            yield result

    return fan_out


def _attempt(work: Callable[[Item], Result], item: Item) -> Result:
    """Call ``work``, again after errors that may pass."""
    retrying = Retrying(
        retry=retry_if_exception(
            lambda error: isinstance(error, TransientError | OSError) and not isinstance(error, LASTING)
        ),
        stop=stop_after_attempt(MAX_ATTEMPTS),
        wait=wait_random_exponential(max=MAX_WAIT),
        before_sleep=lambda state: logger.warning("tried again: %s", state.outcome and state.outcome.exception()),
        reraise=True,
    )
    return retrying(work, item)


def _start_process(work: bytes) -> None:
    """Keep ``work``, which the parent pickled, in a process of a pool."""
    end_with_parent()
    _WORK.set(pickle.loads(work))  # noqa: S301


def _run_in_process(item: Any) -> bytes:
    return pickle.dumps(_log_apart(_WORK.get(), item))


@lru_cache(maxsize=1)
def _fetch_work(reference: Any) -> Callable[[Any], Any]:
    import ray

    return ray.get(reference)  # type: ignore[no-any-return]


def _run_on_node(references: list[Any], item: Any) -> tuple[Any, list[logging.LogRecord]]:
    return _log_apart(_fetch_work(references[0]), item)


class _GPUProcess:
    """Process on Ray that keeps its GPUs, and with them what the work has loaded: a task loses both when it ends."""

    def has_started(self) -> bool:
        return True

    def run(self, references: list[Any], item: Any) -> tuple[Any, list[logging.LogRecord]]:
        return _run_on_node(references, item)


class _GPUPool:
    """At most ``workers`` processes on Ray with ``gpus`` GPUs each; a new one takes the place of one that dies.

    Ray's ``max_restarts`` would have its item wait for a GPU that others have by then, and counts every two seconds of
    that as one of ``max_task_retries``.
    """

    def __init__(self, references: list[Any], workers: int, gpus: int) -> None:
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError

        self._references, self._workers, self._is_closed = references, workers, False
        self._make: Any = ray.remote(num_cpus=1, num_gpus=gpus)(_GPUProcess).remote
        self._deaths = RayActorError, OutOfMemoryError
        self._processes, self._idle = list[Any](), SimpleQueue[Any]()
        self._threads = ThreadPoolExecutor(workers)

    def submit(self, item: Any) -> Future[Any]:
        """Run ``item`` in the next process without work."""
        if len(self._processes) < self._workers:
            self._processes.append(process := self._make())
            self._put_back(process)
        retry, stop = retry_if_exception_type(self._deaths), stop_after_attempt(MAX_ATTEMPTS)
        return self._threads.submit(Retrying(retry=retry, stop=stop, reraise=True), self._run, item)

    def close(self) -> None:
        """End all processes, and thereby threads that wait for one."""
        import ray

        self._is_closed = True
        for process in self._processes:
            ray.kill(process)
        self._threads.shutdown(cancel_futures=True)

    def _put_back(self, process: Any) -> None:
        """Give ``process`` its next item once it runs: one for which there is no GPU yet gets none."""
        process.has_started.remote().future().add_done_callback(lambda _: self._idle.put(process))

    def _run(self, item: Any) -> Any:
        import ray

        process = self._idle.get()
        try:
            return ray.get(process.run.remote(self._references, item))
        except self._deaths:
            if not self._is_closed:
                ray.kill(process)  # one that is not reached may live
                self._processes.append(process := self._make())
            raise
        finally:
            self._put_back(process)


def _log_apart(work: Callable[[Item], Result], item: Item) -> tuple[Result, list[logging.LogRecord]]:
    """Call ``work`` in a process of its own: returns its result and the warnings that it logged."""
    records: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler = QueueHandler(records)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        result = work(item)
    finally:
        logging.getLogger().removeHandler(handler)
    return result, [records.get() for _ in range(records.qsize())]


def _run_on_ray(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, gpus: int
) -> Generator[tuple[Result, list[logging.LogRecord]], None, None]:
    """Yield ``work`` of each of ``items`` in order; what ran on a node that dies runs on another one.

    Tasks, and not Ray Data: that wants all items before it starts, bounds by bytes alone how far it runs ahead, and
    fails for Ray's clients (``ray://``).
    """
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

    is_joined, pools = ray.is_initialized(), list[_GPUPool]()

    def start() -> Iterator[FutureLike[tuple[Result, list[logging.LogRecord]]]]:
        references = list[Any]()
        for item in items:
            if not references:
                _join_ray()
                references.append(ray.put(work))
                pools.extend([_GPUPool(references, workers, gpus)] if gpus else [])
            yield pools[0].submit(item) if pools else task.remote(references, item).future()

    task: Any = ray.remote(num_cpus=1, num_gpus=0)(_run_on_node)
    try:
        yield from yield_in_order(start(), 2 * workers)
    except RayTaskError as error:
        # What ``work`` raised; Ray's own error has the worker's traceback in its text.
        raise error.cause from (None if isinstance(error.cause, DarkroomError) else error)
    except (WorkerCrashedError, RayActorError, OutOfMemoryError) as error:
        raise DarkroomError(
            "Ray's processes for an item were killed each time, most likely as a node was out of memory: start fewer "
            "at once (workers), or give nodes more memory"
        ) from error
    finally:
        for pool in pools:
            pool.close()
        if not is_joined:
            with _sigterm_kept():
                ray.shutdown()  # ends all that still runs


def _join_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine, unless this process has done so."""
    import ray

    if ray.is_initialized():
        return
    try:
        with _sigterm_kept():
            # The dashboard takes a third of the time in which a node starts.
            ray.init(logging_level=logging.WARNING, include_dashboard=False)
    except Exception as error:  # a plain one where a node does not come up
        reason = " ".join(str(error).split())[:200]
        raise DarkroomError(
            f"Ray did not start, or is not reached ({reason}): check RAY_ADDRESS and RAY_AUTH_MODE. "
            "Without them a node must start within 30 seconds: try an idle machine, or use processes"
        ) from error


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Context that leaves the handler of SIGTERM as it was, such as Prefect's, which ends its work first.

    Ray sets its own as it starts, in Python and below it, in any thread, and the system's as it ends, which kills.
    """
    libc, action = ctypes.CDLL(None), ctypes.create_string_buffer(512)  # more than a struct sigaction has
    handler = signal.getsignal(signal.SIGTERM)
    libc.sigaction(signal.SIGTERM, None, action)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        libc.sigaction(signal.SIGTERM, action, None)
