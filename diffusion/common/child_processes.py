"""Child processes that end when the process that started them does, even if that one is killed."""

import multiprocessing
import os
import threading
import time

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a process that knows its parent by its number alone looks whether it still has that parent."""


def end_with_parent() -> None:
    """Have this child process end at once, without cleaning up, when its parent process is gone.

    A killed parent cannot end its children: those of a pool would wait for work for ever, ranks would go on training.
    Call it first in the child, as the ``initializer`` of a pool or at the top of a program.
    """
    threading.Thread(target=_end_after_parent, args=(os.getppid(),), name="parent watch", daemon=True).start()


def _end_after_parent(number: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A pipe whose other end only the parent has: a fork server lives as long as its children, and tells nothing.
        parent.join()
    else:
        while os.getppid() == number:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)
