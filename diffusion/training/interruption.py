"""Signals during training: work goes on in a thread until it can stop, and only then is raised what a signal raises."""

import logging
import signal
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue

import torch

from diffusion.common.device import set_current_device

LOOK_SECONDS = 0.5
"""Seconds between looks at signals and at the end of a training."""
PATIENCE = 5.0
"""Seconds after the first signal from which Ctrl-C ends a training at once."""
LEAVING = "stopping after this step: Ctrl-C again, after %d s, leaves without a checkpoint"
Work = Callable[[Callable[[], bool]], bool]
"""Gets a function that says whether to stop, and returns whether it was not stopped."""

logger = logging.getLogger(__name__)


@contextmanager
def interruptible(device: torch.device) -> Iterator[Callable[[Work], None]]:
    """Context with a function that runs work, on ``device``, until it ends or a signal has stopped it.

    What the handler of the signal raises is raised at the end of the work: no exception strikes inside of it, where a
    step might be half done. The handler of SIGTERM stays the caller's, as Prefect reschedules a run only as long as it
    is its own; without one SystemExit(143) is raised. Outside of the main thread, which alone gets signals, work runs
    where it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _run_here
        return
    has_handler = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if not has_handler:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield lambda work: _InterruptibleWork(work, device).run()
    finally:
        if not has_handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run_here(work: Work) -> None:
    if not work(lambda: False):
        sys.exit(128 + signal.SIGTERM)


class _InterruptibleWork:
    """Work in a thread while the main thread waits for signals.

    A KeyboardInterrupt after ``PATIENCE`` seconds leaves the work behind, which may hang: it then ends, as at a kill,
    when it next asks whether to stop. A signal may raise between any two operations. Lists, queues and the start of a
    thread are in C, and leave no lock behind, as Event, Future and Thread do.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device, self.context = work, device, copy_context()
        self.interrupts, self.seconds = list[BaseException](), list[float]()
        """What the handlers of signals raised, and when."""
        self.begun, self.outcome, self.left = list[bool](), list[bool | BaseException](), list[BaseException]()
        self.ends, self.starts = SimpleQueue[None](), [start_new_thread]

    def run(self) -> None:
        """Run the work; raises what a signal raised, or what the work did."""
        self._wait()
        if self.left:
            raise self.left[0]
        failure = next((item for item in self.outcome if isinstance(item, BaseException)), None)
        if self.interrupts:
            if failure is not None:
                logger.warning("training failed after a signal, and wrote no checkpoint", exc_info=failure)
            raise self.interrupts[0] from failure
        if failure is not None:
            raise failure
        if not self.outcome[0]:
            # A signal stopped another process: this one ends in the same way.
            signal.raise_signal(signal.SIGTERM)
            sys.exit(128 + signal.SIGTERM)

    def _wait(self) -> None:
        """Start the thread and wait for its end, or for the second signal."""
        while not self.left:
            try:
                while not self.outcome and (self.begun or not self.interrupts):
                    if self.starts:
                        self.starts.pop()(self._work, ())
                    # A signal may take the item, come before the thread has begun, which then does nothing, or fall
                    # between Python's last look at signals and the wait, which it then does not end.
                    with suppress(Empty):
                        self.ends.get(timeout=LOOK_SECONDS)
                return
            except BaseException as error:  # noqa: BLE001 (raised by ``run``)
                self.interrupts += [error]
                self.seconds += [time.monotonic()]
                if isinstance(error, KeyboardInterrupt):
                    if self.seconds[-1] - self.seconds[0] >= PATIENCE:
                        self.left += [error]
                    elif len(self.seconds) == 1:
                        # In a thread, as logging has locks.
                        start_new_thread(logger.info, (LEAVING, PATIENCE))

    def _work(self) -> None:
        self.begun.append(True)
        if self.interrupts:
            self.outcome.append(False)  # else a wait that has seen ``begun`` would not end
            return
        try:
            torch.set_num_threads(1)  # see worker_threads
            set_current_device(self.device)
            self.outcome.append(self.context.run(self.work, self._must_stop))
        except BaseException as error:  # noqa: BLE001 (raised by ``run``)
            self.outcome.append(error)
        self.ends.put(None)

    def _must_stop(self) -> bool:
        if self.left:
            # Another process may train in the folder by now.
            raise self.left[0]
        return bool(self.interrupts)
