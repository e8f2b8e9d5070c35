"""Child processes that exit with their parent, even if the parent is killed."""

import multiprocessing
import os
import threading
import time


def end_with_parent() -> None:
    """Exit this child process at once, without cleanup, when its parent process is gone.

    A killed parent cannot stop its children: pool workers would wait for work forever, and ranks would go on training.
    Call it first in the child, as the ``initializer`` of a pool or at the top of a program.
    """
    threading.Thread(target=_end_after_parent, args=(os.getppid(),), name="parent watch", daemon=True).start()


def _end_after_parent(number: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Waits on a pipe that only the parent holds open: the parent process id may be that of a fork server.
        parent.join()
    else:
        while os.getppid() == number:
            time.sleep(1)
    os._exit(1)
