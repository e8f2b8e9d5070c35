"""Run a script in several processes that train together, as torchrun does, but with their imports done once.

python -m tests.builders.forked_ranks COUNT SCRIPT ARGUMENT …

If one fails, the others are terminated. Nothing is started again: tests of that use torchrun itself.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable

import torch._dynamo  # as the first optimizer does
import torch.distributed.fsdp  # noqa: F401
import torch.multiprocessing as mp

from diffusion.training import train  # noqa: F401 (all before the processes part)
from flows.local_stack.server_process import choose_ports


def spawn(function: Callable[..., None], arguments: tuple[object, ...], count: int) -> None:
    """Call ``function`` with its rank and ``arguments`` in ``count`` processes, as mp.spawn does, but forked."""
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(function, arguments, count, start_method="forkserver")  # type: ignore[no-untyped-call]


def main() -> int:
    count, script = int(sys.argv[1]), sys.argv[2]
    [port] = choose_ports(1)
    ranks: list[int] = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv = sys.argv[2:]
            runpy.run_path(script, run_name="__main__")
            return 0
        ranks.append(child)
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status:
            for each in ranks:
                os.kill(each, signal.SIGTERM)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
