"""Child processes: the environment of foreign programs, and an end with their parent, even if it is killed."""

import multiprocessing
import os
import threading
import time
from collections.abc import Collection

HARMLESS = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
        *("VIRTUAL_ENV", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "NO_PROXY", "no_proxy"),
    )
)
HARMLESS_PREFIXES = (
    "LC_",
    "ATEN_",
    "CUDA_",
    "CUBLAS_",
    "DNNL_",
    "MKL_",
    "NVIDIA_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "PYTORCH_",
    "XDG_",
)
"""Variables that hold no secret: where programs, files and certificates are, language, devices, kernels and threads."""


def child_environment(names: Collection[str] = ()) -> dict[str, str]:
    """Return the variables that a foreign program gets: those that hold no secret, and ``names``."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in HARMLESS or name in names or name.startswith(HARMLESS_PREFIXES)
    }


def end_with_parent() -> None:
    """Exit this child process at once, without cleanup, when its parent process is gone.

    A killed parent cannot stop its children: pool workers would wait for work forever, and ranks would go on training.
    Call it first in the child, as the ``initializer`` of a pool or at the top of a program.
    """
    threading.Thread(target=_end_after_parent, args=(os.getppid(),), name="parent watch", daemon=True).start()


def _end_after_parent(number: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Waits on a pipe that only the parent holds open: the parent process may be a fork server.
        parent.join()
    else:
        while os.getppid() == number:
            time.sleep(1)
    os._exit(1)
